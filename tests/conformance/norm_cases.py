"""Cases and comparisons for normalization beside torch: the files ``test_norm_*.py`` of this folder share them."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from shared import assert_same
from torch.testing import assert_close

import fastreg.functional as FF
from fastreg.ops.fused import activated

FUNCTIONS = ("batch_norm", "group_norm", "instance_norm")
BATCH_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
INSTANCE_NORMS = ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
MODULES = (*BATCH_NORMS, "GroupNorm", *INSTANCE_NORMS)
RANK = {name: int(name[-2]) + 2 for name in (*BATCH_NORMS, *INSTANCE_NORMS)} | {"GroupNorm": 4}
CHANNELS = 6
SHAPES = {3: (4, CHANNELS, 5), 4: (3, CHANNELS, 5, 3), 5: (2, CHANNELS, 3, 2, 3)}

slow = pytest.mark.slow


def on_both(names, *values, only=lambda *case: True, fast=lambda *case: True):
    """All combinations of the values (or ``only`` some), on both backends.

    fast: which combinations the default run takes on the kernels; ``-m slow`` takes the others. The interpreter needs
    about 0.2 s a launch, and no combination asks the kernels for anything that those do not.
    """
    cases = [
        pytest.param(*case, path, marks=[slow] if path == "kernels" and not fast(*case) else [])
        for case in itertools.product(*values)
        if only(*case)
        for path in ("kernels", "aten")
    ]
    return pytest.mark.parametrize((*names.split(), "path"), cases, indirect=["path"])


all_modules = pytest.mark.parametrize("name", MODULES)
some_modules = on_both(
    "name", MODULES, fast=("BatchNorm1d", "BatchNorm2d", "GroupNorm", "InstanceNorm2d").__contains__
)


def assert_computed_alike(actual, expected, scale=0.0, rounding=0.0):
    """Equal up to what computing in fp32 (fp64 for fp64) and one rounding to the dtype of ``actual`` may do.

    scale: the size of the terms of a sum, where it is larger than the sum. 64 ulps of the largest term: sums of at
    most some thousand terms, whose roundings grow as the root of their number, and a chain of about ten roundings
    behind them. 16-bit results are rounded once more, by less than one unit (the interpreter truncates bf16).
    rounding: of terms that were rounded to 16 bits before the sum.
    """
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    accumulated = torch.float64 if actual.dtype == torch.float64 else torch.float32
    largest = expected.abs().nan_to_num(posinf=0).max().item()
    atol = 64 * torch.finfo(accumulated).eps * max(scale, largest) + rounding
    eps = torch.finfo(actual.dtype).eps
    rtol = 0.0 if actual.dtype == accumulated else 1.01 * eps
    atol += 0.0 if actual.dtype == accumulated else torch.finfo(actual.dtype).tiny * eps
    assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


def gradient_scale(x, groups, eps, weight, dy, var=None):
    """The size of what the gradient of x is a difference of: dy weight / sqrt(var + eps)."""
    if x.numel() == 0:
        return 0.0
    if var is None:
        x = x.detach().double()
        units = x.transpose(0, 1).flatten(1) if groups == 0 else x.reshape(x.shape[0] * groups, -1)
        var = units.var(1, correction=0)
    rstd = (var.double().min() + eps).rsqrt().nan_to_num(0).item()
    return rstd * dy.abs().max().item() * (1 if weight is None else weight.abs().max().item())


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


# --- the library's functions, plain and fused -------------------------------------------------------------


def _statistics(x):
    """Running statistics that every dtype has exactly."""
    steps = torch.arange(x.shape[1], dtype=x.dtype, device=x.device) / 8
    return steps - 0.375, steps + 0.25


def _kind(name, *arguments, evaluation=False, **keywords):
    """A function (namespace, x, weight, bias, **fused) of one way to normalize."""

    def call(f, x, weight=None, bias=None, **fused):
        if name == "group_norm":
            return f.group_norm(x, *arguments, weight, bias, **keywords, **fused)
        mean, var = _statistics(x) if evaluation else (None, None)
        return getattr(f, name)(x, mean, var, weight, bias, not evaluation, **keywords, **fused)

    return call


KINDS = {
    "batch_norm": _kind("batch_norm"),
    "batch_norm_evaluation": _kind("batch_norm", evaluation=True),
    "group_norm": _kind("group_norm", 3),
    "instance_norm": _kind("instance_norm"),
    "instance_norm_evaluation": _kind("instance_norm", evaluation=True),
}
all_kinds = pytest.mark.parametrize("kind", KINDS)
GROUPS = {"group_norm": 3, "instance_norm": CHANNELS}  # 0 for batch normalization


def reference(kind, x, weight=None, bias=None, activation=None, residual=None):
    """activation(norm(x) + residual) by torch alone."""
    return activated(KINDS[kind](F, x, weight, bias), activation, residual)


def tensors(shape, device, dtype=torch.float64):
    """x, weight, bias, residual. The weights are away from 0, some of them negative."""
    x, residual = torch.randn(2, *shape, dtype=dtype, device=device)
    weight = torch.rand(shape[1], dtype=dtype, device=device) + 0.5
    weight[::3] *= -1
    return x, weight, torch.randn(shape[1], dtype=dtype, device=device), residual


def groups_of(layer):
    if isinstance(layer, torch.nn.GroupNorm):
        return layer.num_groups
    return layer.num_features if isinstance(layer, torch.nn.modules.instancenorm._InstanceNorm) else 0


def randomize(layer):
    """Parameters and statistics at their starting values hide errors."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5)
        for name, buffer in layer.named_buffers():
            if name.startswith("running"):
                buffer.uniform_(0.2, 1.2)


def assert_layers_agree(layer, expected_layer, x, exact, steps=2):
    """Both do the same with ``x``: results, all gradients, and state after each step."""
    dy = torch.randn_like(x)
    for _ in range(steps):
        before = copy.deepcopy(expected_layer)
        (leaf,), (expected_leaf,) = leaves(x), leaves(x.to(dtype_of(expected_layer, x)))
        y, expected = layer(leaf), expected_layer(expected_leaf)
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
        parameters, expected_parameters = list(layer.parameters()), list(expected_layer.parameters())
        gradients = torch.autograd.grad(y, [leaf, *parameters], dy)
        expected_gradients = torch.autograd.grad(
            expected, [expected_leaf, *expected_parameters], dy.to(expected.dtype)
        )
        if exact:
            assert y.stride() == expected.stride()
            assert_same(y, expected)
            assert_same(gradients, expected_gradients)
        else:
            assert y.stride() == leaf.stride()
            assert_computed_alike(y, expected)
            batched = x if x.dim() == RANK.get(type(layer).__name__, x.dim()) else x.unsqueeze(0)
            tracked = getattr(before, "running_var", None)
            var = None if before.training or tracked is None else tracked
            scale = gradient_scale(
                batched, groups_of(layer), layer.eps, getattr(layer, "weight", None), dy, var
            )
            assert_computed_alike(gradients[0], expected_gradients[0], scale)
            for gradient, expected_gradient in zip(gradients[1:], expected_gradients[1:], strict=True):
                terms = x.numel() // gradient.numel() if x.numel() else 0
                assert_computed_alike(
                    gradient, expected_gradient, terms * dy.abs().max().item() if terms else 0
                )
        for (key, value), (expected_key, expected_value) in zip(
            layer.state_dict().items(), expected_layer.state_dict().items(), strict=True
        ):
            assert key == expected_key
            if exact or not value.is_floating_point():
                assert_same(value, expected_value.to(value.dtype))
            else:
                assert_computed_alike(value, expected_value)


def assert_states_agree(layer, expected_layer, path):
    state, expected = layer.state_dict(), expected_layer.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        (assert_computed_alike if path == "kernels" and value.is_floating_point() else assert_same)(
            state[key], value
        )


def dtype_of(layer, x):
    """The dtype that torch's layer is to be called in: x's, or that of its own (fp64) parameters and buffers."""
    state = [t.dtype for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()]
    return state[0] if state else x.dtype


def _layer(nn, name, *arguments, **keywords):
    first = (3, CHANNELS) if name == "GroupNorm" else (CHANNELS,)
    return getattr(nn, name)(*first, *arguments, **keywords)


# --- layouts ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "samples_inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels_first_of_all": lambda x: x.movedim(1, 0).contiguous().movedim(0, 1),
    "gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "channel_gaps": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "first_dimension_sliced": lambda x: x.repeat_interleave(2, 0)[::2],
    "offset": lambda x: torch.cat((x[:1], x))[1:],
    "expanded_samples": lambda x: x[:1].expand(x.shape),
    "expanded_positions": lambda x: x[..., :1].expand(x.shape),
}


def check_gradients(kind, given, dy, path, **fused):
    """Result and gradients of ``given`` (x, weight, bias, residual) as they lie, against torch in fp64."""
    exact = leaves(*(None if t is None else t.double() for t in given))
    for t in given:
        if t is not None:
            t.requires_grad_()
    x, weight, bias, residual = given
    y = KINDS[kind](FF, x, weight, bias, residual=residual, **fused)
    expected = reference(kind, *exact[:3], fused.get("activation"), exact[3])
    wanted = [t for t in given if t is not None]
    gradients = torch.autograd.grad(y, wanted, dy)
    expected_gradients = torch.autograd.grad(expected, [t for t in exact if t is not None], dy.double())
    assert_computed_alike(y, expected)
    base = kind.removesuffix("_evaluation")
    var = _statistics(x)[1] if kind.endswith("evaluation") else None
    scale = gradient_scale(exact[0], GROUPS.get(base, 0), 1e-5, weight, dy, var)
    # Behind an activation its gradient is in the dtype of dy, as in eager PyTorch. (A derivative is 1.2 at most.)
    rounding = 0.0 if fused.get("activation") is None else 1.2 * torch.finfo(dy.dtype).eps * scale
    for t, gradient, expected_gradient in zip(wanted, gradients, expected_gradients, strict=True):
        assert gradient.dtype == t.dtype
        assert gradient.shape == t.shape
        parameter = t is weight or t is bias
        assert_computed_alike(
            gradient,
            expected_gradient,
            x.numel() // t.numel() * dy.abs().max().item() if parameter else scale,
            rounding if t is x else 0.0,
        )
    return y, gradients

"""Derivatives of batch, group and instance normalization, torch.func, autocast, checkpointing, subclasses."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from machine_option import bf16
from norm_cases import (
    CHANNELS,
    KINDS,
    LAYOUTS,
    MODULES,
    RANK,
    SHAPES,
    _layer,
    all_kinds,
    assert_computed_alike,
    check_gradients,
    leaves,
    on_both,
    reference,
    slow,
    some_modules,
    tensors,
)
from shared import Marked, assert_same, outcome
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastreg.functional as FF
import fastreg.nn as fnn
from fastreg.ops.fused import ACTIVATIONS

# --- derivatives ------------------------------------------------------------------------------------------


def check_derivatives(function, inputs, **options):
    """First and second derivatives, in fast mode (random projections of the Jacobians), at torch's tolerances."""
    inputs = tuple(t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs)
    assert gradcheck(function, inputs, fast_mode=True, **options)
    assert gradgradcheck(function, inputs, fast_mode=True, **options)


def derivatives(function, inputs, dy, directions):
    """Value, first derivatives, and the derivatives of those along ``directions``, by the inputs and by dy."""
    inputs, (dy,) = leaves(*inputs), leaves(dy)
    y = function(*inputs)
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
    second = torch.autograd.grad(along, [*inputs, dy], allow_unused=True, materialize_grads=True)
    return y, *first, *second


COMBINATIONS = {
    "plain": ("x",),
    "affine": ("x", "weight", "bias"),
    "weight": ("x", "weight"),
    "bias": ("x", "bias"),
    "residual": ("x", "residual"),
    "all": ("x", "weight", "bias", "residual"),
}


def fused_function(kind, names, activation):
    def function(*values):
        given = dict(zip(names, values, strict=True))
        x = given.pop("x")
        return KINDS[kind](FF, x, activation=activation, **given)

    return function


@on_both(
    "kind combination activation",
    KINDS,
    COMBINATIONS,
    (None, "silu"),
    fast=lambda kind, combination, activation: (
        (kind, combination, activation) == ("group_norm", "all", "silu")
    ),
)
def test_gradcheck_and_gradgradcheck_of_every_combination(kind, combination, activation, device, path):
    names = COMBINATIONS[combination]
    if path == "aten" and combination == "bias":
        pytest.skip(
            "torch's own second derivatives are wrong there: the bias gradient is cut off, or they crash"
        )
    values = dict(zip(("x", "weight", "bias", "residual"), tensors((3, 6, 2, 2), device), strict=True))
    check_derivatives(fused_function(kind, names, activation), [values[name] for name in names])


@slow
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@all_kinds
def test_gradcheck_and_gradgradcheck_of_every_activation(kind, activation, residual, device, path):
    """No value is near a kink: finite differences step by 1e-6, and there are 72 values."""
    names = COMBINATIONS["all" if residual else "affine"]
    values = dict(zip(("x", "weight", "bias", "residual"), tensors((3, 6, 2, 2), device), strict=True))
    check_derivatives(fused_function(kind, names, activation), [values[name] for name in names])


@on_both(
    "kind combination activation layout",
    KINDS,
    COMBINATIONS,
    (None, *ACTIVATIONS),
    ("contiguous", "channels_last"),
    only=lambda kind, combination, activation, layout: (
        combination == "all" or (activation in (None, "relu") and layout == "contiguous")
    ),
    fast=lambda kind, combination, activation, layout: (
        (kind in ("batch_norm", "group_norm") and combination == "all" and layout == "channels_last")
        or (combination in ("bias", "residual") and activation in (None, "relu") and layout == "contiguous")
    ),
)
def test_second_derivatives_are_those_of_the_definition(kind, combination, activation, layout, device, path):
    """The definition is torch's function, activation and sum in fp64, which gradgradcheck has tried above."""
    names = COMBINATIONS[combination]
    if path == "aten" and combination == "bias":
        pytest.skip(
            "torch's own second derivatives are wrong there: the bias gradient is cut off, or they crash"
        )
    values = dict(zip(("x", "weight", "bias", "residual"), tensors((3, 6, 2, 4), device), strict=True))
    values = {name: LAYOUTS[layout](t) if t.dim() == 4 else t for name, t in values.items() if name in names}
    dy = torch.randn((3, 6, 2, 4), dtype=torch.float64, device=device)
    directions = [torch.randn_like(t) for t in values.values()]

    def definition(*given):
        given = {"weight": torch.ones(CHANNELS, dtype=torch.float64, device=device)} | dict(
            zip(names, given, strict=True)
        )
        return reference(kind, activation=activation, **given)

    results = derivatives(fused_function(kind, names, activation), values.values(), dy, directions)
    expected = derivatives(definition, values.values(), dy, directions)
    # fp64: sums of at most 72 terms, of some hundreds in second derivatives.
    assert_close(results, expected, rtol=1e-10, atol=1e-9)


@on_both(
    "kind activation dtype",
    KINDS,
    (None, *ACTIVATIONS),
    (torch.float32, torch.bfloat16, torch.float16),
    fast=lambda kind, activation, dtype: (
        (kind == "batch_norm" and dtype == torch.bfloat16)
        or (activation == "gelu" and dtype == torch.float16)
        or (kind == "group_norm" and activation in ("relu", "tanh") and dtype == torch.float32)
    ),
)
def test_gradients_in_every_dtype(kind, activation, dtype, device, path):
    """Against fp64 from the same rounded input; parameters in fp32, as under autocast and in mixed precision."""
    if path == "aten" and dtype != torch.float32:
        pytest.skip("rounds after every operation: that is torch's business")
    x, weight, bias, residual = tensors(SHAPES[4], device, torch.float32)
    # The fast gelu and sigmoid of the kernels are good to some 1e-6, assert_computed_alike asks for 8e-6 and more.
    given = (x.to(dtype), weight, bias, residual.to(dtype))
    check_gradients(kind, given, torch.randn_like(x).to(dtype), path, activation=activation)


@on_both(
    "kind activation needed",
    KINDS,
    (None, "relu", "mish"),
    ("x", "weight", "bias", "residual"),
    fast=lambda kind, activation, needed: (
        (kind, activation)
        in [("batch_norm", "relu"), ("batch_norm_evaluation", None), ("group_norm", "mish")]
    ),
)
def test_derivatives_of_one_input_alone(kind, activation, needed, device, path):
    """Frozen parameters, or a frozen network in front: the others then ask for nothing."""
    values = dict(zip(("x", "weight", "bias", "residual"), tensors((3, 6, 2, 2), device), strict=True))
    all_needed = [value.clone().requires_grad_() for value in values.values()]
    function = fused_function(kind, tuple(values), activation)
    dy = torch.randn(3, 6, 2, 2, dtype=torch.float64, device=device)
    expected = torch.autograd.grad(function(*all_needed), all_needed[list(values).index(needed)], dy)
    values[needed].requires_grad_()
    y = function(*values.values())
    y.backward(dy)
    # fp64: the same terms, perhaps summed by another kernel.
    assert_close(values[needed].grad, expected[0], rtol=1e-12, atol=1e-12)
    assert all(value.grad is None for name, value in values.items() if name != needed)


@on_both("kind", KINDS, fast=("batch_norm", "group_norm").__contains__)
def test_nothing_is_kept_where_nothing_asks_for_gradients(kind, device, path):
    x, weight, bias, residual = tensors(SHAPES[4], device)
    assert not KINDS[kind](FF, x, weight, bias, residual=residual).requires_grad
    weight.requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = KINDS[kind](FF, x, weight, bias, residual=residual, activation="relu")
        assert not y.requires_grad
        assert y.grad_fn is None
    assert y.is_inference()


@on_both(
    "kind activation changed",
    KINDS,
    (None, "silu"),
    ("x", "weight", "y"),
    fast=lambda kind, activation, changed: (activation is None) != (kind == "group_norm"),
)
def test_a_tensor_changed_before_the_backward_pass_is_noticed(kind, activation, changed, device, path):
    """Silently wrong gradients are worse than an error. What torch does not need may be changed here too."""

    def run(f):
        x, weight, bias, _ = (t.requires_grad_() for t in tensors(SHAPES[4], device))
        weight = weight * 1
        y = KINDS[kind](f, x, weight, bias, **({"activation": activation} if f is FF else {}))
        with torch.no_grad():
            {"x": x, "weight": weight, "y": y}[changed].add_(1)
        y.sum().backward()

    mine, theirs = outcome(lambda: run(FF))[0], outcome(lambda: run(F))[0]
    if changed == "y":
        assert mine == theirs == []
    elif changed == "x" or not kind.startswith("instance_norm"):
        assert mine[0] is theirs[0] is RuntimeError
        assert "inplace" in mine[1]
    else:
        # Torch keeps a copy of an instance normalization's weight; the kernels keep the weight.
        assert theirs == []
        assert mine == [] or (mine[0] is RuntimeError and "inplace" in mine[1])


@on_both(
    "kind activation",
    KINDS,
    (None, "gelu"),
    fast=lambda kind, activation: (kind, activation) in [("batch_norm", "gelu"), ("group_norm", None)],
)
def test_the_graph_is_freed_and_can_be_kept(kind, activation, device, path):
    x, weight, bias, residual = (t.requires_grad_() for t in tensors(SHAPES[4], device))
    y = KINDS[kind](FF, x, weight, bias, residual=residual, activation=activation)
    first = torch.autograd.grad(y.sum(), (x, weight, bias, residual), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, weight, bias, residual))
    assert_same(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "kind", [kind if kind == "batch_norm" else pytest.param(kind, marks=slow) for kind in KINDS]
)
def test_memory_kept_for_the_backward_pass(kind, residual, activation, device):
    """The input and a few values a channel: no normalized copy, no mask; a sign a bit, or the residual."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    shape = (4, 6, 16, 8)
    x, weight, bias, r = (t.requires_grad_() for t in tensors(shape, device, torch.float32))
    # Not leaves, so that the input is kept in any case.
    x, r = x * 1, r * 1 if residual else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = KINDS[kind](FF, x, weight, bias, residual=r, activation=activation)
    size = x.numel() * x.element_size()
    allowed = size
    if residual and activation == "relu":
        allowed += size // 32
    elif residual and activation:
        allowed += size
    # Weight, bias, mean and variance of at most 24 instances.
    assert sum(saved.values()) <= allowed + 4 * 24 * 4 + 64
    assert y.grad_fn is not None


@on_both(
    "kind activation",
    KINDS,
    (None, "gelu"),
    fast=lambda kind, activation: activation and "instance" not in kind,
)
def test_batched_gradients(kind, activation, device, path):
    """``is_grads_batched`` (vectorized Jacobians) runs the backward pass under vmap."""
    given = [t.requires_grad_() for t in tensors((3, 6, 2, 2), device)]
    y = fused_function(kind, COMBINATIONS["all"], activation)(*given)
    dy = torch.randn(3, *y.shape, dtype=torch.float64, device=device)
    expected = [torch.autograd.grad(y, given, row, retain_graph=True) for row in dy]
    batched = torch.autograd.grad(y, given, dy, retain_graph=True, is_grads_batched=True)
    for result, rows in zip(batched, zip(*expected, strict=True), strict=True):
        # fp64: the same function in another order of summation.
        assert_close(result, torch.stack(rows), rtol=1e-12, atol=1e-12)


# --- torch.func and forward-mode AD -----------------------------------------------------------------------


@on_both("kind activation", KINDS, (None, "silu"), fast=lambda kind, activation: activation)
def test_func_transforms_agree_with_autograd(kind, activation, device, path):
    given = tensors((3, 6, 2, 2), device)
    tangents = tuple(torch.randn_like(t) for t in given)
    cotangent = torch.randn_like(given[0])
    function = fused_function(kind, COMBINATIONS["all"], activation)
    inputs = leaves(*given)
    y = function(*inputs)
    gradients = torch.autograd.grad(y, inputs, cotangent)
    # fp64: kernels and ATen sum in another order.
    close = functools.partial(assert_close, rtol=1e-11, atol=1e-11)
    close(
        torch.func.grad(lambda *t: (function(*t) * cotangent).sum(), argnums=(0, 1, 2, 3))(*given), gradients
    )
    value, pullback = torch.func.vjp(function, *given)
    close(value, y.detach())
    close(pullback(cotangent), gradients)
    value, derivative = torch.func.jvp(function, given, tangents)
    close(value, y.detach())
    # <cotangent, J tangent> = <J^T cotangent, tangent>
    products = [(g * t).sum() for g, t in zip(gradients, tangents, strict=True)]
    close((derivative * cotangent).sum(), sum(products))
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(t, d) for t, d in zip(given, tangents, strict=True)))
        close(forward_ad.unpack_dual(dual).tangent, derivative)


@all_kinds
def test_vmap_is_a_loop(kind, device, path):
    x, weight, bias, residual = tensors((3, 6, 2, 2), device)
    x, residual = torch.randn(2, 4, *x.shape, dtype=torch.float64, device=device)

    def function(x, r):
        return KINDS[kind](FF, x, weight, bias, residual=r, activation="gelu")

    def gradient(x, r):
        return torch.func.grad(lambda x: function(x, r).square().sum())(x)

    for f in (function, gradient):
        expected = torch.stack([f(example, r) for example, r in zip(x, residual, strict=True)])
        assert_close(
            torch.vmap(f)(x, residual), expected, rtol=1e-11, atol=1e-11
        )  # fp64, another order of sums
    assert_close(
        torch.vmap(lambda x: KINDS[kind](FF, x, weight, bias), in_dims=1, out_dims=1)(x.transpose(0, 1)),
        torch.stack([KINDS[kind](FF, example, weight, bias) for example in x], 1),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_vmap_with_running_statistics_ends_as_in_torch(name, device, path):
    x = torch.randn(3, *SHAPES[4], device=device)

    def run(f):
        mean, var = torch.zeros(CHANNELS, device=device), torch.ones(CHANNELS, device=device)
        return torch.vmap(lambda x: getattr(f, name)(x, mean, var, None, None, True))(x)

    assert outcome(lambda: run(FF))[0] == outcome(lambda: run(F))[0]
    assert outcome(lambda: run(F))[0][0] is RuntimeError

    def batched(f):
        mean, var = torch.zeros(3, CHANNELS, device=device), torch.ones(3, CHANNELS, device=device)
        y = torch.vmap(lambda x, m, v: getattr(f, name)(x, m, v, None, None, True))(x, mean, var)
        return y, mean, var

    assert_computed_alike(batched(FF)[0], batched(F)[0])
    assert_computed_alike(torch.stack(batched(FF)[1:]), torch.stack(batched(F)[1:]))


@some_modules
def test_functional_call_of_a_layer(name, device, path):
    options = {} if name == "GroupNorm" else {"track_running_stats": True}
    layer, stock = (_layer(nn, name, affine=True, **options).to(device).double() for nn in (fnn, torch.nn))
    x = torch.randn(SHAPES[RANK[name]], dtype=torch.float64, device=device)
    state = {key: value.detach().clone() for key, value in stock.state_dict().items()}
    state["weight"] = torch.linspace(0.5, 2, CHANNELS, dtype=torch.float64, device=device)

    def loss(weight, layer, state):
        return torch.func.functional_call(layer, {**state, "weight": weight}, (x,)).sin().sum()

    mine, theirs = copy.deepcopy(state), copy.deepcopy(state)
    result = torch.func.grad(loss)(mine.pop("weight"), layer, mine)
    expected = torch.func.grad(loss)(theirs.pop("weight"), stock, theirs)
    assert_close(result, expected, rtol=1e-12, atol=1e-12)  # fp64
    assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    # The layer itself has not learned from it.
    assert_same(
        dict(layer.state_dict()),
        dict(_layer(torch.nn, name, affine=True, **options).to(device).double().state_dict()),
    )


def test_per_sample_gradients_of_group_norm(device, path):
    """vmap over grad, as differential privacy does it: why such models have group normalization."""
    layer = fnn.GroupNorm(3, CHANNELS, activation="relu").to(device).double()
    parameters = {key: value.detach() for key, value in layer.named_parameters()}
    x = torch.randn(4, *SHAPES[4][1:], dtype=torch.float64, device=device)

    def loss(parameters, example):
        return torch.func.functional_call(layer, parameters, (example.unsqueeze(0),)).square().sum()

    result = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, example in enumerate(x):
        expected = torch.func.grad(loss)(parameters, example)
        assert_close({k: v[i] for k, v in result.items()}, expected, rtol=1e-12, atol=1e-12)  # fp64


# --- autocast, checkpointing, determinism, fake and meta tensors, subclasses ------------------------------


@on_both(
    "name dtype",
    MODULES,
    (torch.float32, torch.bfloat16),
    fast=lambda name, dtype: name == "GroupNorm" or (name, dtype) == ("BatchNorm2d", torch.bfloat16),
)
def test_autocast_gives_the_dtypes_of_torch(name, dtype, device, path):
    shape = SHAPES[RANK[name]]
    linear = torch.nn.Linear(shape[-1], shape[-1], device=device)
    options = {} if name == "GroupNorm" else {"track_running_stats": True}
    layer, stock = (_layer(nn, name, affine=True, **options).to(device) for nn in (fnn, torch.nn))
    x = torch.randn(shape, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(x.to(dtype)).dtype == stock(x.to(dtype)).dtype
        y, expected = layer(linear(x)), stock(linear(x))
        assert y.dtype == expected.dtype
        fused = F.gelu(expected + x)
        residual = _layer(fnn, name, affine=True, activation="gelu").to(device)(linear(x), residual=x)
        assert residual.dtype == fused.dtype
    tolerance = bf16(4 * torch.finfo(torch.bfloat16).eps)  # both are bf16, torch with more roundings
    assert_close(y.float(), expected.float(), rtol=tolerance, atol=tolerance)
    (y.float().sum() + residual.float().sum()).backward()
    assert linear.weight.grad.dtype == layer.weight.grad.dtype == torch.float32


@on_both(
    "name use_reentrant",
    MODULES,
    (True, False),
    fast=lambda name, use_reentrant: name == "BatchNorm2d" or (name == "GroupNorm" and use_reentrant),
)
def test_checkpointing_acts_as_with_torchs_layers(name, use_reentrant, device, path):
    """Statistics are updated twice, as by torch's layers, which are computed twice too."""
    shape = SHAPES[RANK[name]]
    options = {} if name == "GroupNorm" else {"track_running_stats": True}
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    results = []
    for nn in (fnn, torch.nn):
        layer = _layer(nn, name, affine=True, **options).to(device).double()
        y = checkpoint(lambda x, layer=layer: layer(x).sin(), x, use_reentrant=use_reentrant)
        x.grad = None
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.weight.grad, dict(layer.state_dict())))
    assert_close(*results, rtol=1e-11, atol=1e-11)  # fp64


@on_both(
    "kind layout shape",
    KINDS,
    ("contiguous", "channels_last"),
    ((3, 6, 5, 7), (2, 3, 97, 101)),
    fast=lambda kind, layout, shape: (
        (kind, layout, shape[1])
        in [
            ("batch_norm", "contiguous", 3),
            ("batch_norm", "channels_last", 3),
            ("group_norm", "contiguous", 3),
            ("group_norm", "channels_last", 6),
        ]
    ),
)
def test_the_same_input_gives_the_same_bits(kind, layout, shape, device, path):
    """Large: a channel is spread over several programs."""
    x, weight, bias, residual = tensors(shape, device, torch.float32)
    x, residual = LAYOUTS[layout](x), LAYOUTS[layout](residual)
    dy = torch.randn(shape, device=device)

    def run():
        given = leaves(x, weight, bias, residual)
        y = KINDS[kind](FF, *given[:3], residual=given[3], activation="relu")
        return (y.detach(), *torch.autograd.grad(y, given, dy))

    first = run()
    assert_same(run(), first)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@all_kinds
def test_fake_and_meta_tensors_give_shapes_without_data(kind, layout, device, path):
    x, weight, bias, residual = tensors(SHAPES[4], device, torch.float32)
    x = LAYOUTS[layout](x)
    expected = KINDS[kind](F, x, weight, bias)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, weight, bias, residual)]
        y = KINDS[kind](FF, *fakes[:3])
        fused = KINDS[kind](FF, *fakes[:3], residual=fakes[3].double(), activation="gelu")
    assert (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, expected.device)
    assert fused.dtype == torch.float64
    y = KINDS[kind](FF, *(t.to("meta") for t in (x, weight, bias)))
    assert (y.shape, y.dtype, y.device.type) == (expected.shape, expected.dtype, "meta")


@pytest.mark.parametrize("marked", ["x", "weight"])
@all_kinds
def test_tensor_subclasses_stay_what_they_are(kind, marked, device, path):
    x, weight, bias, _ = tensors(SHAPES[4], device, torch.float32)
    if marked == "x":
        x = x.as_subclass(Marked)
    else:
        weight = weight.as_subclass(Marked)
    expected = KINDS[kind](F, x, weight, bias)
    y = KINDS[kind](FF, x, weight, bias)
    assert type(y) is type(expected) is Marked
    assert_computed_alike(y.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    assert type(KINDS[kind](FF, x, weight, bias, activation="gelu")) is Marked


@some_modules
def test_hooks_and_parametrizations_work(name, device, path):
    layer = _layer(fnn, name, affine=True).to(device)
    seen = []
    layer.register_forward_hook(lambda module, arguments, result: seen.append(result.shape))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append(dx[0].shape))
    x = torch.randn(SHAPES[RANK[name]], device=device, requires_grad=True)
    layer(x).sum().backward()
    assert seen == [x.shape, x.shape]
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Softplus())
    layer(x).square().sum().backward()
    assert layer.parametrizations.weight.original.grad is not None

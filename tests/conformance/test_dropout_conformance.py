"""Dropout under PyTorch's own suites: OpInfo, gradcheck, opcheck, torch.func, autocast, checkpointing.

Everything runs on both backends (fixture ``path``): on the kernels and on the definition in ATen.
"""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db, sample_inputs_dropout
from torch.testing._internal.common_modules import module_db
from torch.utils.checkpoint import checkpoint

import fastreg.functional as FF
import fastreg.nn as fnn
from fastreg import random
from fastreg.ops import backend
from fastreg.ops.dropout import ACTIVATIONS
from fastreg.ops.fused import result_dtype

SEED = 20
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Name -> dimensions of a draw (0: elements), and whether it is an alpha dropout.
FORMS = {
    "dropout": (0, False),
    "dropout1d": (2, False),
    "dropout2d": (2, False),
    "dropout3d": (2, False),
    "alpha_dropout": (0, True),
    "feature_alpha_dropout": (2, True),
    "drop_path": (1, False),
}
TORCH_FORMS = [name for name in FORMS if hasattr(F, name)]  # torch has no drop_path
SHAPES = {
    "dropout": (3, 7),
    "dropout1d": (3, 4, 5),
    "dropout2d": (3, 4, 2, 3),
    "dropout3d": (2, 4, 2, 1, 3),
    "alpha_dropout": (3, 7),
    "feature_alpha_dropout": (3, 4, 2, 3),
    "drop_path": (5, 2, 3),
}
MODULES = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]
FUNCTION_OF = {
    "Dropout": "dropout",
    "Dropout1d": "dropout1d",
    "Dropout2d": "dropout2d",
    "Dropout3d": "dropout3d",
    "AlphaDropout": "alpha_dropout",
    "FeatureAlphaDropout": "feature_alpha_dropout",
    "DropPath": "drop_path",
}


def mostly_slow(*values, fast):
    """Parameters of a sweep of which the default run takes only some, and ``-m slow`` the others."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


all_forms = pytest.mark.parametrize("name", FORMS)
torch_forms = pytest.mark.parametrize("name", TORCH_FORMS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def ours(name):
    return getattr(FF, name)


def theirs(name):
    return getattr(F, name)


def constants(name: str, p: float, exact_p: bool) -> tuple[float, float, float]:
    """a, b, d of one dropout: a x + b is kept, d is what is dropped to.

    exact_p: the scale of torch, 1 / (1 - p); else ours, which follows the probability applied.
    """
    kept = 1 - p if exact_p else 1 - random.threshold(p) / 2**16
    if kept in (0, 1):
        return 1.0, 0.0, 0.0
    if not FORMS[name][1]:
        return 1 / kept, 0.0, 0.0
    alpha = -1.7580993408473766
    a = ((alpha**2 * (1 - kept) + 1) * kept) ** -0.5
    b = -a * alpha * (1 - kept)
    return a, b, a * alpha + b


def kept_of(y, x, name, p, exact_p, *, unbatched=False):
    """Asserts that y is a dropout of x and returns which elements were kept (False where both look the same).

    Tolerance: 0 where a is a power of two and nothing is added (p = 0.5), for then nothing is rounded. Else 2 ulps
    of the product: torch rounds 1 / (1 - p) and the product to the dtype. Alpha dropout of torch makes six
    roundings of numbers up to |a x| + |d| + |b|.
    """
    a, b, d = constants(name, p, exact_p)
    dims, alpha = FORMS[name]
    dims -= unbatched
    x, y, eps = x.detach().double(), y.detach().double(), torch.finfo(y.dtype).eps
    if alpha and a != 1:
        tolerance = 6 * eps * ((a * x).abs() + abs(b) + abs(d))
    else:
        tolerance = 0.0 if a in (1, 2) else 2 * eps * (a * x).abs()
    kept, dropped = (y - (a * x + b)).abs() <= tolerance, (y - d).abs() <= (tolerance if alpha else 0)
    if dims == 0:
        assert (kept | dropped).all()
    else:
        groups = x.shape[:dims].numel()
        all_kept = kept.reshape(groups, -1).all(1)
        all_dropped = dropped.reshape(groups, -1).all(1)
        assert (all_kept | all_dropped).all(), "a channel is neither kept nor dropped as a whole"
        kept, dropped = (
            group.view(*x.shape[:dims], *[1] * (x.dim() - dims)).expand(x.shape)
            for group in (all_kept, all_dropped)
        )
    return kept & ~dropped


def outcome(call):
    """What a call does, comparably: its exception's type and message, or its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:
            return type(error), str(error)
    return [(w.category, str(w.message)) for w in caught]


# --- OpInfo -----------------------------------------------------------------------------------------------

OP_INFOS = [op for op in op_db if op.name.removeprefix("nn.functional.") in FORMS]
OP_CASES = [
    pytest.param(
        op,
        dtype,
        id=f"{op.name.removeprefix('nn.functional.')}-{op.variant_test_name}-{str(dtype)[6:]}",
        marks=[pytest.mark.slow] if dtype == torch.float16 else [],  # bf16 is the other 16-bit type
    )
    for op in OP_INFOS
    for dtype in sorted(op.dtypes, key=str)
]


def test_op_info_knows_what_it_is_asked_for():
    assert {op.name for op in OP_INFOS} >= {
        f"nn.functional.{name}"
        for name in ("dropout", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    }


def check_sample(name, sample, path):
    x, kwargs = sample.input, sample.kwargs
    p = kwargs.get("p", 0.5)
    training = kwargs.get("training", not FORMS[name][1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout2d warns of [N, C, L]
        expected = theirs(name)(x, *sample.args, **kwargs)
        if x.is_floating_point():
            x = x.detach().clone().requires_grad_()
        y = ours(name)(x, *sample.args, **kwargs)
    assert (y.shape, y.dtype, y.stride(), y.device) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
        expected.device,
    )
    assert y.requires_grad == x.requires_grad
    if not training or p == 0:
        assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        return
    unbatched = (name, x.dim()) in (("dropout3d", 4), ("dropout1d", 2))
    kept = kept_of(y, x, name, p, path == "aten", unbatched=unbatched)
    if p == 1:
        assert not kept.any()
    dy = torch.ones_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    a = constants(name, p, path == "aten")[0]
    # One rounding of a, and for torch one more of the product.
    tolerance = 2 * torch.finfo(x.dtype).eps
    expected = torch.full_like(x, a).where(kept, 0)
    undecided = (dx != 0) & ~kept  # values that alpha dropout maps to what it drops to, if it keeps them
    assert FORMS[name][1] or not undecided.any()
    assert undecided.sum() <= 0.1 * undecided.numel()
    assert_close(dx[~undecided], expected[~undecided], rtol=tolerance, atol=0)


@pytest.mark.parametrize(("op", "dtype"), OP_CASES)
def test_op_info_samples_act_as_in_torch(op, dtype, device, path):
    name = op.name.removeprefix("nn.functional.")
    samples = list(op.sample_inputs(device, dtype))
    if op.reference_inputs_func is not None:
        samples += op.reference_inputs(device, dtype)
    assert samples
    for sample in samples:
        check_sample(name, sample, path)


@all_dtypes
def test_op_info_samples_of_dropout2d_in_one_dimension_act_as_in_torch_for_dropout1d(dtype, device, path):
    # torch has no OpInfo of dropout1d: its generator of dropout samples, for that function's ranks.
    for sample in sample_inputs_dropout(None, device, dtype, False, valid_input_dim=(2, 3)):
        check_sample("dropout1d", sample, path)


def test_op_info_error_inputs_raise_as_in_torch(device, path):
    for op in OP_INFOS:
        if op.error_inputs_func is None:
            continue  # so far torch lists none for any of them
        for error in op.error_inputs(device):
            sample = error.sample_input
            with pytest.raises(error.error_type, match=error.error_regex):
                ours(op.name.removeprefix("nn.functional."))(sample.input, *sample.args, **sample.kwargs)


# --- layouts ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "first_dimension_sliced": lambda x: x.repeat_interleave(2, 0)[::2],
    "offset": lambda x: torch.cat((x[:1], x))[1:],
    "expanded": lambda x: x[:1].expand(x.shape),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch_forms
def test_strides_are_those_of_torch(name, layout, device, path):
    x = LAYOUTS[layout](torch.randn(SHAPES[name], device=device))
    for training in (True, False):
        y, expected = ours(name)(x, 0.3, training), theirs(name)(x, 0.3, training)
        assert (y.shape, y.stride()) == (expected.shape, expected.stride())
    if layout != "empty":
        kept_of(ours(name)(x, 0.3, True), x, name, 0.3, path == "aten")


@all_dtypes
@all_forms
def test_any_probability_scales_what_it_keeps_and_drops_the_rest(name, dtype, device, path):
    x = torch.randn(SHAPES[name], device=device, dtype=dtype)
    for p in (0.1, 0.3, 0.9):
        kept_of(ours(name)(x, p, True), x, name, p, path == "aten")


@all_forms
def test_in_place_writes_into_the_input_and_has_the_same_gradient(name, device, path):
    x = torch.randn(SHAPES[name], device=device, requires_grad=True)
    dy = torch.randn(SHAPES[name], device=device)
    y = ours(name)(x, 0.5, True, seed=SEED)
    (expected,) = torch.autograd.grad(y, x, dy)
    before = x.clone()
    result = ours(name)(before, 0.5, True, True, seed=SEED)
    assert result is before
    assert_close(result, y, rtol=0, atol=0)
    (dx,) = torch.autograd.grad(result, x, dy)
    assert_close(dx, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "shape"), [("dropout1d", (4, 5)), ("dropout3d", (4, 2, 1, 3))])
def test_in_place_on_an_unbatched_input(name, shape, device, path):
    x = torch.randn(shape, device=device, requires_grad=True)
    before = x.clone()
    result = ours(name)(before, 0.5, True, True)
    assert result is before
    kept = kept_of(result, x, name, 0.5, path == "aten", unbatched=True)
    (dx,) = torch.autograd.grad(result.sum(), x)
    assert_close(dx, torch.where(kept, 2.0, 0.0), rtol=0, atol=0)


# --- errors -----------------------------------------------------------------------------------------------

ERROR_CASES = {
    "p_below_0": lambda f, x: f(x, -0.1, True),
    "p_above_1": lambda f, x: f(x, 1.1, True),
    "p_above_1_in_evaluation": lambda f, x: f(x, 1.1, False),
    "scalar": lambda f, x: f(x.flatten()[0], 0.5, True),
    "rank_1": lambda f, x: f(x.flatten(), 0.5, True),
    "rank_1_in_evaluation": lambda f, x: f(x.flatten(), 0.5, False),
    "rank_2": lambda f, x: f(x.flatten(1), 0.5, True),
    "rank_3": lambda f, x: f(x.reshape(*x.shape[:2], -1), 0.5, True),
    "rank_6": lambda f, x: f(x.reshape(*x.shape, *[1] * (6 - x.dim())), 0.5, True),
    "integers": lambda f, x: f(x.long(), 0.5, True),
    "integers_in_evaluation": lambda f, x: f(x.long(), 0.5, False),
    "integers_p_1": lambda f, x: f(x.long(), 1.0, True),
    "complex": lambda f, x: f(x.to(torch.complex64), 0.5, True),
    "in_place_on_a_leaf": lambda f, x: f(x.clone().requires_grad_(), 0.5, True, True),
    "in_place_on_a_leaf_p_1": lambda f, x: f(x.clone().requires_grad_(), 1.0, True, True),
    "in_place_on_expanded": lambda f, x: f(x[:1].expand(x.shape), 0.5, True, True),
}


@pytest.mark.parametrize("case", ERROR_CASES)
@torch_forms
def test_errors_and_warnings_are_those_of_torch(name, case, device, path):
    x = torch.randn(SHAPES[name], device=device)
    call = ERROR_CASES[case]
    assert outcome(lambda: call(ours(name), x)) == outcome(lambda: call(theirs(name), x))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("p", [-0.1, 1.1, 2])
def test_constructors_refuse_what_torch_refuses(module, p):
    expected = outcome(lambda: getattr(torch.nn, module)(p))
    assert expected[0] is ValueError
    assert outcome(lambda: getattr(fnn, module)(p)) == expected


# --- modules ----------------------------------------------------------------------------------------------

# (constructor arguments, in ModuleInfo's manner): torch's module_db lists no dropout layers.
CONSTRUCTORS = [
    ((), {}),
    ((0.3,), {}),
    ((), {"p": 0.0}),
    ((0.5, True), {}),
    ((), {"p": 1.0, "inplace": True}),
]


def module_inputs(module):
    for info in module_db:
        if info.module_cls is getattr(torch.nn, module):
            for entry in info.module_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
            ):
                yield entry.constructor_input.args, entry.constructor_input.kwargs
    yield from CONSTRUCTORS


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_torchs_in_type_text_state_and_result(module, device, path):
    name = FUNCTION_OF[module]
    x = torch.randn(SHAPES[name], device=device)
    for args, kwargs in module_inputs(module):
        layer, reference = getattr(fnn, module)(*args, **kwargs), getattr(torch.nn, module)(*args, **kwargs)
        assert isinstance(layer, type(reference))
        assert (layer.extra_repr(), repr(layer)) == (reference.extra_repr(), repr(reference))
        assert list(layer.state_dict()) == list(reference.state_dict()) == []
        assert layer.load_state_dict(reference.state_dict())
        y, expected = layer(x.clone()), reference(x.clone())
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
        kept_of(y, x, name, layer.p, path == "aten")
        assert not layer.eval().training
        assert_close(layer(x), reference.eval()(x), rtol=0, atol=0)
        assert layer.train().training
        for attribute in ("p", "inplace", "training"):
            assert getattr(layer, attribute) == getattr(reference.train(), attribute)


@pytest.mark.parametrize("module", [*MODULES, "DropPath"])
def test_modules_survive_copy_and_pickle_with_their_options(module, device, path):
    options = {"activation": "gelu"} if "Alpha" in module else {"activation": "gelu", "inverted": False}
    layer = getattr(fnn, module)(0.25, **options)
    x = torch.randn(SHAPES[FUNCTION_OF[module]], device=device)
    torch.manual_seed(3)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert repr(twin) == repr(layer)
        torch.manual_seed(3)
        assert_close(twin(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("module", [*MODULES, "DropPath"])
def test_modules_are_transparent_in_a_sequential(module, device, path):
    shape = SHAPES[FUNCTION_OF[module]]
    layer = getattr(fnn, module)(0.5)
    model = torch.nn.Sequential(torch.nn.Linear(shape[-1], 4), layer, torch.nn.Linear(4, 2)).to(device)
    x = torch.randn(shape, device=device)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    model.eval()
    assert not layer.training
    assert_close(model(x), model[2](model[0](x)), rtol=0, atol=0)


def test_modules_of_a_channel_form_warn_and_fail_as_torch_does(device, path):
    for module in ("Dropout1d", "Dropout2d", "Dropout3d"):
        for shape in [(3,), (3, 4), (3, 4, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5), (1, 1, 2, 1, 2, 2)]:
            x = torch.randn(shape, device=device)
            for training in (True, False):
                layer = getattr(fnn, module)().train(training)
                reference = getattr(torch.nn, module)().train(training)
                assert outcome(partial(layer, x)) == outcome(partial(reference, x)), (module, shape, training)


# --- derivatives ------------------------------------------------------------------------------------------


def away_from_kinks(shape, device):
    """fp64 values at least 0.2 away from 0 and from +-3, where activations are not (twice) differentiable."""
    magnitude = torch.rand(shape, dtype=torch.float64, device=device) * 2.3 + 0.3
    magnitude = torch.where(torch.rand(shape, device=device) < 0.2, magnitude + 3, magnitude)
    return torch.where(torch.rand(shape, device=device) < 0.5, magnitude, -magnitude)


def small(shape, device):
    return torch.rand(shape, dtype=torch.float64, device=device) * 0.1 - 0.05


def check_derivatives(function, inputs, **options):
    """First and second derivatives, in fast mode (random projections of the Jacobians), at torch's tolerances."""
    inputs = tuple(t.requires_grad_() for t in inputs)
    assert gradcheck(function, inputs, fast_mode=True, check_undefined_grad=False, **options)
    assert gradgradcheck(function, inputs, fast_mode=True, check_undefined_grad=False, **options)


BIAS_SHAPES = {"last": lambda shape: shape[-1:], "channel": lambda shape: (shape[1], *[1] * (len(shape) - 2))}


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("bias", mostly_slow(*BIAS_SHAPES, fast=["last"]))
def test_derivatives_of_every_activation_with_bias_and_residual(activation, bias, device, path):
    shape = (2, 4, 3)
    inputs = (
        away_from_kinks(shape, device),
        small(BIAS_SHAPES[bias](shape), device),
        small(shape, device),
    )
    check_derivatives(
        lambda x, b, r: FF.dropout(x, 0.4, bias=b, residual=r, activation=activation, seed=SEED), inputs
    )


@pytest.mark.parametrize("layout", mostly_slow("contiguous", "channels_last", "gaps", fast=["channels_last"]))
@all_forms
def test_derivatives_of_every_form_in_every_layout(name, layout, device, path):
    x = LAYOUTS[layout](away_from_kinks(SHAPES[name], device))
    check_derivatives(lambda x: ours(name)(x, 0.4, True, seed=SEED), (x,))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bias", mostly_slow(*BIAS_SHAPES, fast=["channel"]))
@pytest.mark.parametrize(
    "name", mostly_slow("dropout", "dropout2d", "feature_alpha_dropout", "drop_path", fast=["dropout2d"])
)
def test_derivatives_of_fused_forms_on_images(name, bias, layout, device, path):
    shape = (2, 4, 2, 2)
    layout = LAYOUTS[layout]
    inputs = (
        layout(away_from_kinks(shape, device)),
        small(BIAS_SHAPES[bias](shape), device),
        layout(small(shape, device)),
    )
    check_derivatives(
        lambda x, b, r: ours(name)(x, 0.4, True, bias=b, residual=r, activation="silu", seed=SEED), inputs
    )


@pytest.mark.slow
def test_jacobians_hold_element_by_element(device, path):
    """Slow mode: the whole Jacobian and not a projection of it."""
    inputs = (away_from_kinks((2, 3), device), small((3,), device), small((2, 3), device))
    inputs = tuple(t.requires_grad_() for t in inputs)

    def function(x, b, r):
        return FF.dropout(x, 0.4, bias=b, residual=r, activation="gelu", seed=SEED)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("needed", ["x", "bias", "residual"])
@pytest.mark.parametrize("activation", [None, "mish"])
def test_derivatives_of_any_one_input(needed, activation, device, path):
    shape = (2, 4, 3)
    values = {
        "x": away_from_kinks(shape, device),
        "bias": small((3,), device),
        "residual": small(shape, device),
    }

    def function(t):
        v = {**values, needed: t}
        return FF.dropout(
            v["x"], 0.4, bias=v["bias"], residual=v["residual"], activation=activation, seed=SEED
        )

    # The derivative of a linear function does not depend on its input: torch then asks for nothing to check.
    linear = activation is None or needed == "residual"
    inputs = (values[needed].requires_grad_(),)
    assert gradcheck(function, inputs, fast_mode=True)
    assert linear or gradgradcheck(function, inputs, fast_mode=True)


UPSTREAM = {
    "transposed": LAYOUTS["transposed"],
    "channels_last": LAYOUTS["channels_last"],
    "gaps": LAYOUTS["gaps"],
    "expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps"])
@pytest.mark.parametrize("name", ["dropout", "dropout2d", "drop_path"])
def test_upstream_gradients_of_any_layout(name, layout, upstream, device, path):
    """The mask follows the memory order of the input, not that of the gradient."""
    shape = (2, 4, 2, 3)
    x = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64, device=device)).requires_grad_()
    bias = torch.randn(4, 1, 1, dtype=torch.float64, device=device, requires_grad=True)
    dy = torch.randn(shape, dtype=torch.float64, device=device)
    dy = UPSTREAM[upstream](dy)
    y = ours(name)(x, 0.4, bias=bias, activation="gelu", seed=SEED)
    result = torch.autograd.grad(y, (x, bias), dy, retain_graph=True)
    expected = torch.autograd.grad(y, (x, bias), dy, create_graph=True)  # the definition in ATen
    # fp64 throughout: some roundings of erf and exp.
    assert_close(result, expected, rtol=1e-12, atol=1e-12)
    # kept elements have a gradient, dropped ones exactly none
    dropped = y == 0
    assert dropped.any()
    assert (result[0][dropped] == 0).all()
    assert (result[0][~dropped] != 0).all()


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_batched_gradients(activation, device, path):
    """``is_grads_batched`` (vectorized Jacobians) runs the backward pass under vmap."""
    x = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    y = FF.dropout(x, 0.4, bias=bias, activation=activation, seed=SEED)
    dy = torch.randn(3, 2, 5, dtype=torch.float64, device=device)
    expected = [torch.autograd.grad(y, (x, bias), row, retain_graph=True) for row in dy]
    batched = torch.autograd.grad(y, (x, bias), dy, retain_graph=True, is_grads_batched=True)
    for result, rows in zip(batched, zip(*expected, strict=True), strict=True):
        # fp64: the same function in another order of summation.
        assert_close(result, torch.stack(rows), rtol=1e-12, atol=1e-12)


# --- registered operators ---------------------------------------------------------------------------------


def _op_arguments(device, **changed):
    """Of the forward operator, by name, and what it writes."""
    x = changed.pop("x", torch.randn(2, 4, 3, 2, device=device))
    residual = changed.pop("residual", None)
    arguments = {
        "x": x,
        "bias": None,
        "residual": residual,
        "y": torch.empty_like(x, dtype=result_dtype(x.dtype, residual)),
        "seed": torch.tensor([SEED], device=device),
        "threshold": random.threshold(0.4),
        "scale": 1 / 0.6,
        "kept_shift": None,
        "dropped_value": None,
        "mask_dims": 0,
        "bias_dim": None,
        "activation": None,
    }
    assert changed.keys() <= arguments.keys()
    return {**arguments, **changed}


def _images(device, **options):
    return torch.randn(2, 4, 3, 2, device=device, **options)


def _bias(device, size, **options):
    return torch.randn(size, device=device, **options)


OP_SAMPLES = {
    "plain": lambda d: {},
    "nothing_dropped": lambda d: {"threshold": 0, "scale": 0.75},
    "channels_last": lambda d: {
        "x": _images(d).to(memory_format=torch.channels_last),
        "residual": _images(d),
    },
    "last_dimension_bias": lambda d: {
        "x": torch.randn(5, 6, device=d),
        "bias": _bias(d, 6),
        "bias_dim": 1,
        "activation": "gelu",
    },
    "channel_bias": lambda d: {
        "x": _images(d),
        "bias": _bias(d, (4, 1, 1)),
        "bias_dim": 1,
        "activation": "silu",
        "residual": _images(d),
    },
    "channel_mask": lambda d: {"x": _images(d), "mask_dims": 2},
    "channel_mask_channels_last": lambda d: {
        "x": _images(d).to(memory_format=torch.channels_last),
        "mask_dims": 2,
    },
    "sample_mask": lambda d: {
        "x": _images(d),
        "mask_dims": 1,
        "residual": _images(d),
    },
    "alpha": lambda d: {"x": _images(d), "kept_shift": 0.3, "dropped_value": -1.0},
    "half_with_fp32_residual": lambda d: {
        "x": _images(d, dtype=torch.bfloat16),
        "residual": _images(d),
    },
    "empty": lambda d: {"x": torch.randn(0, 4, device=d)},
    "not_dense": lambda d: {"x": torch.randn(4, 6, device=d)[:, ::2]},
}


@pytest.fixture
def _kernels_only():
    if not backend.HAS_TRITON:
        pytest.skip("needs Triton")


@pytest.mark.usefixtures("_kernels_only")
@pytest.mark.parametrize("sample", OP_SAMPLES)
def test_opcheck_of_the_forward_operator(sample, device):
    torch.library.opcheck(
        torch.ops.fastreg.dropout.default, (), _op_arguments(device, **OP_SAMPLES[sample](device))
    )


@pytest.mark.usefixtures("_kernels_only")
@pytest.mark.parametrize("mask_dims", mostly_slow(0, 1, 2, fast=[0]))
@pytest.mark.parametrize("bias", ["none", "columns", "rows"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_opcheck_of_the_backward_operator(bias, mask_dims, activation, device):
    dy = _images(device)
    channels_last = bias == "columns"
    x = _images(device).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    arguments = {
        "dy": dy,
        "x": None if activation is None else x,
        "bias": _bias(device, 4) if activation and bias != "none" else None,
        "dx": torch.empty_like(x),
        "dbias": None if bias == "none" else torch.empty(4, device=device),
        "seed": torch.tensor([SEED], device=device),
        "threshold": random.threshold(0.4),
        "scale": 1 / 0.6,
        "kept_shift": None,
        "dropped_value": None,
        "mask_dims": mask_dims,
        "bias_dim": None if bias == "none" else 1,
        "activation": activation,
    }
    torch.library.opcheck(torch.ops.fastreg.dropout_backward.default, (), arguments)


# --- torch.func and forward-mode AD -----------------------------------------------------------------------


def _vmapped(function, x, randomness, in_dims=0):
    try:
        y = torch.vmap(function, randomness=randomness, in_dims=in_dims)(x)
    except RuntimeError as error:
        return str(error)
    return "same" if (y == y[0]).all() else "different"


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
@torch_forms
def test_vmap_obeys_its_randomness_as_torch_does(name, randomness, device, path):
    shape = (32, *SHAPES[name][1:]) if FORMS[name][0] else (64,)
    x = torch.ones(4, *shape, device=device)
    result = _vmapped(lambda x: ours(name)(x, 0.5, True), x, randomness)
    assert result == _vmapped(lambda x: theirs(name)(x, 0.5, True), x, randomness)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_of_drop_path_obeys_its_randomness(randomness, device, path):
    x = torch.ones(4, 64, 2, device=device)
    assert _vmapped(lambda x: FF.drop_path(x, 0.5), x, randomness) == randomness


def test_vmap_of_drop_path_refuses_randomness_error_as_torch_does(device, path):
    x = torch.ones(4, 64, 2, device=device)
    with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
        torch.vmap(FF.drop_path)(x)


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
@all_forms
def test_vmap_with_a_seed_draws_nothing(name, randomness, device, path):
    x = torch.randn(3, *SHAPES[name], device=device)
    result = torch.vmap(lambda x: ours(name)(x, 0.5, True, seed=SEED), randomness=randomness)(x)
    expected = torch.stack([ours(name)(example, 0.5, True, seed=SEED) for example in x])
    # p = 0.5 scales by 2 exactly; alpha dropout rounds a x + b once or (ATen, no fused multiply-add) twice.
    tolerance = 4e-7 if FORMS[name][1] else 0
    assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_of_a_fused_form(randomness, device, path):
    x, residual = torch.randn(3, 4, 8, device=device), torch.randn(3, 4, 8, device=device)
    bias = torch.randn(8, device=device)

    def function(x, r):
        return FF.dropout(x, 0.5, bias=bias, activation="relu", residual=r)

    y = torch.vmap(function, randomness=randomness)(x, residual)
    kept = (y - residual).abs() > 1e-5
    assert_close(torch.where(kept, y, residual), torch.where(kept, 2 * F.relu(x + bias) + residual, residual))


@all_forms
def test_func_transforms_agree_with_autograd(name, device, path):
    x = torch.randn(SHAPES[name], dtype=torch.float64, device=device)
    tangent, cotangent = torch.randn_like(x), torch.randn_like(x)

    def function(x):
        return ours(name)(x, 0.4, True, activation="tanh", seed=SEED)

    leaf = x.clone().requires_grad_()
    y = function(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, cotangent)
    # fp64: kernels and ATen round tanh and its derivative differently, by some ulps.
    close = partial(assert_close, rtol=1e-12, atol=1e-12)
    close(torch.func.grad(lambda x: (function(x) * cotangent).sum())(x), gradient)
    value, pullback = torch.func.vjp(function, x)
    close(value, y.detach())
    close(pullback(cotangent)[0], gradient)
    value, derivative = torch.func.jvp(function, (x,), (tangent,))
    close(value, y.detach())
    # <cotangent, J tangent> = <J^T cotangent, tangent>
    close((derivative * cotangent).sum(), (gradient * tangent).sum())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))
        close(dual.tangent, derivative)


@all_forms
def test_forward_mode_without_a_seed(name, device, path):
    x = torch.ones(SHAPES[name], dtype=torch.float64, device=device)
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(ours(name)(forward_ad.make_dual(x, x.clone()), 0.5, True))
    kept = kept_of(y, x, name, 0.5, True)
    scale = constants(name, 0.5, True)[0]
    # fp64: torch computes the scale in another order.
    assert_close(tangent, torch.full_like(x, scale).where(kept, 0), rtol=1e-12, atol=0)


def test_per_sample_gradients(device, path):
    """vmap over grad, as differential privacy does it."""
    weight = torch.randn(4, 6, dtype=torch.float64, device=device)
    x = torch.randn(3, 6, dtype=torch.float64, device=device)

    def loss(weight, x):
        return FF.dropout(weight @ x, 0.5, activation="tanh", seed=SEED).sum()

    result = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    expected = torch.stack([torch.func.grad(loss)(weight, example) for example in x])
    assert_close(result, expected, rtol=1e-12, atol=1e-12)  # fp64, another order of the same products


# --- autocast, checkpointing, fake and meta tensors, export, fx -------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch_forms
def test_autocast_gives_the_dtypes_of_torch(name, dtype, device, path):
    x = torch.randn(SHAPES[name], device=device, dtype=dtype)
    linear = torch.nn.Linear(SHAPES[name][-1], SHAPES[name][-1], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert ours(name)(x, 0.5, True).dtype == theirs(name)(x, 0.5, True).dtype == dtype
        y = ours(name)(linear(x.float()), 0.5, True)
        assert y.dtype == theirs(name)(linear(x.float()), 0.5, True).dtype == torch.bfloat16
        # fp32 parameters and residuals beside a bf16 activation, as in torch's own sums.
        bias, residual = linear.bias, torch.randn(SHAPES[name], device=device)
        fused = ours(name)(linear(x.float()), 0.5, True, bias=bias, activation="gelu", residual=residual)
    assert fused.dtype == torch.float32
    (y.float().sum() + fused.sum()).backward()
    assert linear.weight.grad.dtype == linear.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_checkpointing_draws_the_same_mask_again(use_reentrant, fused, device, path):
    layer = torch.nn.Linear(6, 8, bias=not fused, dtype=torch.float64, device=device)
    bias = torch.nn.Parameter(torch.randn(8, dtype=torch.float64, device=device))
    drop = fnn.Dropout(0.5, activation="gelu") if fused else fnn.Dropout(0.5)
    x = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)

    def block(x):
        return drop(layer(x), bias=bias if fused else None).square()

    def run(function):
        torch.manual_seed(11)
        y = function(x)
        gradients = torch.autograd.grad if not use_reentrant else _backward
        return y, gradients(y.sum(), (x, layer.weight))

    def _backward(y, inputs):  # a reentrant checkpoint works with .backward() alone
        for t in inputs:
            t.grad = None
        y.backward()
        return [t.grad for t in inputs]

    y, expected = run(block)
    again, gradients = run(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert_close(again, y, rtol=0, atol=0)
    assert_close(list(gradients), list(expected), rtol=0, atol=0)
    assert torch.manual_seed(11).get_state().equal(torch.default_generator.get_state())


@pytest.mark.parametrize("seeded", [False, True])
@all_forms
def test_fake_and_meta_tensors_give_shapes_without_data(name, seeded, device, path):
    kwargs = {"seed": SEED} if seeded else {}
    fused = {"activation": "gelu"}
    x = LAYOUTS["channels_last"](torch.randn(SHAPES[name], device=device))
    expected = ours(name)(x, 0.5, True, **kwargs)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        y = ours(name)(fake, 0.5, True, **kwargs)
        residual = ours(name)(fake, 0.5, True, residual=fake.double(), **fused, **kwargs)
    assert (y.shape, y.dtype, y.stride(), y.device) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
        expected.device,
    )
    assert residual.dtype == torch.float64
    y = ours(name)(x.to("meta"), 0.5, True, **kwargs)
    assert (y.shape, y.dtype, y.stride(), y.device.type) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
        "meta",
    )


def test_export_of_a_model_for_evaluation(device, path):
    model = (
        torch.nn.Sequential(torch.nn.Linear(4, 8), fnn.Dropout(0.5), torch.nn.Linear(8, 2)).to(device).eval()
    )
    x = torch.randn(3, 4, device=device)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    batch = torch.randn(5, 4, device=device)
    assert_close(exported.module()(batch), model(batch), rtol=0, atol=0)


def test_export_of_a_model_in_training(device, path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 32), fnn.Dropout(0.5)).to(device)
    x = torch.randn(3, 4, device=device)
    exported = torch.export.export(model, (x,)).module()
    first, second = exported(x), exported(x)
    assert not first.equal(second)
    kept_of(first, model[0](x), "dropout", 0.5, True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("module", [*MODULES, "DropPath"])
def test_fx_traces_modules(module, training, device, path):
    """Feature extraction and quantization trace models with torch.fx; torch's layers are leaves there."""
    name = FUNCTION_OF[module]
    x = torch.randn(SHAPES[name], device=device)
    layer = getattr(fnn, module)(0.5).train(training)
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(layer))
    if training:
        kept_of(traced(x), x, name, 0.5, True)
    else:
        assert_close(traced(x), x, rtol=0, atol=0)


class _Marked(torch.Tensor):
    """A tensor subclass that passes through every function."""


@torch_forms
def test_tensor_subclasses_stay_what_they_are(name, device, path):
    x = torch.randn(SHAPES[name], device=device).as_subclass(_Marked)
    expected = theirs(name)(x, 0.5, True)
    y = ours(name)(x, 0.5, True)
    assert type(y) is type(expected) is _Marked
    fused = ours(name)(x, 0.5, True, activation="gelu", seed=SEED)
    assert type(fused) is _Marked


# --- seeds and generators ---------------------------------------------------------------------------------

LONG = {name: (64, *shape[1:]) for name, shape in SHAPES.items()}  # no two masks are equal by chance (2^-64)


@all_forms
def test_manual_seed_reproduces_and_two_calls_differ(name, device, path):
    x = torch.ones(LONG[name], device=device)
    torch.manual_seed(5)
    first, second = ours(name)(x, 0.5, True), ours(name)(x, 0.5, True)
    torch.manual_seed(5)
    again = ours(name)(x, 0.5, True)
    assert first.equal(again)
    assert not first.equal(second)


@all_forms
def test_a_generator_is_advanced_and_no_other(name, device, path):
    x = torch.ones(LONG[name], device=device)
    generator = torch.Generator(device).manual_seed(7)
    default = torch.get_rng_state()
    first = ours(name)(x, 0.5, True, generator=generator)
    second = ours(name)(x, 0.5, True, generator=generator)
    assert torch.get_rng_state().equal(default)
    assert not first.equal(second)
    generator.manual_seed(7)
    assert ours(name)(x, 0.5, True, generator=generator).equal(first)


@pytest.mark.parametrize("p", [0.0, 1.0])
@all_forms
def test_nothing_is_drawn_where_nothing_is_random(name, p, device, path):
    x = torch.ones(SHAPES[name], device=device)
    generator = torch.Generator(device).manual_seed(7)
    state, default = generator.get_state(), torch.get_rng_state()
    ours(name)(x, p, True, generator=generator)
    ours(name)(x, p, True, activation="gelu")
    ours(name)(x, 0.5, False, generator=generator)
    assert generator.get_state().equal(state)
    assert torch.get_rng_state().equal(default)


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 3, 2**64 - 1])
@all_forms
def test_a_seed_names_one_mask_on_every_path_and_dtype(name, seed, device, monkeypatch):
    shape = SHAPES[name]
    masks = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(backend, "runs_kernels", lambda x: False)
        for dtype in DTYPES:
            x = torch.ones(shape, device=device, dtype=dtype)
            masks.append(ours(name)(x, 0.5, True, seed=seed) > 0)
        as_tensor = torch.tensor([seed if seed < 2**63 else seed - 2**64], device=device)
        masks.append(ours(name)(x, 0.5, True, seed=as_tensor) > 0)
        masks.append(ours(name)(x, 0.5, True, seed=as_tensor[0]) > 0)
    assert all(mask.equal(masks[0]) for mask in masks)
    dims = FORMS[name][0] or len(shape)
    drawn = random.keep_mask(shape[:dims], 0.5, random.stream(device, seed), device)
    assert masks[0].equal(drawn.view(*drawn.shape, *[1] * (len(shape) - dims)).expand(shape))


@pytest.mark.parametrize("name", ["dropout", "alpha_dropout"])
def test_a_mask_of_elements_follows_memory_order(name, device, path):
    shape = (2, 4, 3, 2)
    for layout in ("contiguous", "channels_last", "transposed"):
        x = LAYOUTS[layout](torch.ones(shape, device=device))
        mask = ours(name)(x, 0.5, True, seed=SEED) > 0
        in_memory = mask.as_strided((x.numel(),), (1,))
        assert in_memory.equal(random.keep_mask((x.numel(),), 0.5, random.Stream(SEED), device)), layout


@pytest.mark.parametrize("name", ["dropout2d", "feature_alpha_dropout", "drop_path"])
def test_a_mask_of_channels_or_samples_is_the_same_in_every_layout(name, device, path):
    shape = (3, 4, 2, 3)
    masks = [
        ours(name)(LAYOUTS[layout](torch.ones(shape, device=device)), 0.5, True, seed=SEED) > 0
        for layout in ("contiguous", "channels_last", "transposed", "gaps")
    ]
    assert all(mask.equal(masks[0]) for mask in masks)


def test_a_seed_beside_a_generator_is_refused(device, path):
    with pytest.raises(ValueError, match="exclude each other"):
        FF.dropout(torch.ones(4, device=device), seed=1, generator=torch.Generator(device))

"""Derivatives of dropout, its registered operators, torch.func and forward mode, on both backends."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dropout_cases import (
    FORMS,
    LAYOUTS,
    SEED,
    SHAPES,
    all_forms,
    constants,
    kept_of,
    ours,
    theirs,
    torch_forms,
)
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

import fastreg.functional as FF
from fastreg import random
from fastreg.ops import backend
from fastreg.ops.dropout import ACTIVATIONS
from fastreg.ops.fused import result_dtype


def mostly_slow(*values, fast):
    """Parameters of a sweep of which the default run takes only some, and ``-m slow`` the others."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


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
    """The arguments of the forward operator, by name, and what it writes."""
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

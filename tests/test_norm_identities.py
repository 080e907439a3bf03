"""What batch, group and instance normalization have to satisfy whatever they compute it with.

The identities of Ioffe and Szegedy 2015 (arXiv 1502.03167, section 3.3) and their like: scale and shift invariance,
moments, orthogonality of the gradient, which values may depend on which, and one normalization as a case of another.
Nothing here is compared with another implementation, except where the data are extreme: there with fp64.
"""

import math

import pytest
import torch
import torch.nn.functional as TF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine_option import rounding
from shared import assert_near, assert_same

import fastreg.functional as F
import fastreg.nn as fnn

KINDS = ("batch_norm", "group_norm", "instance_norm")
all_kinds = pytest.mark.parametrize("kind", KINDS)
CHANNELS = 6
GROUPS = 3
SMALL = (5, CHANNELS, 7, 3)
LARGE = (2, CHANNELS, 97, 101)  # a channel has more than one program takes: statistics are merged
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def normalize(kind, x, weight=None, bias=None, eps=1e-5, groups=GROUPS, **fused):
    if kind == "batch_norm":
        return F.batch_norm(x, None, None, weight, bias, True, eps=eps, **fused)
    if kind == "group_norm":
        return F.group_norm(x, groups, weight, bias, eps, **fused)
    return F.instance_norm(x, weight=weight, bias=bias, eps=eps, **fused)


def units(kind, t):
    """[units, elements]: what shares a mean and a variance."""
    if kind == "batch_norm":
        return t.transpose(0, 1).flatten(1)
    return t.reshape(t.shape[0] * (GROUPS if kind == "group_norm" else t.shape[1]), -1)


def per_channel(v, x):
    return v.view(-1, *[1] * (x.dim() - 2))


def moments(kind, x):
    """Mean and biased variance of each unit, in fp64."""
    values = units(kind, x.detach().double())
    return values.mean(1), values.var(1, correction=0)


def standardized(kind, x, eps=1e-5):
    """(x - mean) / sqrt(var + eps) in fp64, as units."""
    mean, var = moments(kind, x)
    return (units(kind, x.detach().double()) - mean[:, None]) * (var[:, None] + eps).rsqrt()


def data(shape, device, dtype=torch.float64, layout="contiguous"):
    """x with units of different means and spreads, weight, bias and an upstream gradient."""
    x = torch.randn(shape, dtype=torch.float64)
    spread = torch.rand(shape[:2], dtype=torch.float64) + 0.5
    x = x * spread[(...,) + (None,) * (len(shape) - 2)] + per_channel(
        torch.linspace(-2, 3, shape[1], dtype=torch.float64), x
    )
    weight = torch.rand(shape[1], dtype=torch.float64) + 0.5
    weight[::3] *= -1
    bias, dy = torch.randn(shape[1], dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    x, dy = (LAYOUTS[layout](t) for t in (x, dy))
    return tuple(t.to(device, dtype) for t in (x, weight, bias, dy))


# For values near 1. fp64: thousands of terms and a dozen roundings. fp32: the same, and the fast exponentials of the
# kernels, which are good to 1e-6.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
all_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def gradients(y, inputs, dy):
    return torch.autograd.grad(y, inputs, dy)


# --- section 3.3: the scale of the weights does not matter ------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("a", [0.01, 0.5, 3.0, 100.0])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_batch_normalization_of_scaled_weights(activation, a, dtype, device, path):
    """BN(aWu) = BN(Wu), with the same gradient of u, and that of aW is 1/a of that of W.

    Exactly so where eps grows with the variance, by a^2.
    """
    u = torch.randn(33, 11, device=device, dtype=dtype)
    w = torch.randn(7, 11, device=device, dtype=dtype)
    gamma, beta = torch.rand(7, device=device, dtype=dtype) + 0.5, torch.randn(7, device=device, dtype=dtype)
    dy = torch.randn(33, 7, device=device, dtype=dtype)

    def run(scale):
        leaves = [t.detach().clone().requires_grad_() for t in (u, w * scale, gamma, beta)]
        z = TF.linear(leaves[0], leaves[1])
        y = normalize("batch_norm", z, *leaves[2:], eps=1e-3 * scale**2, activation=activation)
        return y.detach(), *gradients(y, leaves, dy)

    y, du, dw, dgamma, dbeta = run(1.0)
    scaled_y, scaled_du, scaled_dw, scaled_dgamma, scaled_dbeta = run(a)
    assert_near(scaled_y, y, TOLERANCE[dtype])
    # Sums of eleven and of 33 terms of some units each.
    assert_near(scaled_du, du, 10 * TOLERANCE[dtype])
    assert_near(scaled_dw * a, dw, 30 * TOLERANCE[dtype])
    assert_near(scaled_dgamma, dgamma, 30 * TOLERANCE[dtype])
    assert_near(scaled_dbeta, dbeta, 30 * TOLERANCE[dtype])


@all_dtypes
@all_layouts
@pytest.mark.parametrize("a", [0.01, 3.0, -1.0])
@all_kinds
def test_scaling_the_input_leaves_the_output_and_divides_the_gradient(kind, a, layout, dtype, device, path):
    x, weight, bias, dy = data(SMALL, device, dtype, layout)

    def run(scale, sign=1.0):
        leaves = [t.detach().clone().requires_grad_() for t in (x * scale, weight * sign, bias)]
        y = normalize(kind, *leaves, eps=1e-3 * scale**2)
        return y.detach(), *gradients(y, leaves, dy)

    y, dx, dweight, dbias = run(1.0)
    # A negative scale turns the standardized values around: as the weight would.
    sign = math.copysign(1.0, a)
    scaled_y, scaled_dx, scaled_dweight, scaled_dbias = run(a, sign)
    assert_near(scaled_y, y, 4 * TOLERANCE[dtype])
    assert_near(scaled_dx * a, dx, 10 * TOLERANCE[dtype])
    assert_near(scaled_dweight * sign, dweight, 100 * TOLERANCE[dtype])  # sums of 105 terms
    assert_near(scaled_dbias, dbias, 100 * TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@all_layouts
@all_kinds
def test_shifting_the_input_changes_nothing(kind, layout, shape, device, path):
    """Multiples of 2^-8, whose sums with a shift below 2^14 are exact in fp32: all data the same but the mean."""
    x = torch.randint(-(2**10), 2**10, shape, device=device).float() / 2**8
    x = LAYOUTS[layout](x)
    weight, bias, dy = data(shape, device, torch.float32, layout)[1:]
    shift = torch.tensor([1000.0, -3.0, 10000.0, 0.5, -8191.0, 256.0], device=device)
    if path == "aten":
        # Torch on the CPU loses more than the rounding of the mean: group_norm, channels last, has errors of 1,000.
        shift = shift.clamp(-8, 8)
    if kind == "group_norm":
        shift = shift[::2].repeat_interleave(CHANNELS // GROUPS)  # channels of a group together

    def run(x):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        y = normalize(kind, *leaves)
        return y.detach(), gradients(y, leaves, dy)[0]

    (y, dx), (shifted_y, shifted_dx) = run(x), run(x + per_channel(shift, x))
    # The mean is rounded to fp32: half a unit of 10,000 is 5e-4, and the values spread by 2.3.
    error = 10000 * torch.finfo(torch.float32).eps / 2.3 * 2
    torch.testing.assert_close(shifted_y, y, rtol=1e-5, atol=2 * error)
    torch.testing.assert_close(shifted_dx, dx, rtol=1e-5, atol=2 * error)
    still = shift.abs() < 1  # where the shift is small, so is the error
    if still.any():
        torch.testing.assert_close(shifted_y[:, still], y[:, still], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shifted_dx[:, still], dx[:, still], rtol=1e-5, atol=1e-5)


# --- moments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SMALL, LARGE, (13, CHANNELS), (2, CHANNELS, 2)], ids=str)
@all_dtypes
@all_layouts
@all_kinds
def test_every_unit_has_mean_beta_and_variance_gamma_squared(kind, layout, dtype, shape, device, path):
    """The variance is gamma^2 var / (var + eps): that is what eps does."""
    if kind == "instance_norm" and len(shape) == 2:
        pytest.skip("one element an instance")
    x, weight, bias, _ = data(shape, device, dtype, layout)
    if kind == "group_norm":
        # One weight and one bias for the channels of a group, so that they are the unit's.
        weight, bias = (t[::2].repeat_interleave(CHANNELS // GROUPS) for t in (weight, bias))
    y = units(kind, normalize(kind, x, weight, bias, eps=1e-3).double())
    _, var = moments(kind, x)
    expand = {"batch_norm": lambda t: t, "instance_norm": lambda t: t.repeat(shape[0])}
    per_unit = expand.get(kind, lambda t: t[::2].repeat(shape[0]))
    assert_near(y.mean(1), per_unit(bias.double()), TOLERANCE[dtype])
    assert_near(
        y.var(1, correction=0), per_unit(weight.double()) ** 2 * var / (var + 1e-3), 2 * TOLERANCE[dtype]
    )


@pytest.mark.parametrize("mean", [1e3, 1e4])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@all_layouts
@all_kinds
def test_large_means(kind, shape, layout, mean, device, path):
    """Unit variance around 1,000 and 10,000, against fp64. E[x^2] - E[x]^2 is off by 12 % and by more than 100 %."""
    if path == "aten":
        pytest.skip("torch on the CPU is wrong by up to 1,000 here (group_norm, channels last, mean 10,000)")
    x, weight, bias, dy = data(shape, device, torch.float32, layout)
    x = torch.randn_like(x) + mean * per_channel(torch.tensor([1, -1, 1, 1, -1, -1.0], device=device), x)
    if kind == "group_norm":
        x = x.abs()
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y, expected = normalize(kind, *leaves), _exact(kind, *exact)
    found, expected_gradients = gradients(y, leaves, dy), gradients(expected, exact, dy.double())
    # Two roundings of the mean, each by half a unit in the last place, and a spread of 1.
    error = 1.5 * mean * torch.finfo(torch.float32).eps + 1e-5
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1.5 * error)
    torch.testing.assert_close(found[0].double(), expected_gradients[0], rtol=0, atol=4 * error)
    count = x.numel() / CHANNELS
    # Sums of independent terms of size 1, and the shift of each by the error of the mean: sum dy.
    noise = math.sqrt(count) * (error + 1e-6) * 5
    torch.testing.assert_close(found[1].double(), expected_gradients[1], rtol=1e-5, atol=noise)
    torch.testing.assert_close(
        found[2].double(), expected_gradients[2], rtol=1e-5, atol=math.sqrt(count) * 1e-5
    )


def _exact(kind, x, weight, bias, eps=1e-5):
    """The definition, written out."""
    values = units(kind, x)
    var, mean = torch.var_mean(values, 1, correction=0, keepdim=True)
    xhat = (values - mean) * (var + eps).rsqrt()
    xhat = (
        xhat.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
        if kind == "batch_norm"
        else xhat.view(x.shape)
    )
    return xhat * per_channel(weight, x) + per_channel(bias, x)


@pytest.mark.parametrize(
    ("dtype", "mean", "step"), [(torch.float16, 1000.0, 1.0), (torch.bfloat16, 128.0, 1.0)]
)
@all_layouts
@all_kinds
def test_large_means_in_16_bits(kind, layout, dtype, mean, step, device, path):
    """Integers that the dtype has: the data are what they are, and only the result is rounded."""
    if path == "aten":
        pytest.skip("ATen keeps scale and shift in 16 bits, and loses the mean's size in them")
    x = LAYOUTS[layout](torch.randint(-4, 5, SMALL, device=device) * step + mean).to(dtype)
    weight, bias = (t.float() for t in data(SMALL, device)[1:3])
    y = normalize(kind, x, weight, bias)
    exact = _exact(kind, x.double(), weight.double(), bias.double())
    # One rounding to 16 bits, on what the fp32 mean leaves: 1000 eps.
    torch.testing.assert_close(y.double(), exact, rtol=1.01 * rounding(dtype), atol=5e-4)


def test_an_outlier_where_statistics_begin(device, path):
    """The first values set the kernels' shift: 10^4 there, noise elsewhere, in a channel of several programs."""
    x = torch.randn(1, 2, 150, 151, device=device)
    x[0, 0, 0, :4] = 1e4
    x[0, 1, -1, -4:] = 1e4
    y = normalize("batch_norm", x)
    exact = _exact(
        "batch_norm",
        x.double(),
        *torch.tensor([[1.0], [0.0]], dtype=torch.float64, device=device).expand(2, 2),
    )
    # Variance 1.8e4, mean 1.8: relative errors of some fp32 units of the outlier's 75.
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)


# --- the gradient is orthogonal to what normalization removes ---------------------------------------------


@pytest.mark.parametrize("shape", [SMALL, LARGE, (4, CHANNELS, 2)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@all_layouts
@all_dtypes
@all_kinds
def test_the_gradient_has_no_mean_and_no_part_along_the_standardized_input(
    kind, dtype, layout, residual, shape, device, path
):
    """sum dx = 0 in each unit, and sum dx xhat is what eps leaves: eps / (var + eps) of sum (dy weight) xhat."""
    x, weight, bias, dy = data(shape, device, dtype, layout)
    x.requires_grad_()
    y = normalize(kind, x, weight, bias, eps=1e-2, residual=torch.ones_like(x) if residual else None)
    (dx,) = gradients(y, [x], dy)
    dx, xhat = units(kind, dx.double()), standardized(kind, x, 1e-2)
    _, var = moments(kind, x)
    rstd = (var + 1e-2).rsqrt()
    along = (units(kind, (dy * per_channel(weight, x)).double()) * xhat).sum(1)
    count = dx.shape[1]
    scale = (
        3 * math.sqrt(count) * rstd.max().item()
    )  # of sums of that many terms: their errors are independent
    assert_near(dx.sum(1), torch.zeros_like(var), scale * TOLERANCE[dtype])
    assert_near((dx * xhat).sum(1), rstd * along * 1e-2 / (var + 1e-2), scale * TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [SMALL, LARGE, (3, CHANNELS, 5), (17, CHANNELS)], ids=str)
@all_layouts
@all_kinds
def test_bias_gradients_are_exact_sums(kind, layout, shape, device, path):
    """fp32 adds whole numbers exactly in any order: not an element is lost or counted twice."""
    if kind == "instance_norm" and len(shape) == 2:
        pytest.skip("one element an instance")
    x, weight, bias, dy = data(shape, device, torch.float32, layout)
    dy = LAYOUTS[layout](torch.randint(-8, 9, shape, device=device).float())
    # Also for x: torch 2.13's group_norm on the CPU crashes where only the bias needs a gradient, channels last.
    x.requires_grad_()
    bias.requires_grad_()
    _, dbias = gradients(normalize(kind, x, weight, bias), [x, bias], dy)
    assert_same(dbias, dy.transpose(0, 1).flatten(1).sum(1))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("shape", [SMALL, (2, CHANNELS, 4, 6), (3, 8, 5, 5), LARGE], ids=str)
@all_layouts
@all_kinds
def test_the_residual_has_the_gradient_of_its_activation(kind, layout, shape, activation, device, path):
    """dy where the output is positive, nothing (or a hundredth) elsewhere: exactly, in every bit of a packed mask."""
    if kind == "group_norm" and shape[1] % GROUPS:
        pytest.skip("three groups")
    x, weight, bias, dy = data(shape, device, torch.float32, layout)
    residual = LAYOUTS[layout](torch.randn(shape, device=device)).requires_grad_()
    y = normalize(kind, x, weight, bias, activation=activation, residual=residual)
    (dresidual,) = gradients(y, [residual], dy)
    slope = 0.01 if activation == "leaky_relu" else 0.0
    expected = torch.where(y > 0, dy, dy * slope)
    # -0 and 0 are equal; 0.01 is rounded to fp32 or not before the product.
    torch.testing.assert_close(dresidual, expected, rtol=2e-7, atol=0)


# --- units that are constant, or have one element ---------------------------------------------------------


@all_dtypes
@all_layouts
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@all_kinds
def test_constant_units_become_beta(kind, shape, layout, dtype, device, path):
    """Variance 0: 1 / sqrt(eps) = 316 times what the mean is off, which is some units of the value at most."""
    value = torch.tensor([0.0, 1.0, -1000.0, 0.1, 1e-3, 3.3], device=device, dtype=dtype)
    if kind == "group_norm":
        value = value[::2].repeat_interleave(2)
    _, weight, bias, dy = data(shape, device, dtype, layout)
    x = LAYOUTS[layout](per_channel(value, dy).expand(shape).contiguous()).requires_grad_()
    weight.requires_grad_()
    y = normalize(kind, x, weight, bias)
    dx, dweight = gradients(y, [x, weight], dy)
    assert dx.isfinite().all()
    assert dweight.isfinite().all()
    if path == "aten":
        return  # torch's mean of 19,594 equal values is off by a relative 2e-5 in fp32
    off = 316 * 1.5 * value.abs().double() * 4 * torch.finfo(dtype).eps
    error = (y.detach().double() - per_channel(bias, y).double()).abs().amax((0, 2, 3))
    assert (error <= off).all()
    assert (error[value == 0] == 0).all()
    # xhat is 0, so the gradient is that of a mean alone.
    g = units(kind, (dy * per_channel(weight, x)).detach().double())
    expected = (g - g.mean(1, keepdim=True)) * 1e-5**-0.5
    actual = units(kind, dx.double())
    zero = units(kind, (value == 0).view(1, -1, 1, 1).expand(shape))[:, 0]
    assert_near(actual[zero], expected[zero], 1000 * TOLERANCE[dtype])
    # Elsewhere xhat is ``off`` and the part along it off^2 of that.
    assert ((actual - expected).abs() <= 316 * 10 * (TOLERANCE[dtype] + off.max() ** 2)).all()


@pytest.mark.parametrize("shape", [(2, 6), (3, 6, 1), (4, 6, 1, 1)], ids=str)
def test_groups_of_one_element_become_beta(shape, device, path):
    """x - mean is 0 whatever x is; nothing flows back to x or to the weight."""
    x = (1e3 * torch.randn(shape, device=device)).requires_grad_()
    weight, bias = torch.randn(2, 6, device=device).unbind()
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    y = normalize("group_norm", x, weight, bias, groups=6)
    dy = torch.randint(-8, 9, shape, device=device).float()
    dx, dweight, dbias = gradients(y, [x, weight, bias], dy)
    if path == "aten":
        # a x + b instead of (x - mean) scale + b: 316 times some units of x, which is up to 3,000.
        assert ((y - per_channel(bias, x)).abs() < 0.3).all()
        return
    assert_same(y.detach(), per_channel(bias, x).expand(shape).detach())
    # weight dy - mean(weight dy), times 316: one product, in two orders.
    terms = 316.3 * (per_channel(weight, x) * dy).abs()
    assert (dx.abs() <= 2 * torch.finfo(torch.float32).eps * terms).all()
    assert_same(dweight, torch.zeros_like(weight))
    assert_same(dbias, dy.transpose(0, 1).flatten(1).sum(1))


def test_two_values_become_opposite(device, path):
    """(x - mean) / |x - mean| = +-1 up to eps: the smallest unit that batch normalization takes."""
    x = torch.tensor([[1.0, 5.0, -3.0, 1e4], [2.0, 4.0, -3.5, -1e4]], dtype=torch.float64, device=device)
    y = normalize("batch_norm", x)
    half = (x[0] - x[1]) / 2
    expected = half / (half.square() + 1e-5).sqrt()
    assert_near(y, torch.stack((expected, -expected)), TOLERANCE[torch.float64])


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
def test_one_value_a_channel_is_refused_and_changes_nothing(shape, device, path):
    layer = {2: fnn.BatchNorm1d, 3: fnn.BatchNorm1d, 4: fnn.BatchNorm2d}[len(shape)](3).to(device)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(shape, device=device))
    assert_same(layer.running_mean, torch.zeros(3, device=device))
    assert_same(layer.running_var, torch.ones(3, device=device))
    assert layer.eval()(torch.randn(shape, device=device)).shape == shape


# --- what may depend on what ------------------------------------------------------------------------------

POISONS = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("shape", [SMALL, LARGE, (4, CHANNELS, 2, 2)], ids=["small", "large", "tiny"])
@all_layouts
@all_kinds
def test_a_bad_value_spoils_its_unit_and_no_other(kind, layout, shape, poison, device, path):
    """The others keep their bits, forward and backward: also those that a program has in the same tile."""
    x, weight, bias, dy = data(shape, device, torch.float32, layout)
    bad = x.clone()
    bad[1, 2, 1, 1] = poison
    spoiled = units(kind, (bad != bad) | bad.isinf()).any(1)
    assert spoiled.sum() == 1

    def run(x):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        y = normalize(kind, *leaves, activation="silu")
        return y.detach(), *gradients(y, leaves, dy)

    (y, dx, dweight, dbias), (bad_y, bad_dx, bad_dweight, bad_dbias) = run(x), run(bad)
    for clean, result in ((y, bad_y), (dx, bad_dx)):
        clean, result = units(kind, clean), units(kind, result)
        assert_same(result[~spoiled], clean[~spoiled])
        assert result[spoiled].isnan().all()
    touched = torch.zeros(CHANNELS, dtype=torch.bool, device=device)
    touched[[2, 3] if kind == "group_norm" else 2] = True
    assert_same(bad_dweight[~touched], dweight[~touched])
    assert_same(bad_dbias[~touched], dbias[~touched])
    assert bad_dweight[touched].isnan().all()


@pytest.mark.parametrize("poison", POISONS)
@all_layouts
@all_kinds
def test_a_bad_gradient_spoils_its_unit_and_no_other(kind, layout, poison, device, path):
    x, weight, bias, dy = data(SMALL, device, torch.float32, layout)
    bad = dy.clone()
    bad[1, 2, 1, 1] = poison
    spoiled = units(kind, ~bad.isfinite()).any(1)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = normalize(kind, *leaves)
    clean = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, bad)
    assert_same(units(kind, dx)[~spoiled], units(kind, clean[0])[~spoiled])
    assert not units(kind, dx)[spoiled].isfinite().any()
    others = torch.arange(CHANNELS, device=device) != 2
    assert_same(dweight[others], clean[1][others])
    assert_same(dbias[others], clean[2][others])
    assert not dweight[2].isfinite()
    assert not dbias[2].isfinite()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_a_bad_value_spoils_the_running_statistics_of_its_channel_and_no_other(
    name, shape, poison, device, path
):
    x = data(shape, device, torch.float32)[0]
    layer, bad_layer = (getattr(fnn, name)(CHANNELS, track_running_stats=True).to(device) for _ in range(2))
    layer(x)
    bad = x.clone()
    bad[1, 2, 1, 1] = poison
    bad_layer(bad)
    others = torch.arange(CHANNELS, device=device) != 2
    for buffer in ("running_mean", "running_var"):
        assert_same(getattr(bad_layer, buffer)[others], getattr(layer, buffer)[others])
        assert not getattr(bad_layer, buffer)[2].isfinite()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_bad_value_in_evaluation_spoils_itself_alone(poison, activation, device, path):
    x, weight, bias, _ = data(SMALL, device, torch.float32)
    mean, var = torch.rand(2, CHANNELS, device=device) + 0.5
    bad = x.clone()
    bad[1, 2, 1, 1] = poison
    y, bad_y = (F.batch_norm(t, mean, var, weight, bias, activation=activation) for t in (x, bad))
    here = ~bad.isfinite()
    assert_same(bad_y[~here], y[~here])
    expected = (poison - mean[2]) * weight[2]
    expected = expected.relu() if activation else expected
    assert_same(bad_y[here], expected.view(1))


@pytest.mark.parametrize("kind", ["group_norm", "instance_norm"])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@all_layouts
@all_dtypes
def test_samples_do_not_see_each_other(dtype, layout, shape, kind, device, path):
    """A sample alone gives what it gives in a batch. Another number of them may be dealt out in another way."""
    if path == "aten" and layout == "channels_last" and kind == "instance_norm":
        pytest.skip(
            "torch's gradient of x is wrong on the CPU, for one sample and channels last (2.11, 2.13)"
        )
    x, weight, bias, dy = data(shape, device, dtype, layout)
    x.requires_grad_()
    y = normalize(kind, x, weight, bias)
    (dx,) = gradients(y, [x], dy)
    for i in range(shape[0]):
        alone = x[i : i + 1].detach().requires_grad_()
        y_alone = normalize(kind, alone, weight, bias)
        assert_near(y_alone, y[i : i + 1], 4 * TOLERANCE[dtype])
        assert_near(gradients(y_alone, [alone], dy[i : i + 1])[0], dx[i : i + 1], 16 * TOLERANCE[dtype])


@all_dtypes
@all_kinds
def test_a_permuted_batch_gives_a_permuted_result(kind, dtype, device, path):
    x, weight, bias, dy = data(SMALL, device, dtype)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    results = []
    for permute in (lambda t: t, lambda t: t[order]):
        leaves = [t.detach().clone().requires_grad_() for t in (permute(x), weight, bias)]
        y = normalize(kind, *leaves, activation="gelu")
        results.append((y.detach(), *gradients(y, leaves, permute(dy))))
    (y, dx, dweight, dbias), permuted = results
    assert_near(permuted[0], y[order], TOLERANCE[dtype])
    assert_near(permuted[1], dx[order], 4 * TOLERANCE[dtype])
    assert_near(permuted[2], dweight, 100 * TOLERANCE[dtype])  # sums of 105 terms
    assert_near(permuted[3], dbias, 100 * TOLERANCE[dtype])


@all_kinds
def test_permuted_channels_give_permuted_results(kind, device, path):
    x, weight, bias, _ = data(SMALL, device)
    # Whole groups change places.
    order = torch.tensor([4, 5, 0, 1, 2, 3] if kind == "group_norm" else [3, 0, 5, 4, 1, 2], device=device)
    y = normalize(kind, x, weight, bias)
    assert_near(
        normalize(kind, x[:, order], weight[order], bias[order]), y[:, order], TOLERANCE[torch.float64]
    )


# --- one normalization as a case of another ---------------------------------------------------------------


def agree(first, second, inputs, dy, dtype, scale=10.0):
    """Two functions of the same inputs, with their gradients."""
    results = []
    for function in (first, second):
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
        y = function(*leaves)
        results.append((y.detach(), *gradients(y, leaves, dy)))
    for a, b in zip(*results, strict=True):
        assert_near(a, b, scale * TOLERANCE[dtype])


@all_dtypes
@all_layouts
@pytest.mark.parametrize("activation", [None, "mish"])
def test_instance_norm_is_group_norm_with_a_group_a_channel(activation, layout, dtype, device, path):
    x, weight, bias, dy = data(SMALL, device, dtype, layout)
    agree(
        lambda *t: normalize("instance_norm", *t, activation=activation),
        lambda *t: normalize("group_norm", *t, groups=CHANNELS, activation=activation),
        (x, weight, bias),
        dy,
        dtype,
        100,
    )


@all_dtypes
@all_layouts
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_group_norm_with_one_group_is_layer_norm_of_the_sample(shape, layout, dtype, device, path):
    """Torch's layer normalization, with a weight and a bias that are the same at all positions of a channel."""
    x, weight, bias, dy = data(shape, device, dtype, layout)

    def layer_norm(x, weight, bias):
        affine = (per_channel(t, x).expand(x.shape[1:]) for t in (weight, bias))
        return TF.layer_norm(x, x.shape[1:], *affine)

    agree(
        lambda *t: normalize("group_norm", *t, groups=1),
        layer_norm,
        (x, weight, bias),
        dy,
        dtype,
        10 * math.sqrt(x.numel() / CHANNELS),
    )


@all_dtypes
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_group_norm_is_batch_norm_of_a_batch_of_one(groups, dtype, device, path):
    """Each group of each sample as a channel."""
    x, _, _, dy = data(SMALL, device, dtype)
    agree(
        lambda x: normalize("group_norm", x, groups=groups),
        lambda x: normalize("batch_norm", x.reshape(1, SMALL[0] * groups, -1)).view(SMALL),
        (x,),
        dy,
        dtype,
    )


@all_dtypes
@all_layouts
def test_batch_norm_of_positions_is_batch_norm_of_rows(layout, dtype, device, path):
    """[N, C, H, W] and [N H W, C]: channels first and channels last have one meaning."""
    x, weight, bias, dy = data(SMALL, device, dtype, layout)

    def rows(x, weight, bias):
        flat = x.movedim(1, -1).reshape(-1, CHANNELS)
        y = normalize("batch_norm", flat, weight, bias)
        return y.view(SMALL[0], *SMALL[2:], CHANNELS).movedim(-1, 1)

    agree(lambda *t: normalize("batch_norm", *t), rows, (x, weight, bias), dy, dtype, 100)


@all_dtypes
@all_kinds
def test_fused_forms_are_compositions(kind, dtype, device, path):
    x, weight, bias, dy = data(SMALL, device, dtype)
    residual = torch.randn_like(x)
    agree(
        lambda x, w, b, r: normalize(kind, x, w, b, residual=r, activation="gelu"),
        lambda x, w, b, r: TF.gelu(normalize(kind, x, w, b) + r),
        (x, weight, bias, residual),
        dy,
        dtype,
        100,
    )


# --- evaluation, and the statistics for it ----------------------------------------------------------------


@all_dtypes
@all_layouts
@pytest.mark.parametrize("kind", ["batch_norm", "instance_norm"])
def test_evaluation_is_an_affine_map_of_each_element(kind, layout, dtype, device, path):
    x, weight, bias, dy = data(SMALL, device, dtype, layout)
    other = LAYOUTS[layout](torch.randn_like(x))
    mean = torch.linspace(-1, 2, CHANNELS, dtype=dtype, device=device)
    var = mean.square() + 0.25

    def evaluate(x):
        return getattr(F, kind)(x, mean, var, weight, bias, False)

    mixed = evaluate(0.25 * x + 0.75 * other)
    assert_near(mixed, 0.25 * evaluate(x) + 0.75 * evaluate(other), 10 * TOLERANCE[dtype])
    slope = weight / (var + 1e-5).sqrt()
    assert_near(
        evaluate(x),
        (x - per_channel(mean, x)) * per_channel(slope, x) + per_channel(bias, x),
        10 * TOLERANCE[dtype],
    )
    assert_same(evaluate(x)[2:3], evaluate(x[2:3]))
    x.requires_grad_()
    (dx,) = gradients(evaluate(x), [x], dy)
    assert_near(dx, dy * per_channel(slope, x), 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_momentum_is_the_plain_average_over_batches(dtype, device, path):
    """Batches of different sizes; their means and their unbiased variances are averaged."""
    layer = fnn.BatchNorm1d(CHANNELS, momentum=None).to(device, dtype)
    batches = [torch.randn(n, CHANNELS, device=device, dtype=dtype) + n for n in (2, 5, 9, 3, 4)]
    for i, x in enumerate(batches, 1):
        layer(x)
        assert layer.num_batches_tracked == i
        seen = [b.double() for b in batches[:i]]
        assert_near(layer.running_mean, torch.stack([b.mean(0) for b in seen]).mean(0), 10 * TOLERANCE[dtype])
        assert_near(layer.running_var, torch.stack([b.var(0) for b in seen]).mean(0), 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(2, CHANNELS), (3, CHANNELS), SMALL, LARGE], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1.0])
@all_layouts
@all_dtypes
def test_running_variance_is_unbiased_and_normalization_is_not(dtype, layout, momentum, shape, device, path):
    """n / (n - 1): a factor 2 for two values."""
    x = data(shape, device, dtype, layout)[0]
    mean, var = torch.full((2, CHANNELS), 0.5, dtype=dtype, device=device)
    y = F.batch_norm(x, mean, var, training=True, momentum=momentum)
    batch_mean, batch_var = moments("batch_norm", x)
    count = x.numel() // CHANNELS
    assert_near(mean, 0.5 * (1 - momentum) + momentum * batch_mean, 4 * TOLERANCE[dtype])
    assert_near(var, 0.5 * (1 - momentum) + momentum * batch_var * count / (count - 1), 10 * TOLERANCE[dtype])
    assert_near(
        units("batch_norm", y).var(1, correction=0), batch_var / (batch_var + 1e-5), 4 * TOLERANCE[dtype]
    )


@all_dtypes
def test_running_statistics_of_instance_norm_are_means_over_samples(dtype, device, path):
    x = data(SMALL, device, dtype)[0]
    mean, var = torch.full((2, CHANNELS), 0.5, dtype=dtype, device=device)
    F.instance_norm(x, mean, var, momentum=0.3)
    values = x.double().flatten(2)
    assert_near(mean, 0.35 + 0.3 * values.mean(2).mean(0), 4 * TOLERANCE[dtype])
    assert_near(var, 0.35 + 0.3 * values.var(2).mean(0), 10 * TOLERANCE[dtype])


def test_training_long_enough_makes_evaluation_agree_with_training(device, path):
    """The running statistics of one batch, seen again and again, become its own (with the unbiased variance)."""
    layer = fnn.BatchNorm2d(CHANNELS, momentum=0.5).to(device)
    x = data(SMALL, device, torch.float32)[0]
    for _ in range(24):  # 2^-24: the start is forgotten
        y = layer(x)
    count = x.numel() // CHANNELS
    correction = math.sqrt((count - 1) / count)
    assert_near(layer.eval()(x), y * correction, 10 * TOLERANCE[torch.float32])


# --- any shape --------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    samples=st.integers(1, 5),
    channels=st.integers(1, 40),
    positions=st.lists(st.integers(1, 9), max_size=3),
    divisor=st.integers(1, 40),
    layout=st.sampled_from(list(LAYOUTS)),
    activation=st.sampled_from([None, "relu", "silu"]),
    residual=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    kind, samples, channels, positions, divisor, layout, activation, residual, seed, device, path
):
    """Against the definition written out, in fp64, with all gradients."""
    torch.manual_seed(seed)
    groups = max(g for g in range(1, divisor + 1) if channels % g == 0)
    shape = (samples, channels, *positions)
    spatial = math.prod(positions)
    per_unit = {"batch_norm": samples * spatial, "group_norm": channels // groups * spatial}.get(
        kind, spatial
    )
    if per_unit == 1:
        return  # refused, or constant: see above
    x, weight, bias, dy = data(shape, device, layout=layout)
    r = torch.randn_like(x) if residual else None
    inputs = [x, weight, bias] + ([r] if residual else [])

    def split(t):
        if kind == "batch_norm":
            return t.transpose(0, 1).reshape(channels, -1)
        return t.reshape(samples * (groups if kind == "group_norm" else channels), -1)

    def definition(x, weight, bias, r=None):
        var, mean = torch.var_mean(split(x), 1, correction=0, keepdim=True)
        xhat = (split(x) - mean) / (var + 1e-2).sqrt()
        if kind == "batch_norm":
            xhat = xhat.view(channels, samples, *positions).transpose(0, 1)
        v = xhat.reshape(shape) * per_channel(weight, x) + per_channel(bias, x) + (0 if r is None else r)
        return {None: lambda v: v, "relu": torch.relu, "silu": TF.silu}[activation](v)

    agree(
        lambda x, w, b, r=None: normalize(
            kind, x, w, b, eps=1e-2, groups=groups, activation=activation, residual=r
        ),
        definition,
        inputs,
        dy,
        torch.float64,
        200,  # fp64, 2e-10: sums of up to 3,600 terms, and 1 / sqrt(eps) = 10
    )

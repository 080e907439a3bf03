"""The activations of the kernels against fp64, over all numbers of 16 bits and a dense grid of wider ones.

Error bounds are counted in u, the rounding unit of the dtype that the kernels compute in (2^-24, or 2^-53 for fp64
tensors), from the roundings of each formula and what the PTX ISA allows the approximate instructions: ex2 4 u and
rcp 2 u, relative. An exp2 whose argument t has been rounded k times adds k ln(2) |t| u: the factors of |v| below.
"""

import inspect
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from machine_option import rounding

from fastreg import functional
from fastreg.kernels import activation
from fastreg.kernels.fastmath import upcast
from fastreg.ops.fused import ACTIVATIONS, OF_OUTPUT

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@triton.jit
def run_forward(x_ptr, y_ptr, numel, NAME: tl.constexpr, BLOCK: tl.constexpr):
    """y = f(x), stored in the dtype of y (x, y: [numel])."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < numel, other=0.0)
    y = activation.forward(upcast(x), NAME, x.dtype)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < numel)


@triton.jit
def run_backward(x_ptr, y_ptr, numel, NAME: tl.constexpr, BLOCK: tl.constexpr):
    """y = f'(x), the gradient of an upstream gradient of 1."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < numel, other=0.0)
    v = upcast(x)
    y = activation.backward(tl.full([BLOCK], 1.0, v.dtype), v, NAME, x.dtype)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < numel)


def run(kernel, name, x, stored=None):
    """What a kernel makes of CPU tensor ``x``, in fp64; ``stored``: the dtype it writes, by default unrounded."""
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    y = torch.empty(x.shape, dtype=stored or computed, device=device)
    block = (
        1024 if device == "cuda" else triton.next_power_of_2(x.numel())
    )  # the interpreter pays for programs
    kernel[(triton.cdiv(x.numel(), block),)](x.to(device), y, x.numel(), NAME=name, BLOCK=block)
    return y.cpu().double()


# --- the functions in fp64, in forms that do not cancel in the tails, and what the kernels promise ---------


def Phi(v):
    return 0.5 * torch.special.erfc(-v / math.sqrt(2))


def phi(v):
    return torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)


def sigmoid(v):
    return torch.sigmoid(v)


def gelu_tanh_argument(v):
    """2 sqrt(2/pi) (v + 0.044715 v^3), and v times its derivative."""
    c = 2 * math.sqrt(2 / math.pi)
    return c * (v + 0.044715 * v**3), c * (v + 3 * 0.044715 * v**3)


def mish_terms(v):
    """tanh(softplus(v)) and v times its derivative: 1 and 0 in fp64 from 20 on."""
    w = v.clamp(max=20)
    e = torch.exp(w)
    return torch.tanh(torch.log1p(e)), w * 4 * e * (1 + e) / (e * (e + 2) + 2) ** 2


class Reference(NamedTuple):
    """A function in fp64, and how far a kernel may be from it: units(a) u size, a = |v| of a negative v, else 0.

    a stands for the argument of the exp2: for a positive v its error is damped as fast as it grows.
    """

    exact: Callable
    units: Callable
    size: Callable | None = (
        None  # what is rounded: the terms' magnitudes, where they cancel; None: the result
    )


def constant(units):
    return lambda a: units


def linear(units, slope):
    return lambda a: units + slope * a


FORWARD = {
    "relu": Reference(lambda v: v.clamp(min=0), constant(0)),
    "leaky_relu": Reference(lambda v: torch.where(v > 0, v, 0.01 * v), constant(2)),
    "gelu": Reference(lambda v: v * Phi(v), lambda a: 10 + a * a),  # and the error of the tail: TAIL
    "gelu_tanh": Reference(
        lambda v: v * sigmoid(gelu_tanh_argument(v)[0]), lambda a: 10 + 6 * gelu_tanh_argument(a)[0]
    ),
    "silu": Reference(lambda v: v * sigmoid(v), linear(10, 2)),
    "sigmoid": Reference(sigmoid, linear(8, 2)),
    # 1 - 2 / (1 + e^2v) and e^v - 1 round at 1, however small the result: test_small_arguments has the rest.
    "tanh": Reference(torch.tanh, constant(8), torch.ones_like),
    "elu": Reference(
        lambda v: torch.where(v > 0, v, torch.expm1(v)), constant(6), lambda v: (v <= 0).double()
    ),
    "mish": Reference(lambda v: v * mish_terms(v)[0], linear(16, 4)),
    "hardswish": Reference(lambda v: v * (v + 3).clamp(0, 6) / 6, constant(5)),
    "relu6": Reference(lambda v: v.clamp(0, 6), constant(0)),
    "hardsigmoid": Reference(lambda v: (v + 3).clamp(0, 6) / 6, constant(3)),
    "quick_gelu": Reference(lambda v: v * sigmoid(1.702 * v), linear(10, 4)),
}

BACKWARD = {
    "relu": Reference(lambda v: (v > 0).double(), constant(0)),
    "leaky_relu": Reference(lambda v: torch.where(v > 0, torch.ones_like(v), 0.01), constant(1)),
    "gelu": Reference(
        lambda v: Phi(v) + v * phi(v), lambda a: 12 + 2 * a * a, lambda v: Phi(v) + v.abs() * phi(v)
    ),
    # Here and in silu 1 - s is off by u, not by u (1 - s), and is multiplied with the slope (units / 8 of it).
    "gelu_tanh": Reference(
        lambda v: (
            sigmoid(gelu_tanh_argument(v)[0])
            * (1 + sigmoid(-gelu_tanh_argument(v)[0]) * gelu_tanh_argument(v)[1])
        ),
        lambda a: 16 + 8 * gelu_tanh_argument(a)[0],
        lambda v: (
            sigmoid(gelu_tanh_argument(v)[0])
            * (1 + (sigmoid(-gelu_tanh_argument(v)[0]) + (v.abs() < 8) / 8) * gelu_tanh_argument(v)[1].abs())
        ),
    ),
    "silu": Reference(
        lambda v: sigmoid(v) * (1 + v * sigmoid(-v)),
        linear(12, 2),
        lambda v: sigmoid(v) * (1 + v.abs() * sigmoid(-v) + (v.abs() < 40) * v.abs() / 8),
    ),
    "sigmoid": Reference(lambda v: sigmoid(v) * sigmoid(-v), linear(12, 2), sigmoid),
    "tanh": Reference(lambda v: 1 / torch.cosh(v) ** 2, constant(16), torch.ones_like),
    "elu": Reference(lambda v: torch.exp(v.clamp(max=0)), linear(6, 2)),
    "mish": Reference(
        lambda v: mish_terms(v)[0] + mish_terms(v)[1],
        linear(24, 8),
        lambda v: mish_terms(v)[0] + mish_terms(v)[1].abs(),
    ),
    "hardswish": Reference(
        lambda v: torch.where(v <= -3, 0.0, torch.where(v >= 3, 1.0, v / 3 + 0.5)),
        constant(4),
        lambda v: (v > -3).double(),
    ),
    "relu6": Reference(lambda v: ((v > 0) & (v < 6)).double(), constant(0)),
    "hardsigmoid": Reference(lambda v: ((v > -3) & (v < 3)).double() / 6, constant(1)),
    "quick_gelu": Reference(
        lambda v: sigmoid(1.702 * v) * (1 + 1.702 * v * sigmoid(-1.702 * v)),
        linear(14, 4),
        lambda v: (
            sigmoid(1.702 * v)
            * (1 + 1.702 * v.abs() * sigmoid(-1.702 * v) + (v.abs() < 24) * 1.702 * v.abs() / 8)
        ),
    ),
}

TABLES = {"forward": (run_forward, FORWARD), "backward": (run_backward, BACKWARD)}

# Relative errors that the formulas allow themselves for a stored dtype, and from where to where: the polynomial of
# the normal tail (up to TAIL_END) and the short series of tanh and elu near 0.
TAIL = {torch.float32: 1.5e-6, torch.float16: 1.4e-5, torch.bfloat16: 3e-4}
# gelu and its derivative behind that, absolute. There gelu is -1e-6 (fp16: half a step is 3e-8) and -1e-7 or less
# (torch's fp32 gelu is off by as much).
TAIL_END = {torch.float32: -5.5, torch.float16: -5.0, torch.bfloat16: -5.5}
FAR_TAIL = {torch.float32: 5e-13, torch.float16: 1e-10, torch.bfloat16: 5e-10}
SHORT_SERIES = {"tanh": 0.01**2 / 3, "elu": 0.02**2 / 6}
# fp32 instructions flush below 2^-126 = 1.2e-38, which a factor of |v| < 90 or a slope can still enlarge.
FLUSHED = {torch.float64: 1e-300}


def exact_and_bound(direction, name, x):
    """The exact values at ``x`` in fp64 and the largest error of what the kernel computes, before it is stored."""
    reference = TABLES[direction][1][name]
    v = x.double()
    exact = reference.exact(v)
    size = exact.abs() if reference.size is None else reference.size(v)
    unit = UNIT[torch.float64 if x.dtype == torch.float64 else torch.float32]
    bound = reference.units((-v).clamp(0, 90)) * unit * size + FLUSHED.get(x.dtype, 1e-35)
    if name == "gelu":
        if x.dtype == torch.float64:
            bound = bound + 4 * UNIT[x.dtype] * (
                v.abs() if direction == "forward" else 1.0
            )  # 1 + erf rounds at 1
        else:
            tail = TAIL[x.dtype] * Phi(-v.abs()) * (v.abs() if direction == "forward" else 1.0)
            bound = bound + tail + (v <= TAIL_END[x.dtype]) * FAR_TAIL[x.dtype]
    if name in SHORT_SERIES and x.dtype.itemsize == 2 and direction == "forward":
        bound = bound + SHORT_SERIES[name] * exact.abs()
    if name == "tanh" and direction == "backward" and x.dtype.itemsize == 2:
        bound = bound + 2 * SHORT_SERIES[name] * 0.01**2
    return exact, bound


def every_finite(dtype):
    """All numbers of a 16-bit dtype, but the subnormals of bf16, which the interpreter reads as 0."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    return x if dtype == torch.float16 else x[(x == 0) | (x.abs() >= torch.finfo(dtype).tiny)]


def grid(dtype):
    """Dense in [-20, 20], logarithmic down to 1e-30, the kinks and their neighbours, and huge numbers."""
    linear = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    small = torch.logspace(-30, 1, 8_001, dtype=torch.float64)
    kinks = torch.tensor(
        [0.0, -0.0, 3.0, -3.0, 6.0, 0.2, -0.2, -0.1, 2**-6, -(2**-6), -(2**-9), 5.5, -5.5, 20.0, -20.0]
    )
    huge = torch.tensor([89.0, 1e3, 60000.0, 1e10, 1e18, 1e30])
    x = torch.cat((linear, small, -small, kinks, huge, -huge)).to(dtype)
    near = kinks.to(dtype)
    return torch.cat((x, near.nextafter(near + 1), near.nextafter(near - 1)))


def samples(dtype, direction, name):
    x = every_finite(dtype) if dtype.itemsize == 2 else grid(dtype)
    if (direction, name) == ("backward", "gelu_tanh"):
        x = x[x.abs() < 1e12]  # v^3 overflows fp32, in torch too
    return x


directions = pytest.mark.parametrize("direction", ["forward", "backward"])
names = pytest.mark.parametrize("name", ACTIVATIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def worst(error, bound, x):
    i = (error / bound).nan_to_num(math.inf, math.inf).argmax()
    return f"error {error[i]:.3g} > {bound[i]:.3g} at {x[i].item()!r}"


@directions
@names
@dtypes
def test_computed(direction, name, dtype):
    """Before it is rounded to the stored dtype, every result is within the bound of its formula."""
    x = samples(dtype, direction, name)
    exact, bound = exact_and_bound(direction, name, x)
    error = (run(TABLES[direction][0], name, x) - exact).abs()
    assert (error <= bound).all(), worst(error, bound, x)


@directions
@names
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stored(direction, name, dtype):
    """Stored in 16 bits: a rounding on top, which is most of it."""
    x = samples(dtype, direction, name)
    exact, bound = exact_and_bound(direction, name, x)
    stored = rounding(dtype) * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    error = (run(TABLES[direction][0], name, x, dtype) - exact).abs()
    limit = bound * (1 + 2 * UNIT[dtype]) + stored
    assert (error <= limit).all(), worst(error, limit, x)


@names
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_formulas_leave_the_rounding_alone(name, dtype):
    """Forward, the bound is a small part of half a step of the stored dtype wherever gelu's polynomial is fitted."""
    x = samples(dtype, "forward", name)
    x = x[(x.abs() > 1e-30) & (x > (-5.5 if name == "gelu" else -20))]
    exact, bound = exact_and_bound("forward", name, x)
    if name in SHORT_SERIES:
        x_small = x.abs() < 0.01
        exact, bound = exact[~x_small], bound[~x_small]  # there the series holds: test_small_arguments
    half_step = UNIT[dtype] * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    assert (bound - 1e-35 <= 0.25 * half_step).all()


@pytest.mark.parametrize(("name", "reach"), [("tanh", (0.2, 2**-6, 0.01)), ("elu", (0.1, 2**-9, 0.02))])
@dtypes
def test_small_arguments(name, reach, dtype):
    """Where the series holds, the error is relative: a few units, and for 16 bits the first term left out."""
    reach = {torch.float32: reach[0], torch.float64: reach[1]}.get(dtype, reach[2])
    x = samples(dtype, "forward", name)
    x = x[(x.abs() < 0.999 * reach) & (x != 0)]  # the kernel may hold the threshold in fp32
    exact = FORWARD[name].exact(x.double())
    error = (run(run_forward, name, x) - exact).abs()
    relative = 5 * UNIT[dtype] if dtype.itemsize > 2 else 1.01 * SHORT_SERIES[name] + 5 * 2.0**-24
    limit = relative * exact.abs() + FLUSHED.get(dtype, 1e-35)
    assert (error <= limit).all(), worst(error, limit, x)


def test_gelu_tail_is_better_than_torch():
    """Relative to fp64 erfc, in fp32: 1 - erf has lost a fifth at -5, one exp2 of a polynomial has not."""
    x = torch.linspace(-5.5, -2, 10_001)
    exact = FORWARD["gelu"].exact(x.double())
    relative = ((run(run_forward, "gelu", x) - exact) / exact).abs()
    torch_relative = ((F.gelu(x).double() - exact) / exact).abs()
    assert relative.max() < 4e-6  # 1.5e-6 of the polynomial, and the roundings of an exponent of 25
    assert torch_relative[x < -5].max() > 0.1
    assert relative[x < -3].max() < torch_relative[x < -3].max() / 1000
    far = torch.linspace(-12, -5.5, 5_001)
    exact = FORWARD["gelu"].exact(far.double())
    assert (run(run_forward, "gelu", far) - exact).abs().max() < (
        F.gelu(far).double() - exact
    ).abs().max() / 1000


def torch_gradient(name, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[name](x).sum(), x)[0]


@names
def test_derivative_is_that_of_torch(name):
    """This file's fp64 formulas are torch's, forward and backward: to the rounding of torch's own at 1 (times 20)."""
    x = grid(torch.float64)
    x = x[x.abs() <= 20]
    for exact, expected in (
        (FORWARD[name].exact(x), ACTIVATIONS[name](x)),
        (BACKWARD[name].exact(x), torch_gradient(name, x)),
    ):
        torch.testing.assert_close(exact, expected, rtol=1e-14, atol=2e-14)


# Better than torch, whose formulas multiply 0 with infinity.
FINITE_WHERE_TORCH_IS_NOT = {("forward", "gelu", -math.inf): 0.0, ("backward", "mish", math.inf): 1.0}


@directions
@names
@dtypes
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity(direction, name, dtype, value):
    x = torch.tensor([value], dtype=dtype)
    ours = run(TABLES[direction][0], name, x).item()
    expected = (ACTIVATIONS[name](x) if direction == "forward" else torch_gradient(name, x)).item()
    if dtype != torch.float64 or name == "mish":
        expected = FINITE_WHERE_TORCH_IS_NOT.get((direction, name, value), expected)
    assert ours == pytest.approx(expected, rel=2 * UNIT[dtype], nan_ok=True)


@names
@dtypes
def test_nan(name, dtype):
    """NaN stays NaN. So does its gradient, but that of a function of straight lines, which is torch's."""
    x = torch.full((3,), math.nan, dtype=dtype)
    assert run(run_forward, name, x).isnan().all()
    gradient = run(run_backward, name, x)
    if name in ("relu", "leaky_relu", "relu6", "hardsigmoid"):
        torch.testing.assert_close(gradient, torch_gradient(name, x).double(), rtol=UNIT[dtype], atol=0)
    else:
        assert gradient.isnan().all()


@pytest.mark.parametrize("name", OF_OUTPUT)
@dtypes
def test_derivatives_of_the_output(name, dtype):
    """From y = f(x): that of x, in fp64; and the kernel's that of ATen, with a rounding of each of its two operations
    and one of a constant (leaky_relu)."""
    x = grid(torch.float64)
    x = x[x.abs() <= 20]
    y = FORWARD[name].exact(x)
    expected = OF_OUTPUT[name](torch.ones_like(y), y)
    # What y has lost to rounding at 1, 2^-53, its derivative has lost too: tanh twice.
    torch.testing.assert_close(expected, BACKWARD[name].exact(x), rtol=0, atol=2e-15)
    y = y.to(dtype)
    expected = OF_OUTPUT[name](torch.ones(len(y), dtype=torch.float64), y.double())
    unit = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
    found = run(run_backward, f"{name}_of_output", y)
    torch.testing.assert_close(found, expected, rtol=0, atol=3 * unit)


KINKS = {
    "relu": [0.0, -0.0],
    "leaky_relu": [0.0, -0.0],
    "elu": [0.0, -0.0],
    "hardswish": [-3.0, 0.0, 3.0],
    "relu6": [0.0, -0.0, 6.0],
    "hardsigmoid": [-3.0, 3.0],
}


@pytest.mark.parametrize("name", KINKS)
@dtypes
def test_derivatives_at_kinks(name, dtype):
    x = torch.tensor(KINKS[name], dtype=dtype)
    expected = torch_gradient(name, x).double()
    torch.testing.assert_close(run(run_backward, name, x), expected, rtol=UNIT[dtype], atol=0)


@pytest.mark.parametrize("name", ["mish", "gelu", "silu", "hardswish", "elu", "relu", "quick_gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_derivative_of_huge_numbers_is_one(name, dtype):
    x = torch.logspace(2, 38, 37, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(
        run(run_backward, name, x), torch.ones(37, dtype=torch.float64), rtol=1e-6, atol=0
    )


@directions
@names
@dtypes
def test_fused_is_the_same(direction, name, dtype, device):
    """Dropout with p = 0 runs these functions and nothing else: the same bits."""
    x = torch.linspace(-8, 8, 517, dtype=torch.float64).to(dtype)
    on_device = x.to(device).requires_grad_()
    y = functional.dropout(on_device, 0.0, activation=name)
    if direction == "backward":
        y.backward(torch.ones_like(y))
        y = on_device.grad
    assert torch.equal(y.detach().cpu().double(), run(TABLES[direction][0], name, x, dtype))


@names
def test_upstream_gradient_is_a_factor(name, device):
    x = torch.linspace(-8, 8, 517, device=device).requires_grad_()
    upstream = torch.linspace(-3, 2, 517, device=device)
    functional.dropout(x, 0.0, activation=name).backward(upstream)
    exact, bound = exact_and_bound("backward", name, x.detach().cpu())
    factor = upstream.cpu().double()
    error = (x.grad.cpu().double() - exact * factor).abs()
    # g takes part in another order of the products: two more roundings.
    assert (error <= (bound + 2 * 2.0**-24 * exact.abs()) * factor.abs()).all()


@pytest.mark.parametrize("function", ["forward", "backward"])
def test_kernels_know_the_names(function):
    source = inspect.getsource(getattr(activation, function).fn)
    known = re.findall(r'NAME == "(\w+)"', source)
    of_output = [f"{name}_of_output" for name in OF_OUTPUT if function == "backward"]
    assert [name for name in known if name in of_output] == of_output
    assert [name for name in known if name not in of_output] == list(ACTIVATIONS)
    assert list(ACTIVATIONS) == list(FORWARD) == list(BACKWARD)


@pytest.mark.parametrize("kernel", [run_forward, run_backward])
def test_unknown_name_does_not_compile(kernel):
    with pytest.raises(Exception) as error:  # noqa: PT011 (Triton's own, around ours)
        run(kernel, "swish", torch.ones(4))
    said, cause = "", error.value
    while cause is not None:
        said, cause = said + str(cause), cause.__cause__
    assert "unknown activation" in said


def test_unknown_name_is_refused(device):
    with pytest.raises(ValueError, match="unknown activation 'swish': choose one of relu, leaky_relu"):
        functional.dropout(torch.ones(4, device=device), 0.0, activation="swish")

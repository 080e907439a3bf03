"""Expectations of activations of normal variables: closed forms against quadrature, draws against their definition."""

import math

import pytest
import torch
from machine_option import bf16
from shared import needs_triton
from torch.testing import assert_close

import fastreg.functional as F
from fastreg import random
from fastreg.ops.fused import ACTIVATIONS
from fastreg.ops.linear import expectation as ops
from fastreg.random import Stream

SEED = 0x123456789ABCDEF


def grid(device="cpu", dtype=torch.float64):
    """Means and deviations: small and large, apart and together."""
    mean = torch.tensor([-30.0, -4.0, -3.0, -0.5, 0.0, 0.01, 1.0, 3.0, 12.0], dtype=dtype, device=device)
    deviation = torch.tensor([0.01, 0.3, 1.0, 2.5, 9.0], dtype=dtype, device=device)
    return [t.flatten() for t in torch.meshgrid(mean, deviation, indexing="ij")]


def quadrature(mean, deviation, function):
    """Over 20 deviations, by trapezoids of a hundred-thousandth of one: good to 1e-9, kinks included."""
    x = torch.linspace(-10, 10, 2_000_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    pairs = zip(mean.double(), deviation.double(), strict=True)
    return torch.stack([(function(m + s * x) * weight).sum() for m, s in pairs])


# --- closed forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ops.CLOSED_FORMS)
def test_closed_forms_are_the_integrals(activation):
    mean, deviation = grid()
    expected = quadrature(mean, deviation, ACTIVATIONS[activation])
    # Kinks off the grid cost the trapezoids the square of a step (1e-10), and hardswish cancels moments of size 900.
    assert_close(ops.closed_form(mean, deviation, activation), expected, rtol=1e-8, atol=1e-9)
    narrow = ops.closed_form(mean.float(), deviation.float(), activation)
    # fp32: 6e-8 of what cancels, which are squares of 30 and 9 divided by 6.
    assert_close(narrow.double(), expected, rtol=1e-5, atol=1e-4 if activation == "hardswish" else 1e-5)


@pytest.mark.parametrize("activation", ops.CLOSED_FORMS)
def test_derivatives_of_closed_forms(activation):
    mean = torch.tensor([-3.0, -0.5, 0.2, 2.0], dtype=torch.float64, requires_grad=True)
    deviation = torch.tensor([0.4, 1.0, 2.0, 0.7], dtype=torch.float64, requires_grad=True)
    inputs = (mean, deviation)
    assert torch.autograd.gradcheck(lambda m, s: ops.closed_form(m, s, activation), inputs)
    assert torch.autograd.gradgradcheck(lambda m, s: ops.closed_form(m, s, activation), inputs)


@pytest.mark.parametrize("activation", ops.CLOSED_FORMS)
def test_gradients_of_the_inference(activation):
    """Through mean and variance of the layer to its input, weight and bias."""
    shapes = ((3, 5), (4, 5), (4,))
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(
        lambda *leaves: F.drop_connect_linear(*leaves, 0.3, training=False, activation=activation), leaves
    )


@pytest.mark.parametrize("activation", ops.CLOSED_FORMS)
def test_without_deviation_it_is_the_activation(activation):
    mean = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    deviation = torch.zeros(3, requires_grad=True)
    expected = ops.closed_form(mean, deviation, activation)
    assert torch.equal(expected, ACTIVATIONS[activation](mean))
    expected.sum().backward()
    assert mean.grad.isfinite().all()
    assert deviation.grad.isfinite().all()


def test_elu_does_not_overflow():
    """Where e^(mean + variance / 2) would: deviation 100."""
    expected = ops.closed_form(torch.tensor([-50.0, 0.0, 50.0]), torch.tensor(100.0), "elu")
    assert expected.isfinite().all()


def test_probit_is_close_to_the_sigmoid():
    """As close as its docstring says, and nearer than the sigmoid of the mean; exact at 0."""
    mean, deviation = (
        t.flatten()
        for t in torch.meshgrid(
            torch.linspace(-8, 8, 17, dtype=torch.float64),
            torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 10.0]).double(),
            indexing="ij",
        )
    )
    exact = quadrature(mean, deviation, torch.sigmoid)
    error = (ops.probit_sigmoid(mean, deviation) - exact).abs()
    assert error.max() < 0.02
    assert error.max() < 0.1 * (torch.sigmoid(mean) - exact).abs().max()
    assert_close(ops.probit_sigmoid(torch.zeros(1), torch.ones(1)), torch.tensor([0.5]))


def test_probit_is_asked_for():
    v, weight = torch.randn(3, 5), torch.randn(4, 5)
    options = {"training": False, "activation": "sigmoid", "seed": SEED}
    probit = F.drop_connect_linear(v, weight, inference="probit", **options)
    default = F.drop_connect_linear(v, weight, samples=100, **options)
    assert not torch.equal(probit, default)
    # 100 draws: 6 standard errors of a deviation of half at most, beside the 0.02 of the approximation.
    assert_close(probit, default, rtol=0, atol=0.02 + 6 * 0.5 / 10)
    for activation in ("relu", None):
        with pytest.raises(ValueError, match='inference="probit" approximates the sigmoid alone'):
            F.drop_connect_linear(v, weight, training=False, inference="probit", activation=activation)


# --- by nodes ---------------------------------------------------------------------------------------------

WITHOUT_CLOSED_FORM = [name for name in ACTIVATIONS if name not in ops.CLOSED_FORMS]


@pytest.mark.parametrize("activation", WITHOUT_CLOSED_FORM)
def test_nodes_are_as_good_as_they_say(path, device, activation):
    """Against the integral by 4,000 nodes; never worse than the standard error of 1,000 draws."""
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    weight = torch.exp(-0.5 * x.square())
    weight /= weight.sum()
    function = ACTIVATIONS[activation]
    for deviation, most in ((0.3, 1e-6), (1.0, 1e-6), (3.0, 2e-6), (5.0, 3e-4), (10.0, 8e-3), (30.0, 1.0)):
        mean = torch.linspace(-3, 3, 61, dtype=torch.float64) * max(2.0, deviation)
        values = function(mean[:, None] + deviation * x)
        expected = (values * weight).sum(1)
        draws = ((values.square() * weight).sum(1) - expected.square()).clamp(min=0).sqrt().max() / 1000**0.5
        found = ops.average(mean, torch.full_like(mean, deviation), activation)
        error = (found - expected).abs().max()
        assert error <= min(most, 2 * draws)
        single = ops.average(
            *(t.float().to(device) for t in (mean, torch.full_like(mean, deviation))), activation
        )
        # fp32 adds roundings of the sum, and the special functions of the kernels 2^-11 of tanh.
        assert_close(single.cpu().double(), found, rtol=1e-3, atol=5e-4 * max(1.0, deviation))


@pytest.mark.smoke
@pytest.mark.executed
@pytest.mark.parametrize("activation", WITHOUT_CLOSED_FORM)
def test_nodes_on_kernels_are_those_of_the_definition(path, device, activation):
    mean, deviation = (t.float().to(device) for t in grid())
    leaves = [t.clone().requires_grad_() for t in (mean, deviation)]
    y = ops.average(*leaves, activation)
    dy = torch.randn_like(y)
    wide = [t.double().requires_grad_() for t in (mean, deviation)]
    expected = ops._definition(*wide, None, activation, 0)
    # fp32, and the special functions, of which tanh has an error of 2^-11 in steps that the weights average.
    assert_close(y.double(), expected, rtol=2e-4, atol=2e-4)
    found = torch.autograd.grad(y, leaves, dy)
    for actual, reference in zip(found, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        assert_close(actual.double(), reference, rtol=1e-3, atol=2e-3)


def test_nodes_draw_nothing(path, device):
    v, weight = torch.randn(3, 5, device=device), torch.randn(4, 5, device=device)
    before = torch.get_rng_state()
    first = F.drop_connect_linear(v, weight, training=False, activation="silu")
    assert torch.equal(first, F.drop_connect_linear(v, weight, training=False, activation="silu"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_derivatives_of_nodes(activation):
    shapes = ((3, 5), (4, 5), (4,))
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def run(*leaves):
        return F.drop_connect_linear(*leaves, 0.3, training=False, activation=activation)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


# --- by draws ---------------------------------------------------------------------------------------------


def test_four_draws_are_the_normals_of_a_block():
    """Written out, for any quad: value d % 4 of block i, a stream every four draws."""
    drawn = random.draws((3, 5), 2, Stream(SEED, 7))
    assert torch.equal(drawn.flatten(), random.normal((60,), Stream(SEED, 7 + (2 << 32))))
    assert not torch.equal(drawn, random.draws((3, 5), 1, Stream(SEED, 7)))


def by_hand(mean, deviation, activation, samples):
    quads = [
        random.draws(mean.shape, quad, Stream(SEED), dtype=torch.float64) for quad in range(-(-samples // 4))
    ]
    eps = torch.cat(quads, -1)[..., :samples]
    v = mean.unsqueeze(-1) + deviation.unsqueeze(-1) * eps
    return ACTIVATIONS[activation](v).mean(-1)


@pytest.mark.executed
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "mish"])
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 11])
def test_draws(path, device, activation, samples):
    mean, deviation, dy = (torch.randn(7, 30, device=device) for _ in range(3))
    deviation = deviation.abs()
    leaves = [t.clone().requires_grad_() for t in (mean, deviation)]
    y = ops.average(*leaves, activation, samples, seed=SEED)
    exact = [t.cpu().double().requires_grad_() for t in (mean, deviation)]
    expected = by_hand(*exact, activation, samples)
    # Normals agree to 1e-6 of themselves, and the activations of the kernels to 1e-6 (3e-6 for gelu).
    assert_close(y.cpu().double(), expected, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(expected, exact, dy.cpu().double())
    for found, wanted in zip(torch.autograd.grad(y, leaves, dy), gradients, strict=True):
        assert_close(found.cpu().double(), wanted, rtol=0, atol=5e-5)


def test_one_launch_and_no_copies(device, monkeypatch):
    """Whatever the number of draws: one kernel, and two tensors of the size of the result."""
    if not ops.backend.HAS_TRITON:
        pytest.skip("needs Triton")
    mean, deviation = torch.randn(5, 9, device=device), torch.rand(5, 9, device=device)
    launches = []
    monkeypatch.setattr(ops.Launch, "run", lambda launch, device: launches.append(launch))
    ops.average(mean, deviation, "tanh", 1000, seed=SEED)
    (launch,) = launches
    tensors = [t for t in launch.leaves.values() if isinstance(t, torch.Tensor)]
    assert sum(t.numel() for t in tensors) == 3 * mean.numel()


def test_the_same_draws_again(path, device):
    mean, deviation = torch.randn(3, 5, device=device), torch.rand(3, 5, device=device)
    first = ops.average(mean, deviation, "silu", 6, seed=SEED)
    assert torch.equal(ops.average(mean, deviation, "silu", 6, seed=SEED), first)
    assert not torch.equal(ops.average(mean, deviation, "silu", 6, seed=SEED + 1), first)
    torch.manual_seed(3)
    first = ops.average(mean, deviation, "silu", 6)
    torch.manual_seed(3)
    assert torch.equal(ops.average(mean, deviation, "silu", 6), first)


@pytest.mark.usefixtures("aten")
def test_draws_converge_to_the_closed_form():
    """20,000 draws within 6 standard errors of it, for which the deviation of gelu(u) is at most that of u plus 1."""
    mean, deviation = (torch.tensor(t) for t in ([-1.0, 0.0, 2.0], [1.0, 0.5, 3.0]))
    samples = 20_000
    y = ops.average(mean, deviation, "gelu", samples, seed=SEED)
    error = (y - ops.closed_form(mean, deviation, "gelu")).abs()
    assert (error < 6 * (deviation + 1) / math.sqrt(samples)).all()


def test_derivatives_of_draws(path, device):
    inputs = [torch.rand(2, 3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]

    def function(mean, deviation):
        return ops.average(mean, deviation, "tanh", 5, seed=SEED)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivatives_behind_the_kernel(path, device):
    """In fp32, which runs on it: the graph of the gradient is that of the definition."""
    mean, deviation = (torch.rand(2, 3, device=device, requires_grad=True) for _ in range(2))
    found = []
    for function in (
        lambda: ops.average(mean, deviation, "tanh", 5, seed=SEED),
        lambda: by_hand(mean.double(), deviation.double(), "tanh", 5),
    ):
        (slope,) = torch.autograd.grad(function().sum(), mean, create_graph=True)
        found.append(torch.autograd.grad(slope.sum(), (mean, deviation)))
    assert_close(*found, rtol=1e-4, atol=1e-5)


@needs_triton
def test_compiled(device):
    compiled = torch.compile(
        lambda m, s: ops.average(m, s, "sigmoid", 6, seed=SEED),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (3, 5):
            leaves = [torch.rand(rows, 4, device=device, requires_grad=True) for _ in range(2)]
            y, expected = compiled(*leaves), ops.average(*leaves, "sigmoid", 6, seed=SEED)
            assert_close(y, expected)
            assert_close(*(torch.autograd.grad(z.square().sum(), leaves) for z in (y, expected)))


@pytest.mark.executed
@needs_triton
def test_opcheck(device):
    mean, deviation, dy, y, dmean, ddeviation = (torch.rand(2, 3, device=device) for _ in range(6))
    rest = torch.tensor([SEED], device=device), "tanh", 5
    operators = torch.ops.fastreg
    torch.library.opcheck(operators.expected_activation.default, (mean, deviation, y, *rest))
    given = dy, mean, deviation, dmean, ddeviation, *rest
    torch.library.opcheck(operators.expected_activation_backward.default, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inference_in_16_bits(path, device, dtype):
    v, weight = (torch.randn(s, device=device).to(dtype) for s in ((3, 5), (4, 5)))
    options = {"training": False, "activation": "tanh", "samples": 8, "seed": SEED}
    y = F.drop_connect_linear(v, weight, **options)
    assert y.dtype == dtype
    exact = F.drop_connect_linear(v.double(), weight.double(), **options)
    # The mean is rounded to the dtype, of values up to 8: half a unit in the last place there.
    assert_close(y.double(), exact, rtol=0, atol={torch.float16: 4e-3, torch.bfloat16: bf16(4e-2)}[dtype])


def test_empty(path, device):
    mean = torch.empty(0, 3, device=device)
    assert ops.average(mean, mean, "tanh", 5).shape == (0, 3)

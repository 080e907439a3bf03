"""Noisy linear layers against their formulas, with the noise of ``fastreg.random``; the identities of weight noise."""

import copy
import math

import pytest
import torch
from machine_option import bf16
from shared import near
from torch.testing import assert_close

import fastreg
import fastreg.functional as F
import fastreg.nn as fnn
from fastreg import random
from fastreg.ops.fused import ACTIVATIONS
from fastreg.ops.linear import noisy_linear as ops
from fastreg.random import Stream

SEED = 0x123456789ABCDEF
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A rounding of the operands and of the sum, before and after the noise. fp32: the normals.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: bf16(3e-2)}
ROOTS = 3e-4  # what the root in a factor makes of an error of 1e-7 in a normal close to 0
DOUBLE = torch.float64


def tensors(device, examples=5, outputs=19, inputs=37, dtype=torch.float32):
    shapes = ((examples, inputs), (outputs, inputs), (outputs,))
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def additive(v, weight, bias, sigma, bias_sigma=None):
    """The formula, in fp64."""
    eps = random.row_normals(len(v), len(weight), Stream(SEED), dtype=DOUBLE)
    variance = (sigma * v.norm(dim=1)) ** 2 + (0 if bias_sigma is None else bias_sigma**2)
    return v @ weight.t() + bias + variance.sqrt()[:, None] * eps


@pytest.mark.smoke
@pytest.mark.executed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noisy_bias", [False, True])
def test_additive_is_the_formula(path, device, dtype, noisy_bias):
    given = [*tensors(device, dtype=dtype), torch.tensor(0.3, device=device).to(dtype)]
    given += [torch.tensor([0.2], device=device).to(dtype)] if noisy_bias else []
    leaves = [t.requires_grad_() for t in given]
    exact = [t.detach().cpu().double().requires_grad_() for t in given]
    bias_sigma = leaves[4] if noisy_bias else None
    z = F.noisy_linear(*leaves[:4], bias_sigma=bias_sigma, seed=SEED)
    assert z.dtype == dtype
    expected = additive(*exact)
    dz = torch.randn(z.shape).to(dtype)
    found = torch.autograd.grad(z, leaves, dz.to(device))
    wanted = torch.autograd.grad(expected, exact, dz.double())
    for actual, target in zip((z, *found), (expected, *wanted), strict=True):
        assert actual.dtype == dtype
        near(actual, target, TOLERANCE[dtype])


def check_activation(device, activation, dtype, sigma_is_learned):
    """The additive mode behind an activation: where sigma is a number, and v has no gradient, x alone has one."""
    given = [*tensors(device, dtype=dtype), torch.tensor(0.3, device=device).to(dtype)]
    exact = [t.cpu().double().requires_grad_() for t in given]
    leaves = [t.requires_grad_() for t in given]
    leaves, twins = (leaves, exact) if sigma_is_learned else (leaves[1:3], exact[1:3])
    sigma = given[3] if sigma_is_learned else given[3].item()
    y = F.noisy_linear(
        given[0] if sigma_is_learned else given[0].detach(),
        given[1], given[2], sigma, activation=activation, seed=SEED,
    )  # fmt: skip
    expected = ACTIVATIONS[activation](additive(*exact))
    dy = torch.randn(y.shape).to(dtype)
    found = torch.autograd.grad(y, leaves, dy.to(device))
    for actual, target in zip(
        (y, *found), (expected, *torch.autograd.grad(expected, twins, dy.double())), strict=True
    ):
        assert actual.dtype == dtype
        near(actual, target, TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(path, device, activation, activation_passes):
    """It and its derivative run in the passes of the noise: on the kernels, ATen's is called nowhere."""
    leaves = [t.requires_grad_() for t in tensors(device)]
    with activation_passes() as passes:
        F.noisy_linear(*leaves, 0.3, activation=activation, seed=SEED).sum().backward()
    assert bool(passes.names) == (path == "aten")
    check_activation(device, activation, torch.float32, True)


@pytest.mark.executed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["sigmoid", "gelu"])
def test_activations_of_the_first_layer(device, activation, dtype):
    check_activation(device, activation, dtype, False)


@pytest.mark.parametrize(("examples", "outputs"), [(1, 1), (3, 1030), (17, 64)])
def test_rows_of_any_length(device, examples, outputs):
    v, weight, bias = (t.requires_grad_() for t in tensors(device, examples, outputs, 5))
    z = F.noisy_linear(v, weight, bias, 0.3, seed=SEED)
    exact = [t.detach().cpu().double().requires_grad_() for t in (v, weight, bias)]
    expected = additive(*exact, 0.3)
    near(z, expected, TOLERANCE[torch.float32])
    near(
        torch.autograd.grad(z.sum(), v)[0],
        torch.autograd.grad(expected.sum(), exact[0])[0],
        TOLERANCE[torch.float32],
    )


@pytest.mark.smoke
def test_multiplicative_is_the_formula(path, device):
    v, weight, bias = tensors(device)
    z = F.noisy_linear(v, weight, bias, torch.tensor([0.3], device=device), mode="multiplicative", seed=SEED)
    v, weight, bias = (t.cpu().double() for t in (v, weight, bias))
    eps = random.row_normals(5, 19, Stream(SEED, 2 << 32), dtype=DOUBLE)
    deviation = 0.3 * (v.square() @ weight.square().t()).sqrt()
    near(z, v @ weight.t() + bias + deviation * eps, TOLERANCE[torch.float32])


@pytest.mark.parametrize("tensor", [False, True])
def test_factorised_is_the_formula(path, device, tensor):
    v, weight, bias = tensors(device)
    sigma, bias_sigma = (torch.rand_like(weight), torch.rand_like(bias)) if tensor else (0.4, 0.3)
    z = F.noisy_linear(v, weight, bias, sigma, mode="factorised", bias_sigma=bias_sigma, seed=SEED)
    e_in, e_out = (
        x.sign() * x.abs().sqrt()
        for x in (
            random.row_normals(5, 37, Stream(SEED, 1 << 32), dtype=DOUBLE),
            random.row_normals(5, 19, Stream(SEED, 2 << 32), dtype=DOUBLE),
        )
    )
    v, weight, bias = (t.cpu().double() for t in (v, weight, bias))
    if tensor:
        sigma, bias_sigma = sigma.cpu().double(), bias_sigma.cpu().double()
    # The noisy weights themselves: what the layer never makes.
    noisy = weight + sigma * e_out[:, :, None] * e_in[:, None, :]
    expected = torch.einsum("bnk,bk->bn", noisy, v) + bias + bias_sigma * e_out
    near(z, expected, max(TOLERANCE[torch.float32], ROOTS))


@pytest.mark.usefixtures("aten")
@pytest.mark.parametrize("mode", ops.MODES)
def test_moments_are_those_of_noisy_weights(mode):
    """Mean and covariance of the sums, over 20,000 draws, within 6 standard errors."""
    count = 20_000
    torch.manual_seed(1)
    v, weight = torch.randn(1, 6, dtype=DOUBLE), torch.randn(3, 6, dtype=DOUBLE)
    z = F.noisy_linear(v.expand(count, -1), weight, None, 0.3, mode=mode)
    per_weight = 0.09 * (weight.square() if mode == "multiplicative" else torch.ones_like(weight))
    # E f(x)^2 = E |x| = sqrt(2 / pi)
    variance = (per_weight * v.square()).sum(1) * (2 / math.pi if mode == "factorised" else 1)
    mean = (v @ weight.t())[0]
    assert_close(z.mean(0), mean, rtol=0, atol=6 * (variance.max() / count).sqrt().item())
    # The variance of a normal's square is 2; that of a product of two factors, squared, below 1.5 * 1.5 / (2 / pi)^2.
    spread = {"factorised": 4.6}.get(mode, 2.0)
    assert_close(z.var(0), variance, rtol=6 * math.sqrt(spread / count), atol=0)
    correlation = torch.corrcoef(z.t()) - torch.eye(3)
    assert correlation.abs().max() < 6 / math.sqrt(count)


@pytest.mark.parametrize("mode", ops.MODES)
def test_examples_differ_and_manual_seed_brings_them_back(path, device, mode):
    v, weight, bias = tensors(device)
    v = v[:1].expand(5, -1)
    torch.manual_seed(3)
    first, second = (F.noisy_linear(v, weight, bias, 0.3, mode=mode) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(F.noisy_linear(v, weight, bias, 0.3, mode=mode), first)
    assert not torch.equal(first, second)
    assert len(first.unique(dim=0)) == 5


@pytest.mark.parametrize("mode", ops.MODES)
def test_any_rank_and_none(path, device, mode):
    v, weight, bias = tensors(device, 6)
    flat = F.noisy_linear(v, weight, bias, 0.3, mode=mode, seed=SEED)
    shaped = F.noisy_linear(v.view(2, 3, 1, 37), weight, bias, 0.3, mode=mode, seed=SEED)
    assert_close(shaped, flat.view(2, 3, 1, 19), rtol=0, atol=0)
    assert F.noisy_linear(v[0], weight, bias, 0.3, mode=mode).shape == (19,)
    assert F.noisy_linear(v[:0], weight, bias, 0.3, mode=mode).shape == (0, 19)
    empty = F.noisy_linear(v[:, :0], weight[:, :0], bias, 0.3, mode=mode)
    assert_close(empty, bias.expand(6, -1), rtol=0, atol=0)
    zero = torch.zeros_like(v).requires_grad_()
    z = F.noisy_linear(zero, weight, bias, 0.3, mode=mode, seed=SEED)
    assert_close(z, bias.expand(6, -1), rtol=0, atol=0)
    assert torch.autograd.grad(z.sum(), zero)[0].isfinite().all()


@pytest.mark.parametrize("mode", ops.MODES)
def test_derivatives(path, device, mode):
    v, weight, bias = tensors(device, 3, 2, 4, DOUBLE)
    more = torch.rand_like(weight) if mode == "factorised" else torch.tensor(0.3, dtype=DOUBLE, device=device)
    leaves = [t.requires_grad_() for t in (v, weight, bias, more)]

    def function(*inputs):
        return F.noisy_linear(*inputs, mode=mode, activation="silu", seed=SEED)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("activation", [None, "tanh", "silu"])
def test_second_derivatives_of_the_kernel(device, activation):
    def second(leaves):
        y = F.noisy_linear(*leaves, 0.3, activation=activation, seed=SEED)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(t.sum() for t in first), leaves)

    given = tensors(device, 3, 2, 4)
    exact = [t.cpu().double().requires_grad_() for t in given]
    for actual, target in zip(second([t.requires_grad_() for t in given]), second(exact), strict=True):
        near(actual, target, TOLERANCE[torch.float32])


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_opcheck(device, activation):
    x, y, before, dx = (torch.rand(3, 70, device=device) for _ in range(4))
    deviation, ddeviation = (torch.rand(3, device=device) for _ in range(2))
    rest = torch.tensor([SEED], device=device), activation
    operators = torch.ops.fastreg
    given = x, deviation, y, before if activation == "gelu" else None
    torch.library.opcheck(operators.row_noise.default, (*given, *rest))
    kept, dx = (None, None) if activation is None else (y, dx)
    torch.library.opcheck(operators.row_noise_backward.default, (x, kept, dx, ddeviation, *rest))
    if activation is not None:
        torch.library.opcheck(operators.row_noise_backward.default, (x, kept, dx, None, *rest))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "activation"), [*((mode, None) for mode in ops.MODES), ("additive", "silu")]
)
def test_one_graph_for_every_batch_size(path, device, mode, activation):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: F.noisy_linear(*a, 0.3, mode=mode, activation=activation, seed=SEED),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for examples in (5, 9):
            given = tensors(device, examples)
            leaves, twins = ([t.clone().requires_grad_() for t in given] for _ in range(2))
            found = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
            eager = F.noisy_linear(*twins, 0.3, mode=mode, activation=activation, seed=SEED)
            for actual, target in zip(found, torch.autograd.grad(eager.square().sum(), twins), strict=True):
                assert_close(actual, target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ops.MODES)
def test_vmap_takes_fresh_noise(mode):
    v, weight, bias = tensors("cpu")
    function = torch.func.vmap(
        lambda x: F.noisy_linear(x, weight, bias, 0.3, mode=mode), randomness="different"
    )
    z = function(v[:1].expand(4, 2, -1))
    assert len(z.flatten(0, 1).unique(dim=0)) == 8


@pytest.mark.usefixtures("aten")
def test_autocast():
    v, weight, bias = tensors("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        for mode in ops.MODES:
            assert F.noisy_linear(v, weight, bias, 0.3, mode=mode).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sample"}, "unknown mode 'sample': choose one of additive, multiplicative, factorised"),
        ({"sigma": -0.1}, "sigma has to be at least 0, but got -0.1"),
        ({"sigma": math.nan}, "sigma has to be at least 0, but got nan"),
        ({"bias_sigma": -1.0}, "bias_sigma has to be at least 0, but got -1.0"),
        ({"mode": "multiplicative", "bias_sigma": 0.1}, 'mode="multiplicative" has no bias_sigma'),
        ({"activation": "sine"}, "unknown activation 'sine'"),
        ({"sigma": torch.ones(2)}, r"sigma has to have one element, but got \(2,\)"),
        (
            {"sigma": torch.ones(3, 2), "mode": "factorised"},
            r"sigma has to have the shape \(3, 4\), but got \(3, 2\)",
        ),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        F.noisy_linear(torch.ones(2, 4), torch.ones(3, 4), **options)


@pytest.mark.parametrize(("v", "weight"), [((2, 5), (3, 4)), ((2, 4), (3,))])
def test_what_torchs_linear_refuses(path, v, weight):
    v, weight = torch.ones(v), torch.ones(weight)
    with pytest.raises(RuntimeError) as expected:
        torch.nn.functional.linear(v, weight, torch.ones(3))
    with pytest.raises(RuntimeError) as found:
        F.noisy_linear(v, weight, torch.ones(3))
    assert str(found.value) == str(expected.value)


# --- the layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_torchs_linear_in_evaluation(path, device, mode, learn, bias):
    layer = fnn.NoisyLinear(7, 5, bias, 0.5, mode=mode, learn_sigma=learn, device=device)
    assert isinstance(layer, torch.nn.Linear)
    x = torch.randn(3, 7, device=device)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert not torch.equal(layer(x), plain)
    assert_close(layer.eval()(x), plain, rtol=0, atol=0)
    with fastreg.mc_dropout(layer):
        assert not torch.equal(layer(x), layer(x))
    layer.train()
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    names = {"weight", *(["bias"] if bias else []), *(["sigma"] if learn else [])}
    names |= {"bias_sigma"} if learn and bias and mode == "factorised" else set()
    assert set(layer.state_dict()) == names
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert_close(twin(x), first, rtol=0, atol=0)


def test_layer_of_the_paper():
    layer = fnn.NoisyLinear(16, 500, sigma=0.5, mode="factorised")
    assert layer.sigma.shape == (500, 16)
    assert (layer.sigma == 0.125).all()
    assert (layer.bias_sigma == 0.125).all()
    assert 0.24 < layer.weight.abs().max() <= 0.25
    assert 0.24 < layer.bias.abs().max() <= 0.25
    assert "sigma=0.5, mode=factorised, learn_sigma=True" in repr(layer)
    with torch.no_grad():
        layer.sigma.zero_()
    layer.reset_parameters()
    assert (layer.sigma == 0.125).all()


# --- what weight noise does -------------------------------------------------------------------------------


@pytest.mark.usefixtures("aten")
def test_noise_on_the_input_of_a_linear_model_is_weight_decay():
    """E |y - W (x + e)|^2 = |y - W x|^2 + std^2 |W|^2, value and gradient (Bishop 1995).

    e and -e together, so that what is odd in e cancels exactly; what is left has a variance of the order of std^4.
    """
    torch.manual_seed(1)
    std, count = 0.3, 40_000
    weight = torch.randn(3, 5, dtype=DOUBLE, requires_grad=True)
    x, y = torch.randn(5, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    e = F.gaussian_noise(torch.zeros(count, 5, dtype=DOUBLE), std)
    noisy = torch.stack([y - (x + sign * e) @ weight.t() for sign in (1, -1)])
    loss = noisy.square().sum(-1).mean(0)
    expected = (y - weight @ x).square().sum() + std**2 * weight.square().sum()
    error = 6 * loss.detach().std().item() / math.sqrt(count)
    assert_close(loss.mean(), expected, rtol=0, atol=error)
    assert error < 0.05 * std**2 * weight.square().sum().item()  # the penalty stands well above the error
    (found,) = torch.autograd.grad(loss.mean(), weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, weight)
    # An element is 2 std^2 sum_j W_ij c_jk, c the sample's covariance over std^2, with deviations of sqrt(2 / count).
    bound = 6 * 2 * std**2 * weight.detach().norm(dim=1).max().item() * math.sqrt(2 / count)
    assert_close(found, wanted, rtol=0, atol=bound)


@pytest.mark.usefixtures("aten")
def test_the_minimum_with_input_noise_is_that_of_ridge_regression():
    torch.manual_seed(1)
    std, copies, n = 0.5, 4_000, 30
    x = torch.randn(n, 4, dtype=DOUBLE)
    y = x @ torch.randn(4, 1, dtype=DOUBLE) + 0.1 * torch.randn(n, 1, dtype=DOUBLE)
    noisy = F.gaussian_noise(x.repeat(copies, 1), std)
    found = torch.linalg.lstsq(noisy, y.repeat(copies, 1)).solution
    ridge = torch.linalg.solve(x.t() @ x + n * std**2 * torch.eye(4, dtype=DOUBLE), x.t() @ y)
    plain = torch.linalg.lstsq(x, y).solution
    # The noise in X^T X of 120,000 rows: below 1 % of what the ridge changes, with 6 standard errors to spare.
    assert (found - ridge).norm() < 0.1 * (plain - ridge).norm()


@pytest.mark.usefixtures("aten")
@pytest.mark.parametrize("mode", ["additive", "multiplicative"])
def test_weight_noise_penalizes_the_gradient_to_second_order(mode):
    """E L(W + sigma E) = L(W) + sigma^2 / 2 tr(H D) + O(sigma^4), D the noise's scale squared for each weight.

    For a squared error of f(W, x) = tanh(Wx): the trace is 2 sum |D^1/2 grad f|^2 + 2 sum (f - y) tr(D f''), and where
    the residual f - y is 0 the penalty is sigma^2 |grad f|^2, of the gradient alone (Goodfellow et al., Deep Learning,
    7.5). Halving sigma divides what is left by 16.
    """
    torch.manual_seed(1)
    x, weight = torch.randn(5, dtype=DOUBLE), torch.randn(3, 5, dtype=DOUBLE) / 3
    y = torch.tanh(weight @ x)  # no residual
    scale = weight.square() if mode == "multiplicative" else torch.ones_like(weight)
    gradient = (1 - y.square())[:, None] * x  # of output n with respect to row n
    penalty = (scale * gradient.square()).sum().item()
    count, left = 200_000, []
    for sigma in (0.2, 0.1):
        z = F.noisy_linear(x.expand(count, -1), weight, None, sigma, mode=mode, seed=SEED)
        loss = (torch.tanh(z) - y).square().sum(1)
        error = 6 * loss.std().item() / math.sqrt(count)
        left.append(loss.mean().item() - sigma**2 * penalty)
        assert abs(left[-1]) < 12 * sigma**4 * penalty * x.square().sum().item() + error
    assert abs(left[1]) < 0.15 * 0.1**2 * penalty  # the second order is nearly all of it

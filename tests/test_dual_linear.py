"""Two dense products of one layer: the kernels against the definition in fp64, with the same noise."""

import math

import pytest
import torch
from machine_option import bf16
from shared import near
from torch.testing import assert_close

from fastreg import random
from fastreg.ops.fused import ACTIVATIONS
from fastreg.ops.linear import dual_linear as ops
from fastreg.random import Stream

SEED = 0x123456789ABCDEF
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One rounding of an operand (for squares: to bf16, also of fp16 numbers), averaged over a sum. fp32: the normals, whose
# logarithm, sine and cosine are those of fp32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: bf16(1.6e-2)}
# The root in a factor makes 3e-4 of an error of 1e-7 in a normal close to 0.
ROOTS = 3e-4
KINDS = ("gaussian", "learned", "flipout", "factorised")


def inputs(device, kind, examples=5, outputs=19, inputs=37, dtype=torch.float32):
    """v, weight, bias, and what else the kind has."""
    v, weight, bias = (
        torch.randn(shape, device=device).to(dtype)
        for shape in ((examples, inputs), (outputs, inputs), (outputs,))
    )
    more = {
        "learned": lambda: [torch.tensor(0.7, device=device, dtype=dtype)],
        "factorised": lambda: [torch.randn_like(weight), torch.randn_like(bias)],
    }
    return [v, weight, bias, *more.get(kind, list)()]


def call(kind, v, weight, bias, *more, seed=SEED, activation=None):
    if kind == "factorised":
        return ops.factorised_linear(v, weight, more[0], bias, more[1], activation, seed)
    if kind == "flipout":
        return ops.flipout_linear(v, weight, bias, 0.8, activation, seed)
    return ops.gaussian_linear(v, weight, bias, 0.8, more[0] if more else 0.7, activation, seed)


def tolerance(dtype, kind=None):
    return max(TOLERANCE[dtype], ROOTS if kind == "factorised" else 0.0)


def agree(device, kind, dtype=torch.float32, activation=None, **sizes):
    given = inputs(device, kind, dtype=dtype, **sizes)
    exact = [t.detach().cpu().double().requires_grad_() for t in given]
    leaves = [t.requires_grad_() for t in given]
    z, expected = (call(kind, *t, activation=activation) for t in (leaves, exact))
    assert z.dtype == dtype
    dz = torch.randn(z.shape).to(dtype)
    found = torch.autograd.grad(z, leaves, dz.to(device))
    wanted = torch.autograd.grad(expected, exact, dz.double())
    for actual, target in zip((z, *found), (expected, *wanted), strict=True):
        assert actual.dtype == dtype
        near(actual, target, tolerance(dtype, kind), equal_nan=True)


@pytest.mark.smoke
@pytest.mark.executed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(path, device, kind, dtype):
    agree(device, kind, dtype)


@pytest.mark.executed
@pytest.mark.parametrize(
    ("kind", "activation"),
    [*(("gaussian", name) for name in ACTIVATIONS), *((k, n) for k in KINDS[1:] for n in ("relu", "gelu"))],
)
def test_activations(path, device, kind, activation, activation_passes):
    """It and its derivative run in passes that are there without it: on the kernels, ATen's is called nowhere."""
    leaves = [t.requires_grad_() for t in inputs(device, kind)]
    with activation_passes() as passes:
        call(kind, *leaves, activation=activation).sum().backward()
    assert bool(passes.names) == (path == "aten")
    agree(device, kind, activation=activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["elu", "gelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_16_bits(device, kind, activation, dtype):
    """As ATen's behind the same sums. Not against fp64: the sums are off by what TOLERANCE says, and f' with them."""
    given = inputs(device, kind, dtype=dtype)
    dy = torch.randn(5, 19, device=device).to(dtype)

    def results(function, leaves):
        y = function(leaves)
        return y, *torch.autograd.grad(y, leaves, dy)

    fused, behind = ([t.clone().requires_grad_() for t in given] for _ in range(2))
    fused = results(lambda leaves: call(kind, *leaves, activation=activation), fused)
    behind = results(lambda leaves: ACTIVATIONS[activation](call(kind, *leaves)), behind)
    for actual, target in zip(fused, behind, strict=True):
        assert actual.dtype == dtype
        near(actual, target.cpu().double(), tolerance(dtype), equal_nan=True)


@pytest.mark.parametrize(("examples", "outputs", "inputs"), [(70, 66, 130), (1, 1, 1), (17, 64, 64)])
@pytest.mark.parametrize("kind", ["gaussian", "flipout", "factorised"])
def test_shapes(device, kind, examples, outputs, inputs):
    agree(device, kind, examples=examples, outputs=outputs, inputs=inputs)


def test_the_noise_is_that_of_the_contract(path, device):
    v, weight, bias, sigma, bias_sigma = inputs(device, "factorised")
    stream = [Stream(SEED, use << 32) for use in range(3)]
    v, weight, bias, sigma, bias_sigma = (t.cpu().double() for t in (v, weight, bias, sigma, bias_sigma))

    def factors(rows, columns, use):
        x = random.row_normals(rows, columns, stream[use], dtype=torch.float64)
        return x.sign() * x.abs().sqrt()

    e_in, e_out = factors(5, 37, 1), factors(5, 19, 2)
    expected = v @ weight.t() + e_out * ((e_in * v) @ sigma.t() + bias_sigma) + bias
    given = [t.to(device, torch.float32) for t in (v, weight, bias, sigma, bias_sigma)]
    near(call("factorised", *given), expected, tolerance(torch.float32, "factorised"), equal_nan=True)

    signs = [
        random.signs(*size, s).double() for size, s in zip(((19, 37), (5, 37), (5, 19)), stream, strict=True)
    ]
    expected = 0.8 * (v @ weight.t() + signs[2] * ((signs[1] * v) @ (signs[0] * weight).t())) + bias
    near(call("flipout", *given[:3]), expected, tolerance(torch.float32), equal_nan=True)

    eps = random.row_normals(5, 19, stream[2], dtype=torch.float64)
    expected = 0.8 * v @ weight.t() + 0.7 * (v.square() @ weight.square().t()).sqrt() * eps + bias
    near(call("gaussian", *given[:3]), expected, tolerance(torch.float32), equal_nan=True)


def test_signs_and_normals_start_anew_in_each_row():
    """A row depends on neither its length nor on how many there are."""
    for draw in (random.signs, random.row_normals):
        large = draw(7, 21, Stream(5))
        assert_close(draw(3, 10, Stream(5)), large[:3, :10], rtol=0, atol=0)
        assert len(large.unique(dim=0)) == 7
    signs = random.signs(300, 300, Stream(1))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    for sample in (signs, signs[1:] * signs[:-1], signs[:, 1:] * signs[:, :-1]):
        assert abs(sample.mean()) < 6 / math.sqrt(sample.numel())  # 6 standard errors
    normals = random.row_normals(300, 300, Stream(1), dtype=torch.float64)
    assert abs(normals.mean()) < 6 / 300
    assert abs(normals.var() - 1) < 6 * math.sqrt(2) / 300


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_of_small_numbers(path, device, dtype):
    """1e-4 squared is no fp16 number."""
    v, weight = torch.full((3, 64), 1e-3), torch.full((5, 64), 1e-4)
    z = ops.gaussian_linear(v.to(device, dtype), weight.to(device, dtype), None, 0.0, 1e5, None, SEED)
    eps = random.row_normals(3, 5, Stream(SEED, 2 << 32), dtype=torch.float64)
    expected = 1e5 * 8 * v[0, 0].to(dtype).double() * weight[0, 0].to(dtype).double() * eps
    assert_close(z.cpu().double(), expected, rtol=TOLERANCE[dtype] * 4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_noise_where_there_is_no_variance(path, device, kind):
    v, weight, bias, *more = inputs(device, kind)
    v[0], weight[3] = 0.0, 0.0
    leaves = [t.requires_grad_() for t in (v, weight, bias, *more)]
    z = call(kind, *leaves)
    gradients = torch.autograd.grad(z.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if kind != "factorised":
        assert_close(z[0], bias.detach(), rtol=0, atol=0)
        assert_close(z[:, 3], bias[3].expand(5).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_spoils_its_example_alone(path, device, kind):
    v, *rest = inputs(device, kind)
    clean = call(kind, v, *rest)
    v[2, 1] = math.nan
    z = call(kind, v, *rest)
    assert z[2].isnan().all()
    others = [0, 1, 3, 4]
    assert_close(z[others], clean[others], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "activation"), [*((k, None) for k in KINDS), ("learned", "tanh"), ("factorised", "silu")]
)
def test_any_one_gradient(path, device, kind, activation):
    given = inputs(device, kind)
    exact = [t.cpu().double().requires_grad_() for t in given]
    dz = torch.randn(5, 19)
    wanted = torch.autograd.grad(call(kind, *exact, activation=activation), exact, dz.double())
    for index, target in enumerate(wanted):
        leaves = [t.clone().requires_grad_(i == index) for i, t in enumerate(given)]
        z = call(kind, *leaves, activation=activation)
        (gradient,) = torch.autograd.grad(z, leaves[index], dz.to(device))
        near(gradient, target, tolerance(torch.float32, kind), equal_nan=True)


def test_strides_seed_in_memory_and_activation(path, device):
    v, weight, bias = inputs(device, "gaussian")
    expected = call("gaussian", v, weight, bias).relu()
    strided = [v.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2]]
    assert not any(t.is_contiguous() for t in strided)
    seed = torch.tensor([SEED], device=device)
    assert_close(call("gaussian", *strided, seed=seed, activation="relu"), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(path, device, kind):
    leaves = [t.requires_grad_() for t in inputs(device, kind, 3, 2, 4, torch.float64)]
    function = lambda *inputs: call(kind, *inputs, activation="silu")  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("kind", "activation"), [*((k, None) for k in KINDS), ("learned", "tanh"), ("factorised", "gelu")]
)
def test_second_derivatives_of_the_kernels(device, kind, activation):
    """By way of the definition, with the same noise."""
    given = inputs(device, kind, 3, 2, 4)
    exact = [t.cpu().double().requires_grad_() for t in given]
    leaves = [t.requires_grad_() for t in given]

    def second(inputs):
        z = call(kind, *inputs, activation=activation)
        first = torch.autograd.grad(z.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(t.sum() for t in first), inputs)

    for actual, target in zip(second(leaves), second(exact), strict=True):
        # Sums of squares of what has the tolerance, with derivatives of a root in them.
        near(actual / 20, target / 20, tolerance(torch.float32, kind), equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "activation"), [("learned", None), ("learned", "gelu"), ("factorised", "relu")]
)
def test_opcheck(device, kind, activation):
    v, weight, bias, *more = inputs(device, kind)
    sigma, weight_sigma, bias_sigma = (*more, None, None) if kind == "learned" else (None, *more)
    number = ops.GAUSSIAN if kind == "learned" else ops.FACTORISED
    rest = torch.tensor([SEED], device=device), number, 1.0, 1.0, activation
    z, before, root, dz = (torch.rand(5, 19, device=device) for _ in range(4))
    written = z, before if activation == "gelu" else None, root if kind == "learned" else None
    operators, given = torch.ops.fastreg, (v, weight, bias, sigma, weight_sigma, bias_sigma)
    torch.library.opcheck(operators.dual_linear.default, (*given, *written, *rest))
    found = [None if t is None else torch.empty_like(t) for t in given[:-1]]
    kept = None if activation is None else before
    given = dz, v, weight, sigma, weight_sigma, written[2], kept
    torch.library.opcheck(operators.dual_linear_backward.default, (*given, *found, None, *rest))


def one_graph(device, kind, activation=None):
    torch._dynamo.reset()  # the code below is that of the other kinds too
    function = lambda *a: call(kind, *a, activation=activation)  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for examples in (5, 9):
            given = inputs(device, kind, examples)
            leaves, twins = ([t.clone().requires_grad_() for t in given] for _ in range(2))
            found = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
            wanted = torch.autograd.grad(function(*twins).square().sum(), twins)
            for actual, target in zip(found, wanted, strict=True):
                assert_close(actual, target, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_every_batch_size(path, device, kind):
    one_graph(device, kind)


@pytest.mark.parametrize(("kind", "activation"), [("learned", "silu"), ("flipout", "relu")])
def test_one_graph_with_an_activation(device, kind, activation):
    one_graph(device, kind, activation)


@pytest.mark.skipif(not ops.backend.HAS_TRITON, reason="needs Triton")
def test_tiles_are_large_where_there_are_enough_of_them():
    def launch(examples, outputs, dtype=torch.bfloat16):
        v, weight, z = (
            torch.empty(s, dtype=dtype, device="meta")
            for s in ((examples, 64), (outputs, 64), (examples, outputs))
        )
        rest = Stream(1), ops.Form(ops.FLIPOUT), "tf32x3"
        return ops.forward_launches(v, weight, None, None, None, None, z, None, None, *rest)[1]

    assert launch(256, 4096).arguments["plan"].rows == 128
    assert launch(128, 1024).arguments["plan"].rows == 64
    assert launch(256, 4096, torch.float32).arguments["plan"].rows == 64
    assert launch(3, 1024).arguments["plan"].examples == 16
    assert launch(1 << 22, 64).grid == (1 << 16,)

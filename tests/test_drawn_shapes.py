"""Every family on the kernels, forward and backward, at shapes that are drawn: against the definition in fp64.

Sizes run over all residues from 1 to 300. The interpreter refuses every access outside of the tensors of a launch
(``interpreter.py``), and memory that nothing was written to holds NaN. A sample runs always, the sweep of over ten
thousand cases with ``-m slow``.
"""

import contextlib
import functools
from unittest import mock

import pytest
import torch
from drawing import ACTIVATIONS, DTYPES, FLOATS, drawn, laid_out, layouts, shapes, sizes
from hypothesis import strategies as st
from machine_option import bf16
from shared import near

import fastreg
import fastreg.functional as F
import fastreg.optim
from fastreg.ops import backend, fused
from fastreg.ops.multi_tensor.averages import copy_if_, follow_

pytestmark = pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")

SAMPLE, SWEEP = 8, 1000
ELEMENTS = 20_000  # at most, of a tensor: seven programs or so

# Relative to the largest value, or to the sums that it comes from. 16-bit results are rounded once, and gradients of
# products of such numbers a few times; bf16 is truncated by the interpreter.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 8e-3, torch.bfloat16: bf16(6e-2)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def values(*shape: int, dtype: torch.dtype, order=None) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    return (x if order is None else laid_out(x, order)).to(DEVICE)


@st.composite
def tensors(draw, least: int = 1, most: int = 5, dtypes=DTYPES) -> torch.Tensor:
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    shape = draw(shapes(least, most, ELEMENTS))
    return values(*shape, dtype=draw(st.sampled_from(dtypes)), order=draw(layouts(len(shape))))


def like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Other values of the same shape and layout."""
    return torch.empty_like(x, dtype=dtype).copy_(torch.randn(x.shape, dtype=torch.float64))


def bends_not(function, inputs, tolerance: float) -> torch.Tensor | bool:
    """Where a relu in ``function`` is so far from its bend that its derivative is no matter of rounding."""
    arguments = []
    with (
        torch.no_grad(),
        mock.patch.object(backend, "runs_kernels", return_value=False),
        mock.patch.dict(fused.ACTIVATIONS, relu=lambda v: arguments.append(v) or v),
    ):
        function(*(None if t is None else t.double() for t in inputs))
    return arguments[0].abs() > tolerance * arguments[0].abs().max() if arguments else True


def check(function, *inputs: torch.Tensor | None, tolerance: float = 0.0) -> None:
    """``function`` on the kernels against itself in ATen and fp64; so are its gradients."""
    tolerance = max(tolerance, TOLERANCE[next(t.dtype for t in inputs if t is not None)])
    given = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*given)
    dy = like(y) * bends_not(function, inputs, tolerance)
    found = torch.autograd.grad(y, [t for t in given if t is not None], dy)
    expected = by_definition(function, inputs, dy)
    # A group of two close values is ill-conditioned: its gradients move far when the values do by one rounding.
    moved = by_definition(function, [None if t is None else one_rounding_away(t) for t in inputs], dy)
    for actual, reference, other in zip((y, *found), expected, moved, strict=True):
        near(actual, reference, tolerance, moves=(other - reference).abs().max().item())


def by_definition(function, inputs, dy: torch.Tensor) -> list[torch.Tensor]:
    """``function`` in ATen and fp64, and its gradients."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    with mock.patch.object(backend, "runs_kernels", return_value=False):
        y = function(*wide)
        return [y, *torch.autograd.grad(y, [t for t in wide if t is not None], dy.double())]


def one_rounding_away(x: torch.Tensor) -> torch.Tensor:
    """``x``, each value by one rounding of what the kernels compute in."""
    step = torch.finfo(fused.sum_dtype(x.dtype)).eps / 2
    return x.double() * (1 + step * torch.randn(x.shape, dtype=torch.float64, device=x.device).sign())


def around(data, x: torch.Tensor) -> tuple[str | None, torch.Tensor | None]:
    """An activation and a residual, or none."""
    residual = None
    if data.draw(st.booleans(), label="residual"):
        residual = like(x)
    return data.draw(st.sampled_from(ACTIVATIONS)), residual


def parameter(data, *shape: int, dtype: torch.dtype) -> torch.Tensor | None:
    return values(*shape, dtype=dtype) if data.draw(st.booleans()) else None


@drawn(SAMPLE, SWEEP)
def test_batch_norm(data):
    x = data.draw(tensors(least=2))
    if x.numel() < 2 * x.shape[1]:
        return
    activation, residual = around(data, x)
    weight, bias = (parameter(data, x.shape[1], dtype=x.dtype) for _ in range(2))
    given = (values(x.shape[1], dtype=x.dtype), values(x.shape[1], dtype=x.dtype).abs() + 0.1)
    training = data.draw(st.booleans())

    def run(x, residual, weight, bias):
        mean, var = (t.to(x.dtype) for t in given)
        return F.batch_norm(x, mean, var, weight, bias, training, activation=activation, residual=residual)

    check(run, x, residual, weight, bias)


@drawn(2 * SAMPLE, SWEEP)
def test_group_norm(data):
    x = data.draw(tensors(least=2))
    width, groups = data.draw(sizes(16)), data.draw(sizes(32))
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    shape = [x.shape[0], width * groups, *x.shape[2:]]
    while len(shape) > 2 and torch.Size(shape).numel() > ELEMENTS:
        shape[max(range(2, len(shape)), key=shape.__getitem__)] = data.draw(sizes(4))
    while torch.Size(shape).numel() > ELEMENTS:
        shape[0] = max(1, shape[0] // 2)
    x = values(*shape, dtype=x.dtype, order=order)
    if x.numel() == x.shape[0] * groups:
        return  # each value is normalized alone
    activation, residual = around(data, x)
    weight, bias = (parameter(data, x.shape[1], dtype=x.dtype) for _ in range(2))

    def run(x, residual, weight, bias):
        return F.group_norm(x, groups, weight, bias, activation=activation, residual=residual)

    check(run, x, residual, weight, bias)


@drawn(SAMPLE, SWEEP)
def test_layer_norm(data):
    x = data.draw(tensors())
    normalized = x.shape[-data.draw(st.integers(1, x.dim())) :]
    if normalized.numel() == 1:
        return
    activation, residual = around(data, x)
    weight, bias = (parameter(data, *normalized, dtype=x.dtype) for _ in range(2))
    if data.draw(st.booleans(), label="dropout"):

        def run(x, skip, weight, bias):
            return F.dropout_add_layer_norm(
                x, skip, normalized, weight, bias, p=0.3, activation=activation, seed=1
            )
    else:

        def run(x, residual, weight, bias):
            return F.layer_norm(x, normalized, weight, bias, activation=activation, residual=residual)

    check(run, x, residual, weight, bias)


@drawn(SAMPLE, SWEEP)
def test_dropout(data):
    x = data.draw(tensors())
    activation, residual = around(data, x)
    bias = None
    if data.draw(st.booleans(), label="bias"):
        dim = data.draw(st.integers(0, x.dim() - 1))
        bias = values(x.shape[dim], *[1] * (x.dim() - 1 - dim), dtype=x.dtype)
    function = data.draw(st.sampled_from([F.dropout, F.drop_path, F.dropout2d]))
    if function is F.dropout2d and x.dim() != 4:
        function = F.drop_path
    p = data.draw(st.sampled_from([0.1, 0.5]))

    def run(x, residual, bias):
        return function(x, p, True, bias=bias, activation=activation, residual=residual, seed=1)

    check(run, x, residual, bias)


@drawn(SAMPLE, SWEEP)
def test_local_response_norm(data):
    x = data.draw(tensors(least=3))
    size, beta = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([0.75, 0.5]))
    activation, residual = around(data, x)

    def run(x, residual):
        return F.local_response_norm(x, size, 0.1, beta, activation=activation, residual=residual)

    check(run, x, residual)


@drawn(SAMPLE, SWEEP)
def test_gaussian_noise(data):
    x = data.draw(tensors())
    mode = data.draw(st.sampled_from(["additive", "multiplicative"]))
    check(lambda x: F.gaussian_noise(x, mode=mode, seed=1), x, tolerance=1e-6)  # normals are fp32


def linear(data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Input, weight and bias."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    examples, outputs, inputs = data.draw(shapes(3, 3, 1 << 17))
    dtype = data.draw(st.sampled_from(FLOATS))
    weight = values(outputs, inputs, dtype=dtype) / inputs**0.5
    return values(examples, inputs, dtype=dtype), weight, parameter(data, outputs, dtype=dtype)


@drawn(SAMPLE, SWEEP)
def test_drop_connect_linear(data):
    operands = linear(data)
    mode = data.draw(st.sampled_from(["example", "group", "batch", "flipout", "gaussian"]))
    options = {"mode": mode, "seed": 1, "activation": data.draw(st.sampled_from(ACTIVATIONS))}
    if mode == "group":
        options["group_size"] = data.draw(sizes(100))
    check(lambda *operands: F.drop_connect_linear(*operands, **options), *operands)


@drawn(SAMPLE, SWEEP)
def test_expectation_of_drop_connect(data):
    operands = linear(data)
    samples = data.draw(st.one_of(st.none(), st.integers(1, 9)))

    def run(*operands):
        return F.drop_connect_linear(*operands, training=False, activation="tanh", samples=samples, seed=1)

    check(run, *operands)


@drawn(SAMPLE, SWEEP)
def test_noisy_linear(data):
    x, weight, bias = linear(data)
    mode = data.draw(st.sampled_from(["additive", "multiplicative", "factorised"]))
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    sigma = 0.1 * like(weight) if mode == "factorised" else None
    bias_sigma = None if sigma is None or bias is None else 0.1 * like(bias)

    def run(x, weight, bias, sigma, bias_sigma):
        if sigma is None:
            sigma = 0.1
        return F.noisy_linear(
            x, weight, bias, sigma, mode=mode, bias_sigma=bias_sigma, activation=activation, seed=1
        )

    check(run, x, weight, bias, sigma, bias_sigma)


# --- many tensors in one launch ---------------------------------------------------------------------------


@st.composite
def lists(draw) -> list[torch.Tensor]:
    """A few tensors of one dtype, some of them views that begin anywhere."""
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    dtype = draw(st.sampled_from(DTYPES))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        shape, start = draw(shapes(1, 3, ELEMENTS)), draw(st.integers(0, 3))
        x = values(start + torch.Size(shape).numel(), dtype=dtype)[start:].view(shape)
        found.append(laid_out(x, draw(layouts(len(shape)))) if start == 0 else x)
    return found


@contextlib.contextmanager
def touching(tensors: list[torch.Tensor]):
    """Tables of addresses point to these tensors alone."""
    if not backend.INTERPRETED:
        yield
        return
    from interpreter import memory

    with mock.patch.object(memory, "beside", tensors):
        yield


def stepped(make, tensors: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """The parameters after two steps."""
    params = [torch.nn.Parameter(t.clone()) for t in tensors]
    optimizer = make(params)
    for _ in range(2):
        for p, g in zip(params, gradients, strict=True):
            p.grad = like(p).copy_(g)
        grads = [p.grad for p in params]
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        if not state:  # made in the first step
            optimizer.step()
            continue
        with touching([*params, *grads, *state]):
            optimizer.step()
    return [p.detach() for p in params]


@drawn(SAMPLE, SWEEP)
def test_optimizers(data):
    tensors = data.draw(lists())
    gradients = [like(t) for t in tensors]
    # The squares of small gradients are no 16-bit numbers: what Adam makes of them there has no meaning.
    adam = ["Adam", "AdamW"] if tensors[0].element_size() > 2 else []
    name = data.draw(st.sampled_from(["SGD", "SGDW", *adam]))
    options = {"weight_decay": 0.1}
    if name in ("SGD", "SGDW"):
        options["momentum"] = 0.9
    for option, value in (("max_norm", 1.0), ("max_grad_norm", 1.0), ("l1", 0.01), ("ema_decay", 0.9)):
        if data.draw(st.booleans(), label=option):
            options[option] = value
    if "max_norm" in options:
        options["max_norm_dim"] = data.draw(st.sampled_from([None, 0]))
    make = functools.partial(getattr(fastreg.optim, name), lr=0.1, **options)
    found = stepped(make, tensors, gradients)
    with mock.patch.object(backend, "runs_kernels", return_value=False):
        expected = stepped(make, [t.double() for t in tensors], gradients)
    for actual, reference in zip(found, expected, strict=True):
        near(actual, reference, 4 * TOLERANCE[actual.dtype])


@drawn(SAMPLE, SWEEP)
def test_penalties(data):
    tensors = data.draw(lists())
    dim = data.draw(st.sampled_from([None, 0]))

    def run(*tensors):
        value = fastreg.penalties.elastic_net(tensors, 0.1, 0.2)
        gradients = torch.autograd.grad(value, tensors)
        with torch.no_grad():
            projected = [t.clone() for t in tensors]
            with touching(projected):
                fastreg.penalties.max_norm_(projected, 1.0, dim=dim)
        return [value / sum(t.numel() for t in tensors), *gradients, *projected]

    found = run(*[t.detach().requires_grad_() for t in tensors])
    with mock.patch.object(backend, "runs_kernels", return_value=False):
        expected = run(*[t.double().requires_grad_() for t in tensors])
    for actual, reference in zip(found, expected, strict=True):
        near(actual.detach(), reference.detach(), TOLERANCE[tensors[0].dtype])


@drawn(SAMPLE, SWEEP)
def test_averages(data):
    sources = data.draw(lists())
    targets = [like(t) for t in sources]
    expected = [0.9 * t.double() + 0.1 * s.double() for t, s in zip(targets, sources, strict=True)]
    with touching([*sources, *targets]):
        follow_(targets, sources, 0.9)
        for actual, reference in zip(targets, expected, strict=True):
            near(actual, reference, TOLERANCE[actual.dtype])
        copy_if_(targets, sources, torch.tensor(False, device=DEVICE))
        for actual, reference in zip(targets, expected, strict=True):
            near(actual, reference, TOLERANCE[actual.dtype])
        copy_if_(targets, sources, torch.tensor(True, device=DEVICE))
        assert all(torch.equal(t, s) for t, s in zip(targets, sources, strict=True))

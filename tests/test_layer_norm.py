"""Layer normalization against fp64 references: every fused form, layout and dtype, on the kernels and on ATen."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_option import bf16
from shared import assert_near, needs_gpu, saved_bytes

import fastreg.functional as F
import fastreg.nn as fnn
from fastreg import random
from fastreg.ops import backend, launch
from fastreg.ops.fused import ACTIVATIONS
from fastreg.ops.norms import layer_norm as ops
from fastreg.random import Stream

# Relative and absolute. fp32 and fp64 take sums of up to a thousand terms of about 1. 16-bit results are rounded once
# on the kernels, after every operation on ATen, and truncated to bf16 by the interpreter (one more unit in the last
# place).
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: bf16(3e-2),
}
DTYPES = list(TOLERANCE)
SEED = 20


def reference(x, shape, weight=None, bias=None, eps=1e-5, activation=None, residual=None):
    """The equation, in the dtype of x."""
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    y = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual
    return y if activation is None else ACTIVATIONS[activation](y)


def doubles(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def check(function, expected, tensors, dtype=None):
    """Results and all gradients of ``function(*tensors)`` equal those of ``expected`` on the tensors in fp64.

    Both return one tensor or several. dtype: the coarsest one involved.
    """
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    exact = doubles(tensors)
    results, references = function(*tensors), expected(*exact)
    if isinstance(results, torch.Tensor):
        results, references = (results,), (references,)
    dtype = dtype or tensors[0].dtype
    upstream = [torch.randn_like(y) for y in results]
    leaves = [t for t in tensors if t is not None]
    gradients = torch.autograd.grad(results, leaves, upstream)
    exact_gradients = torch.autograd.grad(
        references, [t for t in exact if t is not None], [dy.double() for dy in upstream]
    )
    for y, exact_y in zip(results, references, strict=True):
        assert_near(y, exact_y, TOLERANCE[dtype])
    for t, gradient, exact_gradient in zip(leaves, gradients, exact_gradients, strict=True):
        assert (gradient.dtype, gradient.shape) == (t.dtype, t.shape)
        assert_near(
            gradient, exact_gradient, TOLERANCE[dtype], terms=max(t.numel() for t in leaves) // t.numel()
        )
    return results


def check_layer_norm(x, shape, weight=None, bias=None, residual=None, activation=None, eps=1e-5, dtype=None):
    def function(x, weight, bias, residual):
        return F.layer_norm(x, shape, weight, bias, eps, activation=activation, residual=residual)

    def expected(x, weight, bias, residual):
        return reference(x, shape, weight, bias, eps, activation, residual)

    (y,) = check(function, expected, (x, weight, bias, residual), dtype)
    return y


def normal(shape, device, dtype=torch.float32):
    return torch.randn(shape, device=device, dtype=dtype)


def parameters(shape, device, dtype=torch.float32):
    return normal(shape, device, dtype), normal(shape, device, dtype)


@pytest.fixture
def new_plans():
    """Launches are worked out anew: with what a test changes, and afterwards without it."""
    launch.forget()
    yield
    launch.forget()


@pytest.fixture
def short_rows(monkeypatch, new_plans):
    """What is a long row on a GPU begins at 17 elements of fp32, in chunks of 16."""
    monkeypatch.setattr(ops, "ROW_BYTES", 64)
    monkeypatch.setattr(ops, "LONG_BLOCK", 16)


@pytest.fixture
def one_multiprocessor(monkeypatch, new_plans):
    """As few programs as possible, each with many blocks of rows."""
    monkeypatch.setattr(backend, "multiprocessors", lambda device: 1)


# --- layer_norm -------------------------------------------------------------------------------------------

SHAPES = [((5, 24), (24,)), ((3, 2, 5, 6), (5, 6)), ((7,), (7,))]


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "normalized"), SHAPES)
def test_fused_form_equals_fp64_reference(path, device, dtype, shape, normalized):
    x, residual = normal(shape, device, dtype), normal(shape, device, dtype)
    y = check_layer_norm(x, normalized, *parameters(normalized, device, dtype), residual, "gelu")
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_form_equals_torch(path, device, dtype):
    x = normal((4, 3, 40), device, dtype)
    y = check_layer_norm(x, (40,), *parameters((40,), device, dtype))
    expected = torch.nn.functional.layer_norm(x, (40,), x.new_zeros(40), x.new_zeros(40))
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(path, device, activation):
    x = normal((3, 24), device)
    check_layer_norm(x, (24,), *parameters((24,), device), activation=activation)


# Rows that fill a tile and that do not, that a vector divides and that none does, many in a block and few.
SIZES = [(9, 1), (3, 2), (300, 3), (1, 5), (5, 8), (130, 12), (17, 100), (3, 1030), (2, 769)]


@pytest.mark.executed
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_any_size(device, rows, columns):
    check_layer_norm(normal((rows, columns), device), (columns,), *parameters((columns,), device), eps=1e-2)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_any_rank_and_number_of_normalized_dimensions(path, device, rank):
    shape = (2, 3, 2, 4, 3)[:rank]
    for dims in range(1, rank + 1):
        check_layer_norm(normal(shape, device), shape[-dims:], *parameters(shape[-dims:], device))


def backward_launches(x, given, wanted, activation=None):
    """What the backward pass on the rows of ``x`` would launch."""
    like = {"weight": x[0], "bias": x[0], "dweight": x[0], "dbias": x[0]}
    names = "dy", "dh", "h", "weight", "bias", "residual", "statistics"
    names += "dx", "dskip", "dweight", "dbias", "dresidual"
    tensors = [like.get(name, x) if name in {"dy", "h", *given, *wanted} else None for name in names]
    return ops.backward_launches(*tensors, Stream(0), ops.Form(x.shape[1], 1e-5, x.dtype, activation))


@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize("columns", [100, 1024])
def test_a_program_walks_down_many_blocks_of_rows(device, columns):
    x = normal((2048 // columns * 9 + 1, columns), device)
    check_layer_norm(x, (columns,), *parameters((columns,), device), activation="silu")
    launches = backward_launches(x, ("weight", "bias"), ("dx", "dweight", "dbias"), "silu")
    programs, block_rows = launches[0].grid[0], launches[0].arguments["plan"].rows
    assert [launch.kernel.__name__ for launch in launches] == ["backward", "sum_partials"]
    assert programs * block_rows * 2 < len(x)


@pytest.mark.executed
@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("columns", [17, 32, 57])
def test_long_rows(device, columns):
    x, residual = normal((5, columns), device), normal((5, columns), device)
    form = ops.Form(columns, 1e-5, x.dtype)
    (forward,) = ops.forward_launches(x, None, None, None, None, x, None, x, Stream(0), form)
    assert forward.kernel is ops.kernels.forward_long
    check_layer_norm(x, (columns,), *parameters((columns,), device), residual, "gelu")
    check_layer_norm(normal((5, columns), device), (columns,))
    check_layer_norm(normal((5, columns), device, torch.float64), (columns,))


@pytest.mark.usefixtures("new_plans")
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_rows_that_fit_without_their_sums(device, monkeypatch, activation):
    monkeypatch.setattr(ops, "SUMMED_COLUMNS", 16)
    residual = None if activation is None else normal((70, 40), device)
    check_layer_norm(
        normal((70, 40), device), (40,), *parameters((40,), device), residual, activation=activation
    )


@needs_gpu
@pytest.mark.parametrize("columns", [4096, 8192, 16384, 20480, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_of_language_models(device, dtype, columns):
    x, residual = normal((300, columns), device, dtype), normal((300, columns), device, dtype)
    check_layer_norm(x, (columns,), *parameters((columns,), device, dtype), residual, "gelu")


@pytest.mark.slow
def test_more_rows_than_a_grid_dimension_of_cuda_allows(device):
    check_layer_norm(normal((70000, 1), device), (1,), *parameters((1,), device), eps=1.0)


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_parameters_are_optional(path, device, has_weight, has_bias, activation):
    weight, bias = parameters((12,), device)
    x = normal((6, 12), device)
    check_layer_norm(
        x, (12,), weight if has_weight else None, bias if has_bias else None, activation=activation
    )


@pytest.mark.parametrize("activation", [None, "tanh"])
def test_any_subset_of_gradients(path, device, activation):
    for subset in itertools.product([False, True], repeat=4):
        tensors = [normal(s, device) for s in ((6, 8), (8,), (8,), (6, 8))]
        exact = doubles(tensors)
        for t, wanted in zip(tensors, subset, strict=True):
            t.requires_grad_(wanted)
        y = F.layer_norm(tensors[0], (8,), *tensors[1:3], activation=activation, residual=tensors[3])
        assert y.requires_grad == any(subset)
        if not any(subset):
            continue
        dy = torch.randn_like(y)
        y.backward(dy)
        expected = reference(exact[0], (8,), *exact[1:3], 1e-5, activation, exact[3])
        gradients = torch.autograd.grad(expected, exact, dy.double())
        for t, gradient, wanted in zip(tensors, gradients, subset, strict=True):
            assert (t.grad is not None) == wanted
            if wanted:
                assert_near(t.grad, gradient, TOLERANCE[torch.float32], terms=6)


def test_frozen_tensors_cost_no_work(device):
    """What is not asked for is neither allocated nor launched."""
    x = normal((6, 8), device)

    def names(*wanted):
        return [launch.kernel.__name__ for launch in backward_launches(x, (), wanted)]

    assert names() == []
    assert names("dx") == ["backward"]
    assert names("dweight") == ["backward_columns", "sum_partials"]
    assert names("dx", "dweight", "dbias") == ["backward", "sum_partials"]


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(device, parameter_dtype):
    x = normal((6, 16), device, torch.bfloat16)
    residual = normal((6, 16), device)
    weight, bias = parameters((16,), device, parameter_dtype)
    y = check_layer_norm(x, (16,), weight, bias, residual, "relu", dtype=torch.bfloat16)
    assert y.dtype == torch.float32  # x and residual promote, parameters do not
    assert F.layer_norm(x, (16,), weight, bias).dtype == torch.bfloat16


def test_mixed_dtypes_that_torch_takes_on_a_cpu(path, device):
    x = normal((6, 16), device, torch.bfloat16)
    y = check_layer_norm(x, (16,), *parameters((16,), device))
    assert y.dtype == torch.bfloat16


def test_one_tensor_in_two_places(path, device):
    x = normal((6, 16), device).requires_grad_()
    dy = torch.randn_like(x)
    for create_graph in (False, True):
        y = F.layer_norm(x, (16,), activation="silu", residual=x)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=create_graph)
        (exact,) = doubles([x])
        expected = reference(exact, (16,), activation="silu", residual=exact)
        assert_near(dx, torch.autograd.grad(expected, exact, dy.double())[0], TOLERANCE[torch.float32])


# --- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("new_plans")
@pytest.mark.parametrize("mean", [1e3, 1e4])
@pytest.mark.parametrize("columns", [96, 769])
@pytest.mark.parametrize("long", [False, True])
def test_a_large_mean_keeps_the_variance(path, device, mean, columns, long, monkeypatch):
    if long:
        monkeypatch.setattr(ops, "ROW_BYTES", 64)
        monkeypatch.setattr(ops, "LONG_BLOCK", 128)
    x = normal((4, columns), device) + mean
    exact = x.double().requires_grad_()
    x.requires_grad_()
    y, expected = F.layer_norm(x, (columns,)), reference(exact, (columns,))
    # The mean is a rounded fp32 number, like the values themselves: that shifts a row by up to some ulps of it. Its
    # variance has to be far better: E[x^2] - E[x]^2 has a relative error of 0.1 at 1e3 and is negative at 1e4.
    ulp = torch.finfo(torch.float32).eps * mean
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=4 * ulp)
    spread, exact_spread = (t.double().std(1, unbiased=False) for t in (y, expected))
    torch.testing.assert_close(spread, exact_spread, rtol=0.1 * ulp if path == "kernels" else ulp, atol=0)
    dy = torch.randn_like(y)
    (dx,), (exact_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, exact, dy.double())
    torch.testing.assert_close(dx.double(), exact_dx, rtol=0, atol=16 * ulp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_constant_rows_are_zero_and_eps_decides(path, device, dtype):
    x = torch.full((3, 12), 100.0, device=device, dtype=dtype, requires_grad=True)
    y = F.layer_norm(x, (12,), eps=1e-2)
    assert (y == 0).all()
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = 10 * (dy.double() - dy.double().mean(1, keepdim=True))
    assert_near(dx, expected, TOLERANCE[dtype], terms=100)  # ten times as large as the others


@pytest.mark.executed
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("columns", [12, 40])
@pytest.mark.parametrize("long", [False, True])
def test_a_row_without_numbers_spoils_itself_alone(path, device, value, columns, long, request):
    if long:
        request.getfixturevalue("short_rows")
    x = normal((5, columns), device)
    clean, clean_dy = x.clone().requires_grad_(), normal((5, columns), device)
    x[2, 7] = value
    x.requires_grad_()
    y, expected = F.layer_norm(x, (columns,)), F.layer_norm(clean, (columns,))
    (dx,), (clean_dx,) = (
        torch.autograd.grad(out, leaf, clean_dy) for out, leaf in ((y, x), (expected, clean))
    )
    others = torch.tensor([0, 1, 3, 4], device=device)
    assert y[2].isnan().all()
    assert dx[2].isnan().any()
    torch.testing.assert_close(y[others], expected[others], rtol=0, atol=0)
    torch.testing.assert_close(dx[others], clean_dx[others], rtol=0, atol=0)


def test_rows_outside_the_tensor_count_nothing(device):
    """eps = 0 makes rstd infinite where a row of the tile is empty."""
    x = normal((3, 8), device)
    check_layer_norm(x, (8,), *parameters((8,), device), eps=0.0)


def test_gradients_are_the_same_bits_every_time(device):
    tensors = [t.requires_grad_() for t in (normal((300, 24), device), *parameters((24,), device))]
    dy = normal((300, 24), device)

    def gradients():
        return torch.autograd.grad(F.layer_norm(tensors[0], (24,), *tensors[1:]), tensors, dy)

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_no_normalized_copy_is_kept(device):
    x = normal((64, 32), device, torch.bfloat16).requires_grad_()
    weight, bias = (t.requires_grad_() for t in parameters((32,), device))
    size = saved_bytes(lambda: F.layer_norm(x, (32,), weight, bias, activation="gelu"))
    assert size == x.nbytes + weight.nbytes + bias.nbytes + 2 * 4 * len(x)
    size = saved_bytes(lambda: F.dropout_add_layer_norm(x, x, (32,), weight, bias, seed=1))
    assert size == x.nbytes + weight.nbytes + bias.nbytes + 2 * 4 * len(x)  # h has the size of x


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_form_equals_the_reference(data):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.float16]))
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    dims = data.draw(st.integers(1, len(shape)))
    normalized = tuple(shape[-dims:])
    affine = data.draw(st.sampled_from(list(itertools.product([True, False], repeat=2))))
    weight, bias = (
        t if wanted else None for t, wanted in zip(parameters(normalized, device, dtype), affine, strict=True)
    )
    scale = data.draw(st.sampled_from([0.1, 1.0, 10.0]))
    x = scale * normal(shape, device, dtype) + data.draw(st.sampled_from([0.0, 3.0]))
    if data.draw(st.booleans()):
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    residual = normal(shape, device, dtype) if data.draw(st.booleans()) else None
    # eps 1: rows of one or two elements would divide by a difference of nearly equal numbers
    check_layer_norm(
        x.detach(), normalized, weight, bias, residual, data.draw(st.sampled_from([None, "silu"])), 1.0
    )


# --- layouts ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns outside": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "rows sliced": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "offset": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_input(path, device, layout):
    x = LAYOUTS[layout](normal((2, 4, 3, 5), device)).detach()
    residual = LAYOUTS[layout](normal((2, 4, 3, 5), device)).detach()
    y = check_layer_norm(x, (3, 5), *parameters((3, 5), device), residual, "relu")
    assert y.is_contiguous() or path == "aten"  # there, the sum with the residual has its layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_gradient(path, device, layout):
    x = normal((2, 4, 3, 5), device).requires_grad_()
    dy = LAYOUTS[layout](normal((2, 4, 3, 5), device))
    y = F.layer_norm(x, (3, 5), activation="gelu")
    (dx,) = torch.autograd.grad(y, x, dy)
    (exact,) = doubles([x])
    expected = reference(exact, (3, 5), activation="gelu")
    assert_near(dx, torch.autograd.grad(expected, exact, dy.double())[0], TOLERANCE[torch.float32])


def test_parameters_of_any_layout(device):
    weight = normal((5, 3), device).t()
    check_layer_norm(normal((4, 3, 5), device), (3, 5), weight.detach(), normal((3, 5), device))


@pytest.mark.parametrize(("shape", "normalized"), [((0, 4), (4,)), ((3, 0), (0,)), ((2, 0, 3), (0, 3))])
def test_empty_tensors(path, device, shape, normalized):
    x = normal(shape, device).requires_grad_()
    weight, bias = (t.requires_grad_() for t in parameters(normalized, device))
    y = F.layer_norm(x, normalized, weight, bias, activation="gelu", residual=normal(shape, device))
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert (weight.grad == 0).all()
    assert (bias.grad == 0).all()
    y, h = F.dropout_add_layer_norm(x, x, normalized, weight, bias, prenorm=True)
    assert y.shape == h.shape == shape


# --- dropout_add_layer_norm -------------------------------------------------------------------------------


def mask_of(x, p):
    """The mask by the contract: elements count in memory order."""
    drawn = random.keep_mask((x.numel(),), p, Stream(SEED), x.device)
    return drawn.as_strided(x.shape, x.stride())


def seam_reference(x, skip, shape, weight, bias, p, keep, activation=None):
    kept = (random.LANE_VALUES - random.threshold(p)) / random.LANE_VALUES
    h = torch.where(keep, x, 0.0) / kept if keep is not None else x
    h = h if skip is None else h + skip
    return reference(h, shape, weight, bias, activation=activation), h


def check_seam(x, skip, shape, weight, bias, p=0.4, activation=None, dtype=None):
    keep = mask_of(x, p)

    def function(x, skip, weight, bias):
        return F.dropout_add_layer_norm(
            x, skip, shape, weight, bias, p=p, prenorm=True, activation=activation, seed=SEED
        )

    def expected(x, skip, weight, bias):
        return seam_reference(x, skip, shape, weight, bias, p, keep, activation)

    return check(function, expected, (x, skip, weight, bias), dtype)


@pytest.mark.smoke
@pytest.mark.executed
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [24, 7])
def test_seam_equals_fp64_reference(path, device, dtype, columns):
    x, skip = normal((2, 5, columns), device, dtype), normal((2, 5, columns), device, dtype)
    y, h = check_seam(x, skip, (columns,), *parameters((columns,), device, dtype))
    assert y.dtype == h.dtype == dtype


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_seam_without_a_residual(path, device, activation):
    check_seam(normal((6, 24), device), None, (24,), *parameters((24,), device), activation=activation)


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("columns", [32, 57])
def test_seam_of_long_rows(device, columns):
    x, skip = normal((3, columns), device), normal((3, columns), device)
    check_seam(x, skip, (columns,), *parameters((columns,), device), activation="silu")


@pytest.mark.parametrize("training", [True, False])
def test_seam_without_dropout(path, device, training):
    x, skip = normal((6, 24), device), normal((6, 24), device)

    def function(x, skip, weight, bias):
        p = 0.0 if training else 0.4
        return F.dropout_add_layer_norm(x, skip, (24,), weight, bias, 1e-5, p, training, prenorm=True)

    def expected(x, skip, weight, bias):
        return seam_reference(x, skip, (24,), weight, bias, 0.0, None)

    check(function, expected, (x, skip, *parameters((24,), device)))
    y, h = F.dropout_add_layer_norm(x, None, (24,), p=0.0, prenorm=True)
    assert h is x
    assert_near(y, reference(x.double(), (24,)), TOLERANCE[torch.float32])


def test_seam_drops_everything_at_p_1(path, device):
    x = torch.full((4, 8), math.nan, device=device, requires_grad=True)
    skip = normal((4, 8), device).requires_grad_()
    y, h = F.dropout_add_layer_norm(x, skip, (8,), p=1.0, prenorm=True)
    assert torch.equal(h, skip)
    assert_near(y, reference(skip.double(), (8,)), TOLERANCE[torch.float32])
    y.square().sum().backward()
    assert (x.grad == 0).all()
    assert skip.grad.isfinite().all()
    y, h = F.dropout_add_layer_norm(x, None, (8,), p=1.0, prenorm=True)
    assert (h == 0).all()
    assert (y == 0).all()


@pytest.mark.parametrize("used", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_seam_gradients_of_either_result(path, device, used, p):
    x, skip, weight = (normal(s, device).requires_grad_() for s in ((5, 16), (5, 16), (16,)))
    exact = doubles((x, skip, weight))
    dy, dh = normal((5, 16), device), normal((5, 16), device)
    keep = mask_of(x, p) if p else None

    def loss(results):
        parts = [
            (result * upstream.to(result.dtype)).sum()
            for result, upstream, use in zip(results, (dy, dh), used, strict=True)
            if use
        ]
        return sum(parts)

    ours = loss(F.dropout_add_layer_norm(x, skip, (16,), weight, p=p, prenorm=True, seed=SEED))
    theirs = loss(seam_reference(exact[0], exact[1], (16,), exact[2], None, p, keep))
    gradients = torch.autograd.grad(ours, (x, skip, weight), allow_unused=True)
    expected = torch.autograd.grad(theirs, exact, allow_unused=True)
    for gradient, exact_gradient in zip(gradients, expected, strict=True):
        if exact_gradient is None:
            assert gradient is None or (gradient == 0).all()
        else:
            assert_near(gradient, exact_gradient, TOLERANCE[torch.float32], terms=5)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("subset", list(itertools.product([False, True], repeat=2)))
def test_seam_any_subset_of_gradients(path, device, p, subset):
    x, skip = (normal((5, 16), device).requires_grad_(wanted) for wanted in subset)
    weight = normal((16,), device).requires_grad_()
    exact = doubles((x, skip, weight))
    y = F.dropout_add_layer_norm(x, skip, (16,), weight, p=p, seed=SEED)
    expected, _ = seam_reference(exact[0], exact[1], (16,), exact[2], None, p, mask_of(x, p) if p else None)
    dy = torch.randn_like(y)
    y.backward(dy)
    gradients = torch.autograd.grad(expected, exact, dy.double())
    for t, gradient, wanted in zip((x, skip, weight), gradients, (*subset, True), strict=True):
        assert (t.grad is not None) == wanted
        if wanted:
            assert_near(t.grad, gradient, TOLERANCE[torch.float32], terms=5)


def test_seam_keeps_a_residual_stream_in_fp32(path, device):
    x, skip = normal((6, 16), device, torch.bfloat16), normal((6, 16), device)
    y, h = check_seam(x, skip, (16,), *parameters((16,), device), dtype=torch.bfloat16)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    kept = random.LANE_VALUES / (random.LANE_VALUES - random.threshold(0.4))
    expected = torch.where(mask_of(x, 0.4), x.double(), 0.0) * kept + skip
    torch.testing.assert_close(
        h.double(), expected, rtol=1e-2 if path == "aten" else 1e-6, atol=1e-2 if path == "aten" else 1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_seam_normalizes_the_very_numbers_that_it_returns(device, dtype):
    """And not what they were before they were rounded: backward knows only these."""
    x, skip = normal((6, 24), device, dtype), normal((6, 24), device, dtype)
    y, h = F.dropout_add_layer_norm(x, skip, (24,), prenorm=True, seed=SEED)
    assert torch.equal(y, F.layer_norm(h, (24,)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_seam_mask_follows_memory_in_any_layout(path, device, layout):
    if layout in ("expanded", "sliced", "rows sliced"):
        pytest.skip("not dense: which elements count where is said by the test of dropout")
    x = LAYOUTS[layout](normal((2, 4, 3, 5), device)).detach()
    skip = normal((2, 4, 3, 5), device)
    check_seam(x, skip, (5,), *parameters((5,), device))


def test_seam_draws_as_dropout_does(path, device):
    x, skip = normal((64, 8), device), normal((64, 8), device)
    torch.manual_seed(7)
    first, second = (F.dropout_add_layer_norm(x, skip, (8,), prenorm=True)[1] for _ in range(2))
    torch.manual_seed(7)
    again = F.dropout(x, residual=skip)
    torch.testing.assert_close(first, again, rtol=1e-6, atol=1e-6)
    assert not first.equal(second)
    generator = torch.Generator(device).manual_seed(7)
    state = torch.get_rng_state()
    first, second = (F.dropout_add_layer_norm(x, None, (8,), generator=generator) for _ in range(2))
    assert torch.get_rng_state().equal(state)
    assert not first.equal(second)
    tensor_seed = torch.tensor([SEED], device=device)
    seeded = [F.dropout_add_layer_norm(x, None, (8,), seed=seed) for seed in (SEED, tensor_seed)]
    assert seeded[0].equal(seeded[1])


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_seam_refuses_what_is_no_probability(path, device, p):
    x = normal((2, 8), device)
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        F.dropout_add_layer_norm(x, x, (8,), p=p)
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        fnn.DropoutAddLayerNorm(8, p=p)


# --- what does not fit ------------------------------------------------------------------------------------


def test_unknown_activation_and_wrong_residual_are_refused(path, device):
    x = normal((2, 8), device)
    for function in (
        F.layer_norm,
        lambda x, shape, **fused: F.dropout_add_layer_norm(x, None, shape, **fused),
    ):
        with pytest.raises(ValueError, match="unknown activation 'swish'"):
            function(x, (8,), activation="swish")
    with pytest.raises(ValueError, match="residual has to have the shape of the input"):
        F.layer_norm(x, (8,), residual=x[:1])
    with pytest.raises(ValueError, match="skip has to have the shape of the input"):
        F.dropout_add_layer_norm(x, x[:1], (8,))


@needs_gpu
def test_small_tensors_go_to_aten(monkeypatch, device):
    monkeypatch.setattr(ops, "apply", None)
    F.layer_norm(normal((2, 8), device), (8,))


@needs_gpu
def test_autocast_on_a_gpu_gives_fp32_from_16_bits(device):
    layer = fnn.LayerNorm(4096, device=device)
    x = normal((512, 4096), device, torch.bfloat16).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y, expected = layer(x), torch.nn.functional.layer_norm(x, (4096,), layer.weight, layer.bias)
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_fp32_result_of_a_16_bit_input(device, monkeypatch):
    """What autocast asks for on a GPU: the input is read in 16 bits, nothing else is rounded."""
    monkeypatch.setattr(ops, "autocast_dtype", lambda input: torch.float32)
    x = normal((6, 16), device, torch.bfloat16)
    weight, bias = parameters((16,), device)
    y = F.layer_norm(x, (16,), weight, bias)
    assert y.dtype == torch.float32
    assert_near(y, reference(x.double(), (16,), weight.double(), bias.double()), TOLERANCE[torch.float32])
    check_layer_norm(x, (16,), weight, bias, activation="gelu", dtype=torch.bfloat16)


# --- modules ----------------------------------------------------------------------------------------------

MODULES = {
    "LayerNorm": lambda: fnn.LayerNorm((3, 4), activation="gelu"),
    "DropoutAddLayerNorm": lambda: fnn.DropoutAddLayerNorm((3, 4), p=0.25, prenorm=True, activation="gelu"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_survive_copy_and_pickle(path, device, name):
    layer = MODULES[name]().to(device)
    torch.nn.init.normal_(layer.weight)
    x = normal((2, 3, 4), device)
    torch.manual_seed(3)
    other = {"skip" if name == "DropoutAddLayerNorm" else "residual": x}
    expected = layer(x, **other)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (type(twin), repr(twin)) == (type(layer), repr(layer))
        torch.manual_seed(3)
        torch.testing.assert_close(twin(x, **other), expected, rtol=0, atol=0)
    stock = torch.nn.LayerNorm((3, 4), device=device)
    assert list(stock.state_dict()) == list(layer.state_dict())
    stock.load_state_dict(layer.state_dict())
    assert isinstance(layer, torch.nn.LayerNorm)


def test_seam_module_is_the_function(path, device):
    layer = fnn.DropoutAddLayerNorm(8, 1e-3, bias=False, p=0.25, activation="silu").to(device)
    x, skip = normal((6, 8), device), normal((6, 8), device)
    torch.manual_seed(3)
    y = layer(x, skip)
    torch.manual_seed(3)
    expected = F.dropout_add_layer_norm(
        x, skip, (8,), layer.weight, None, 1e-3, 0.25, True, activation="silu"
    )
    assert torch.equal(y, expected)
    layer.eval()
    expected = reference((x + skip).double(), (8,), eps=1e-3, activation="silu")
    assert_near(layer(x, skip), expected, TOLERANCE[torch.float32])
    stock = torch.nn.LayerNorm(8, 1e-3, bias=False).extra_repr()  # says more in newer versions of torch
    assert repr(layer) == f"DropoutAddLayerNorm({stock}, activation=silu, p=0.25, prenorm=False)"

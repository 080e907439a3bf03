"""Dropout against fp64 references: every fused form, layout and dtype, on the kernels and on ATen."""

import gc
import itertools
import math
import weakref

import machine_option
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_option import bf16
from shared import assert_near, needs_gpu, saved_bytes

import fastreg
import fastreg.functional as F
import fastreg.nn as fnn
from fastreg import random
from fastreg.ops import backend, layout
from fastreg.ops import dropout as ops
from fastreg.random import Stream

# Relative and absolute. fp32 is computed in fp32; 16-bit results are rounded once on the kernels, after every
# operation on ATen, and truncated to bf16 by the interpreter (one more unit in the last place).
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 2e-3,
    torch.bfloat16: bf16(2e-2),
}
DTYPES = list(TOLERANCE)


def mask_of(x, p, seed):
    """The mask of an elementwise dropout by the contract: elements count in memory order."""
    flat = random.keep_mask((x.numel(),), p, Stream(seed), x.device)
    return flat.as_strided(x.shape, layout.dense_strides(x))


def reference(x, keep, p, bias=None, activation=None, residual=None):
    v = x if bias is None else x + bias
    v = v if activation is None else ops.ACTIVATIONS[activation](v)
    kept = (random.LANE_VALUES - random.threshold(p)) / random.LANE_VALUES
    y = torch.where(keep, v, 0.0) / kept
    return y if residual is None else y + residual


def check(x, keep, p, dropout, bias=None, activation=None, residual=None):
    """Result and all gradients of ``dropout`` equal those of the reference in fp64."""
    inputs = [t for t in (x, bias, residual) if t is not None]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, bias, residual)]
    for t in inputs:
        t.requires_grad_()
    y = dropout(x, bias=bias, activation=activation, residual=residual)
    expected = reference(exact[0], keep, p, exact[1], activation, exact[2])
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, dy)
    expected_gradients = torch.autograd.grad(expected, [t for t in exact if t is not None], dy.double())
    assert_near(y, expected, TOLERANCE[x.dtype])
    for t, gradient, exact_gradient in zip(inputs, gradients, expected_gradients, strict=True):
        assert gradient.dtype == t.dtype
        assert gradient.shape == t.shape
        assert_near(gradient, exact_gradient, TOLERANCE[x.dtype], terms=x.numel() // t.numel())
    return y


# --- the fused forms --------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "bias_shape"), [((5, 77), None), ((9, 40), (40,)), ((2, 6, 3, 5), (6, 1, 1))]
)
def test_fused_form_equals_fp64_reference(path, device, dtype, shape, bias_shape):
    x = torch.randn(shape, dtype=dtype, device=device)
    bias = None if bias_shape is None else torch.randn(bias_shape, dtype=dtype, device=device)
    residual = torch.randn_like(x)
    check(
        x,
        mask_of(x, 0.3, 11),
        0.3,
        lambda x, **fused: F.dropout(x, 0.3, seed=11, **fused),
        bias,
        "gelu",
        residual,
    )


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_every_activation(path, device, activation):
    x = torch.randn(7, 24, device=device)
    bias = torch.randn(24, device=device)
    check(x, mask_of(x, 0.5, 3), 0.5, lambda x, **fused: F.dropout(x, 0.5, seed=3, **fused), bias, activation)


# Biases along each dimension, at sizes that leave vectors of 8, 4, 2 and 1 elements and partly filled tiles.
BIASED = [
    ((3, 16), (16,)),
    ((130, 12), (12,)),
    ((5, 1030), (1030,)),
    ((37, 7), (7,)),
    ((6, 10), (6, 1)),
    ((3, 4, 50), (4, 1)),
    ((3, 4, 6, 6), (3, 1, 1, 1)),
    ((2, 3, 4, 5), (5,)),
    ((4, 5, 2), ()),
    ((4, 3), (1, 1)),
    ((1, 1), (1,)),
    ((9,), (9,)),
]


@pytest.mark.parametrize(("shape", "bias_shape"), BIASED)
def test_bias_along_any_dimension(device, shape, bias_shape):
    x, bias = torch.randn(shape, device=device), torch.randn(bias_shape, device=device)
    check(x, mask_of(x, 0.25, 5), 0.25, lambda x, **fused: F.dropout(x, 0.25, seed=5, **fused), bias, "silu")


@pytest.mark.parametrize("subset", list(itertools.product([False, True], repeat=3)))
def test_any_subset_of_gradients(path, device, subset):
    x, bias, residual = (torch.randn(s, device=device) for s in ((6, 8), (8,), (6, 8)))
    tensors = (x, bias, residual)
    for tensor, wanted in zip(tensors, subset, strict=True):
        tensor.requires_grad_(wanted)
    y = F.dropout(x, 0.5, bias=bias, activation="tanh", residual=residual, seed=1)
    assert y.requires_grad == any(subset)
    if any(subset):
        y.backward(torch.ones_like(y))
    assert tuple(t.grad is not None for t in tensors) == subset


def test_frozen_activation_input_still_gives_the_bias_gradient(device):
    x, bias = torch.randn(33, 8, device=device), torch.randn(8, device=device, requires_grad=True)
    F.dropout(x, 0.5, bias=bias, seed=1).sum().backward()
    kept = mask_of(x, 0.5, 1).sum(0) * 2.0
    torch.testing.assert_close(bias.grad, kept)  # sums of small integers: exact


def test_bias_gradient_is_the_same_bits_every_time(device):
    x, bias = torch.randn(70, 24, device=device), torch.randn(24, device=device, requires_grad=True)
    dy = torch.randn_like(x)

    def gradient():
        return torch.autograd.grad(F.dropout(x, 0.1, bias=bias, activation="gelu", seed=2), bias, dy)[0]

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(3))


@pytest.mark.executed
def test_mixed_dtypes(path, device):
    x = torch.randn(6, 16, dtype=torch.bfloat16, device=device, requires_grad=True)
    bias = torch.randn(16, device=device, requires_grad=True)
    residual = torch.randn(6, 16, device=device, requires_grad=True)
    y = F.dropout(x, 0.5, bias=bias, residual=residual, seed=4)
    assert y.dtype == torch.float32  # x and residual promote, a bias is a parameter and does not
    assert F.dropout(x, 0.5, bias=bias, seed=4).dtype == torch.bfloat16
    y.sum().backward()
    assert [t.grad.dtype for t in (x, bias, residual)] == [torch.bfloat16, torch.float32, torch.float32]
    assert_near(
        y,
        reference(x.double(), mask_of(x, 0.5, 4), 0.5, bias.double(), None, residual.double()),
        TOLERANCE[x.dtype],
    )


# --- layouts ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 8, 3, 5),
    "channels_last": lambda: torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last),
    "channels_last, one sample": lambda: torch.randn(1, 8, 3, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 4, 3, 2, 5).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.randn(5, 3, 8, 2).permute(3, 2, 1, 0),
    "samples inside": lambda: torch.randn(8, 3, 5, 2).permute(3, 0, 1, 2),
    "sliced": lambda: torch.randn(2, 8, 3, 10)[..., ::2],
    "expanded": lambda: torch.randn(2, 8, 1, 5).expand(2, 8, 3, 5),
    "offset": lambda: torch.randn(2 * 8 * 3 * 5 + 1)[1:].view(2, 8, 3, 5),
    "six dimensions": lambda: torch.randn(2, 3, 1, 2, 1, 4),
    "number": lambda: torch.randn(()),
    "one element": lambda: torch.randn(1),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_kept_and_the_mask_follows_memory(path, device, name):
    x = LAYOUTS[name]().to(device)
    keep = mask_of(x, 0.4, 8)
    y = check(
        x.detach(), keep, 0.4, lambda x, **fused: F.dropout(x, 0.4, seed=8, **fused), None, "relu", None
    )
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dy_layout", ["transposed", "expanded", "channels_last"])
def test_backward_uses_the_layout_of_forward(path, device, dy_layout):
    x = torch.randn(2, 8, 3, 5, device=device, requires_grad=True)
    y = F.dropout(x, 0.5, seed=6)
    dy = LAYOUTS[dy_layout]().to(device)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, torch.where(mask_of(x, 0.5, 6), 2 * dy, 0.0))


@pytest.mark.executed
@pytest.mark.parametrize(
    "name", ["contiguous", "channels_last", "channels_last, one sample", "samples inside", "sliced"]
)
@pytest.mark.parametrize("bias_dim", [None, 0, 1, 3])
def test_channel_masks_in_every_layout(path, device, name, bias_dim):
    x = LAYOUTS[name]().to(device)
    bias = None
    if bias_dim is not None:
        shape = [1] * 4
        shape[bias_dim] = x.shape[bias_dim]
        bias = torch.randn(shape, device=device)
    channel_keep = random.keep_mask(x.shape[:2], 0.5, Stream(7), device)[:, :, None, None]
    check(
        x.detach(),
        channel_keep,
        0.5,
        lambda x, **fused: F.dropout2d(x, 0.5, seed=7, **fused),
        bias,
        "relu",
        None,
    )
    sample_keep = random.keep_mask(x.shape[:1], 0.5, Stream(7), device)[:, None, None, None]
    check(
        x.detach(), sample_keep, 0.5, lambda x, **fused: F.drop_path(x, 0.5, seed=7, **fused), bias, None,
        torch.randn_like(x),
    )  # fmt: skip


@pytest.fixture
def elements_read(monkeypatch):
    """Counts the elements of fp32 that kernels have read since it was last called."""
    if machine := machine_option.MACHINE:
        monkeypatch.setattr(machine, "keeps", True)

        def count() -> int:
            number = sum(launched.touched[0] for launched in machine.launched) // 4
            machine.launched.clear()
            return number

    else:
        from triton.runtime.interpreter import InterpreterBuilder

        read = []
        load = InterpreterBuilder.create_masked_load

        def counting_load(self, pointers, mask, *rest):
            read.append(int(mask.data.sum()))
            return load(self, pointers, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)

        def count() -> int:
            number = sum(read)
            read.clear()
            return number

    count()
    return count


@pytest.mark.skipif(not backend.INTERPRETED, reason="counts what the interpreter, or the machine, loads")
@pytest.mark.parametrize(("function", "mask_dims"), [(F.dropout, 0), (F.dropout2d, 2), (F.drop_path, 1)])
def test_dropped_channels_and_samples_are_not_read(function, mask_dims, elements_read):
    x = torch.randn(8, 4, 8, 16, requires_grad=True)
    y = function(x, 0.5, seed=2)
    kept = (
        int(y.detach().flatten(mask_dims).any(-1).sum()) * x[(0,) * mask_dims].numel() if mask_dims else 4096
    )
    assert 0 < kept < 4096 or mask_dims == 0
    assert elements_read() == kept
    y.backward(torch.ones_like(y))
    assert elements_read() == kept


def test_unbatched_channels(path, device):
    for function, shape in ((F.dropout1d, (16, 9)), (F.dropout3d, (16, 2, 3, 2))):
        x = torch.rand(shape, device=device) + 1
        y = function(x, 0.5, seed=1)
        kept = random.keep_mask((16,), 0.5, Stream(1), device)
        assert torch.equal(y.flatten(1)[:, 0] != 0, kept)
        torch.testing.assert_close(y[kept], 2 * x[kept])
        residual = torch.ones_like(x)
        torch.testing.assert_close(function(x, 0.5, seed=1, residual=residual), y + 1)


@pytest.mark.parametrize("function", [F.dropout, F.dropout2d, F.drop_path, F.alpha_dropout])
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2)])
def test_empty(path, device, function, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    y = function(x, 0.5, True, seed=1, residual=x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_empty_bias_gradient_is_zero(path, device):
    x, bias = torch.randn(0, 4, device=device), torch.randn(4, device=device, requires_grad=True)
    F.dropout(x, 0.5, bias=bias, activation="gelu", seed=1).sum().backward()
    assert torch.equal(bias.grad, torch.zeros(4, device=device))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    mask_dims=st.integers(0, 2),
    bias_dim=st.one_of(st.none(), st.integers(0, 4)),
)
def test_tiling_names_the_right_lane_and_bias_for_every_element(sizes, order, mask_dims, bias_dim):
    """The index arithmetic of the kernels, done by brute force on the planned tiling."""
    dims = list(range(len(sizes)))
    order.shuffle(dims)
    x = torch.empty([sizes[d] for d in dims]).permute([dims.index(d) for d in range(len(sizes))])
    mask_dims = min(mask_dims, x.dim())
    bias_dim = bias_dim if bias_dim is not None and bias_dim < x.dim() else None
    tiles = layout.tiling(x, mask_dims, bias_dim)
    if tiles is None:  # mixed up: the operation makes it contiguous, and that can always be tiled
        x = x.contiguous()
        tiles = layout.tiling(x, mask_dims, bias_dim)
    coordinates = torch.cartesian_prod(*[torch.arange(s) for s in x.shape]).view(-1, x.dim())
    element = (coordinates * torch.tensor(x.stride())).sum(1)
    rows = tiles.rows or 1
    assert rows * tiles.columns == x.numel()
    row, column = element // tiles.columns, element % tiles.columns
    lane = row // tiles.mask_repeat
    if tiles.mask == "element":
        lane = lane * tiles.columns + column
    if mask_dims:
        leading = torch.arange(math.prod(x.shape[:mask_dims])).view(x.shape[:mask_dims])
        expected = leading[tuple(coordinates[:, d] for d in range(mask_dims))]
    else:
        expected = element
    assert torch.equal(lane, expected)
    if bias_dim is not None:
        index = column if tiles.bias == "columns" else row // tiles.bias_repeat % tiles.bias_size
        assert torch.equal(index, coordinates[:, bias_dim])
        assert tiles.bias_size == x.shape[bias_dim]


def test_rows_of_a_convolution_are_its_planes():
    """Once the rows of a biased image were single elements: right, and six times the instructions."""
    x = torch.empty(4, 8, 16, 16)
    assert layout.tiling(x, 0, 1).columns == 256
    assert layout.tiling(x.to(memory_format=torch.channels_last), 0, 1)[:2] == (1024, 8)


def test_wide_indices_give_the_same_result(device):
    for shape, bias_dim in (((3, 1029), None), ((6, 40), 1), ((6, 40), 0)):
        x = torch.randn(shape, device=device)
        bias = None if bias_dim is None else torch.randn(shape[bias_dim], device=device)
        form = ops.form_for(0.3)._replace(bias_dim=bias_dim)
        results = []
        for wide in (False, True):
            y, dx = torch.empty_like(x), torch.empty_like(x)
            (launch,) = ops.forward_launches(x, bias, None, y, Stream(3), form)
            back, *_ = ops.backward_launches(x, None, None, dx, Stream(3), form, bias)
            for each in (launch, back):
                each.arguments["plan"] = each.arguments["plan"]._replace(wide=wide)
                each.run(device)
            results.append((y, dx, back.arguments["tensors"].partial))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True) if a is not None)


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_are_dropped_to_zero(path, device, dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf] * 40, dtype=dtype, device=device, requires_grad=True)
    y = F.dropout(x, 0.5, seed=1)
    keep = mask_of(x, 0.5, 1)
    assert torch.equal(y[~keep], torch.zeros_like(y[~keep]))
    assert not y[keep].isfinite().any()
    activation = "gelu" if path == "kernels" else None  # on ATen, autograd multiplies the 0 by gelu'(NaN)
    (dx,) = torch.autograd.grad(F.dropout(x, 0.5, activation=activation, seed=1), x, torch.ones_like(x))
    assert torch.equal(dx[~keep], torch.zeros_like(dx[~keep]))


@pytest.mark.parametrize(
    "function", [F.dropout, F.dropout2d, F.drop_path, F.alpha_dropout, F.feature_alpha_dropout]
)
@pytest.mark.parametrize("p", [0.0, 1.0, 1e-7, 1 - 1e-7])
def test_the_ends_of_p(path, device, function, p):
    x = torch.randn(3, 4, 2, 2, device=device)
    x[0, 0, 0, 0] = math.nan
    x.requires_grad_()
    y = function(x, p, True, seed=1)
    (dx,) = torch.autograd.grad(y.sum(), x)
    if p < 0.5:
        assert torch.equal(y.nan_to_num(), x.nan_to_num())
        assert torch.equal(dx, torch.ones_like(dx))
    else:
        assert torch.equal(y, torch.zeros_like(y))
        assert torch.equal(dx, torch.zeros_like(dx))


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, 1.5])
def test_p_outside_the_unit_interval_is_torchs_error(device, p):
    x = torch.randn(3, device=device)
    error = ValueError if p == p else RuntimeError
    for function in (F.dropout, torch.nn.functional.dropout):
        with pytest.raises(error, match="dropout probability has to be between 0 and 1, but got"):
            function(x, p)
    if p == p:
        with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1, but got"):
            fnn.Dropout(p)


def test_classic_form(path, device):
    x = torch.randn(50, 40, device=device)
    keep = mask_of(x, 0.25, 2)
    assert torch.equal(F.dropout(x, 0.25, inverted=False, seed=2), torch.where(keep, x, 0.0))
    assert torch.equal(F.dropout(x, 0.25, False, inverted=False), 0.75 * x)
    unseeded = F.dropout(x, 0.25, inverted=False)
    torch.testing.assert_close(unseeded, torch.where(unseeded != 0, x, 0.0))


def test_evaluation_is_the_identity_or_the_fused_form(path, device):
    x, bias, residual = (
        torch.randn(4, 6, device=device),
        torch.randn(6, device=device),
        torch.randn(4, 6, device=device),
    )
    assert F.dropout(x, 0.5, False) is x
    y = F.dropout(x, 0.5, False, bias=bias, activation="gelu", residual=residual)
    torch.testing.assert_close(y, torch.nn.functional.gelu(x + bias) + residual)


@pytest.mark.parametrize("function", [F.alpha_dropout, F.feature_alpha_dropout])
def test_alpha_dropout_values_and_moments(path, device, function):
    x = torch.randn(40, 30, 2, dtype=torch.float64, device=device)
    p, alpha = 0.25, 1.7580993408473766  # -lambda alpha of SELU: Klambauer et al. 2017, section 3
    a = ((1 - p) * (1 + p * alpha**2)) ** -0.5
    y = function(x, p, True, seed=3)
    kept = y != a * (-alpha) + a * alpha * p
    torch.testing.assert_close(y[kept], (a * (x + alpha * p))[kept])
    assert 0.6 < kept.double().mean() < 0.9
    # Mean 0 and variance 1 stay: exactly in expectation, so test the formula and not the sample.
    mean = (1 - p) * (a * alpha * p) + p * (-a * alpha + a * alpha * p)
    second = (1 - p) * (a**2 * (1 + (alpha * p) ** 2)) + p * (-a * alpha + a * alpha * p) ** 2
    assert abs(mean) < 1e-12
    assert abs(second - 1) < 1e-12
    assert function(x, p) is x  # torch's default is training=False


# --- what is saved, what is written -----------------------------------------------------------------------


def test_no_mask_is_saved_and_the_input_only_for_an_activation(device):
    x = torch.randn(64, 64, device=device, requires_grad=True)
    bias = torch.randn(64, device=device, requires_grad=True)
    residual = torch.randn_like(x)
    assert saved_bytes(lambda: F.dropout(x, 0.5, seed=1)) == 0
    assert saved_bytes(lambda: F.dropout(x, 0.5, bias=bias, residual=residual, seed=1)) == 0
    input_and_bias = 4 * (64 * 64 + 64)
    assert saved_bytes(lambda: F.dropout(x, 0.5, bias=bias, activation="gelu", seed=1)) == input_and_bias
    assert saved_bytes(lambda: F.dropout(x, 0.5, seed=torch.tensor([1], device=device))) == 8


@pytest.mark.executed
def test_input_is_freed_when_nothing_needs_it(device):
    x = torch.randn(64, 64, device=device, requires_grad=True) * 1
    alive = weakref.ref(x)
    y = F.dropout(x, 0.5, seed=1)
    del x
    gc.collect()
    assert alive() is None
    y.sum().backward()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["contiguous", "channels_last", "sliced"])
def test_inplace_writes_into_the_input_and_nowhere_else(path, device, name, grad):
    whole = torch.randn(2, 8, 3, 10, device=device)
    if name == "channels_last":
        whole = whole.to(memory_format=torch.channels_last)
    leaf = whole.clone(memory_format=torch.preserve_format).requires_grad_(grad)
    memory = leaf * 1
    target = memory[..., ::2] if name == "sliced" else memory
    before, neighbours = target.detach().clone(), memory.detach()[..., 1::2].clone()
    bias, residual = torch.randn(8, 1, 1, device=device), torch.randn_like(target.detach())
    keep = mask_of(target.detach(), 0.5, 1)
    expected = reference(before.double(), keep, 0.5, bias.double(), None, residual.double())

    assert F.dropout(target, 0.5, True, True, bias=bias, residual=residual, seed=1) is target
    assert_near(target.detach(), expected, TOLERANCE[torch.float32])
    if name == "sliced":
        assert torch.equal(memory.detach()[..., 1::2], neighbours)
    if grad:
        target.sum().backward()
        gradient = leaf.grad[..., ::2] if name == "sliced" else leaf.grad
        assert torch.equal(gradient, torch.where(keep, 2.0, 0.0))


def test_inplace_returns_the_input_itself(path, device):
    x = torch.randn(64, device=device, requires_grad=True)
    with torch.no_grad():
        assert F.dropout(x, 0.5, inplace=True) is x


def test_inplace_gradient(path, device):
    leaf = torch.randn(9, 7, device=device, requires_grad=True)
    x = leaf * 1
    F.dropout(x, 0.5, True, True, seed=1)
    x.sum().backward()
    torch.testing.assert_close(leaf.grad, mask_of(leaf, 0.5, 1) * 2.0)


@pytest.mark.parametrize("seed", [None, 1])
def test_inplace_is_refused_before_anything_changes(path, device, seed):
    leaf = torch.randn(8, 4, device=device, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
        F.dropout(leaf, 0.5, True, True, seed=seed)
    x = leaf * 1
    with pytest.raises(RuntimeError, match="gradient needs the input"):
        F.dropout(x, 0.5, True, True, activation="gelu", seed=seed)
    half = x.detach().half()
    with pytest.raises(RuntimeError, match="does not fit"):
        F.dropout(half, 0.5, True, True, residual=x.detach(), seed=seed)
    overlapping = torch.zeros(1, 4, device=device).expand(8, 4)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        F.dropout(overlapping, 0.5, True, True, seed=seed)
    assert torch.equal(leaf, before)
    assert torch.equal(x, before)
    assert torch.equal(overlapping, torch.zeros_like(overlapping))


def test_inplace_with_activation_is_honoured_where_no_gradient_needs_the_input(path, device):
    x = torch.randn(8, 4, device=device)
    expected = F.dropout(x, 0.5, activation="relu", seed=1)
    assert F.dropout(x, 0.5, True, True, activation="relu", seed=1) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "unknown activation 'swish': choose one of relu, "),
        ({"bias": torch.ones(3)}, ValueError, "bias has to be broadcastable to the input"),
        ({"bias": torch.ones(4, 6)}, ValueError, "vary along one dimension"),
        ({"bias": torch.ones(1, 1, 6)}, ValueError, "bias has to be broadcastable"),
        ({"residual": torch.ones(6)}, ValueError, "residual has to have the shape of the input"),
        (
            {"bias": torch.ones(6, device="meta")},
            RuntimeError,
            "Expected all tensors to be on the same device",
        ),
        (
            {"residual": torch.ones(4, 6, device="meta")},
            RuntimeError,
            "Expected all tensors to be on the same",
        ),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator exclude each other"),
        ({"seed": 1.5}, TypeError, "seed has to be an int"),
        ({"seed": 2**64}, ValueError, "seed has to fit in 64 bits"),
        ({"scale": 2}, TypeError, "scale"),
    ],
)
def test_bad_input_is_refused(path, device, arguments, error, message):
    arguments = {
        k: v.to(device) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
        for k, v in arguments.items()
    }
    with pytest.raises(error, match=message):
        F.dropout(torch.ones(4, 6, device=device), 0.5, **arguments)


def test_a_number_has_no_dimension_for_a_bias(path, device):
    with pytest.raises(ValueError, match="bias has to be broadcastable"):
        F.dropout(torch.ones((), device=device), 0.5, bias=torch.ones((), device=device))


def test_drop_path_needs_samples(path, device):
    with pytest.raises(RuntimeError, match="dimension of samples"):
        F.drop_path(torch.ones((), device=device), seed=1)


def test_alpha_dropout_has_no_classic_form():
    with pytest.raises(TypeError, match="inverted"):
        F.alpha_dropout(torch.ones(3), 0.5, True, inverted=False)


# --- modules ----------------------------------------------------------------------------------------------

LAYERS = [fnn.Dropout, fnn.Dropout1d, fnn.Dropout2d, fnn.Dropout3d, fnn.AlphaDropout, fnn.FeatureAlphaDropout]


@pytest.mark.parametrize("layer", [*LAYERS, fnn.DropPath])
def test_layer_is_torchs_class_with_more_abilities(path, device, layer):
    module = layer(0.25)
    if layer is not fnn.DropPath:
        theirs = getattr(torch.nn, layer.__name__)
        assert isinstance(module, theirs)
        assert repr(module) == repr(theirs(0.25))
    assert repr(layer(0.25, activation="gelu")).endswith("p=0.25, inplace=False, activation=gelu)")
    shape = {fnn.Dropout1d: (4, 6, 5), fnn.Dropout3d: (4, 6, 5, 2, 2)}.get(layer, (4, 6, 5, 2))
    x = torch.randn(shape, device=device)
    residual = torch.randn_like(x)
    assert module.eval()(x) is x
    assert torch.equal(module(x, residual=residual), x + residual)
    assert not torch.equal(module.train()(x), module(x))


def test_layer_refuses_an_unknown_activation_at_once():
    with pytest.raises(ValueError, match="unknown activation"):
        fnn.Dropout(0.5, activation="gelo")


def test_classic_layer(path, device):
    module = fnn.Dropout(0.5, inverted=False)
    assert repr(module) == "Dropout(p=0.5, inplace=False, inverted=False)"
    x = torch.randn(4, 6, device=device)
    assert torch.equal(module.eval()(x), x / 2)


@pytest.mark.smoke
def test_mc_dropout_keeps_only_dropout_random(path, device):
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8),
        torch.nn.BatchNorm1d(8),
        fnn.Dropout(),
        torch.nn.Sequential(torch.nn.Dropout(0.1)),
    ).to(device)
    model[3].eval()
    modes = [m.training for m in model.modules()]
    x = torch.randn(4, 8, device=device)
    running_mean = model[1].running_mean.clone()
    with fastreg.mc_dropout(model) as inside, torch.no_grad():
        assert inside is model
        assert [m.training for m in model.modules()] == [False, False, False, True, False, True]
        assert not torch.equal(model(x), model(x))
    assert torch.equal(model[1].running_mean, running_mean)
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(RuntimeError), fastreg.mc_dropout(model):
        raise RuntimeError
    assert [m.training for m in model.modules()] == modes


def test_mc_dropout_reaches_attention_and_recurrent_layers():
    model = torch.nn.ModuleList(
        [torch.nn.MultiheadAttention(4, 2, dropout=0.5), torch.nn.LSTM(4, 4, 2, dropout=0.5)]
    )
    with fastreg.mc_dropout(model):
        assert not model.training
        assert model[0].training
        assert model[1].training


def test_mc_dropout_keeps_all_layers_random_that_are_so_in_training(device):
    class Noise(torch.nn.Module):
        stochastic = True

        def forward(self, x):
            return x + torch.randn_like(x) if self.training else x

    layers = {
        fnn.DropConnectLinear(8, 8, mode="gaussian"): (3, 8),
        fnn.DropConnectLinear(8, 8): (3, 8),
        fnn.DropConnectConv2d(2, 2, 3): (1, 2, 5, 5),
        fnn.GaussianNoise(): (3, 8),
        fnn.DropoutAddLayerNorm(8): (3, 8),
        Noise(): (3, 8),
    }
    for layer, shape in layers.items():
        model, x = torch.nn.Sequential(layer).to(device).eval(), torch.randn(shape, device=device)
        with fastreg.mc_dropout(model), torch.no_grad():
            assert not model.training
            assert not torch.equal(model(x), model(x)), layer
        assert not layer.training
        assert torch.equal(model(x), model(x))


# --- dispatch ---------------------------------------------------------------------------------------------


def test_cpu_tensors_take_aten_and_its_random_numbers(aten):
    x = torch.randn(100)
    torch.manual_seed(5)
    ours = F.dropout(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(ours, torch.nn.functional.dropout(x, 0.5))


def test_everything_unusual_goes_to_aten():
    x = torch.randn(4)
    assert backend.runs_kernels(x) == backend.HAS_TRITON
    assert not backend.runs_kernels(x.to(torch.complex64))
    assert not backend.runs_kernels(torch.empty(4, device="meta"))
    assert not backend.runs_kernels(torch.ones(4, dtype=torch.int64))

    class Wrapped(torch.Tensor):
        pass

    assert not backend.runs_kernels(x.as_subclass(Wrapped))
    seen = []
    torch.func.vmap(lambda v: seen.append(backend.runs_kernels(v)) or v)(x.view(2, 2))
    assert seen == [False]


# --- on a GPU ---------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.gpu
def test_gpu_mask_equals_the_cpu_definition():
    x = torch.ones(1_000_003, device="cuda")
    for dtype in DTYPES:
        y = F.dropout(x.to(dtype), 0.3, seed=-5)
        assert torch.equal((y != 0).cpu(), random.keep_mask(x.shape, 0.3, Stream(-5)))


@needs_gpu
@pytest.mark.gpu
def test_gpu_eager_draws_from_torchs_generator_without_a_launch():
    x = torch.ones(1 << 19, device="cuda")
    torch.manual_seed(3)
    first, second = F.dropout(x), F.dropout(x)
    state = torch.cuda.get_rng_state()
    third = F.dropout(x)
    torch.manual_seed(3)
    assert torch.equal(first, F.dropout(x))
    assert not torch.equal(first, second)
    torch.cuda.set_rng_state(state)
    assert torch.equal(third, F.dropout(x))


@needs_gpu
@pytest.mark.gpu
def test_gpu_graph_replay_draws_a_new_mask_and_its_backward_follows():
    x = torch.ones(1 << 19, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(F.dropout(x, 0.5, activation="relu"), x, x.detach())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = F.dropout(x, 0.5, activation="relu")
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    masks = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(y != 0, dx != 0)
        masks.append((y != 0).clone())
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@needs_gpu
@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_beyond_2_to_the_31_elements():
    count = (1 << 31) + 4096 + 3
    x = torch.ones(count, dtype=torch.bfloat16, device="cuda")
    y = F.dropout(x, 0.5, seed=1)
    for first in (0, (1 << 31) - 8, count - 11):
        element = torch.arange(first, min(first + 64, count), device="cuda")
        kept = random.lanes(element, Stream(1)) >= random.threshold(0.5)
        assert torch.equal(y[element] != 0, kept)

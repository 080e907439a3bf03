"""Batch, group and instance normalization against fp64 references: every form, layout, dtype and plan."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as TF
from machine_option import bf16
from shared import Marked, kept_storages, near, needs_gpu

import fastreg.functional as F
import fastreg.nn as fnn
from fastreg.ops import backend
from fastreg.ops.fused import ACTIVATIONS, activated
from fastreg.ops.norms import channel_norm as ops
from fastreg.ops.norms import lines

SLOW = pytest.mark.slow  # on the interpreter

# Relative to the largest value. fp32 and fp64 are computed as such; 16-bit results are rounded once on the kernels and
# after every operation on ATen, and truncated to bf16 by the interpreter (one more unit in the last place).
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: bf16(4e-2)}


@pytest.fixture(params=["whole", "split"])
def plan(request, monkeypatch) -> str:
    """Runs a test on both plans of the kernels, and with several splits although the tensors are small."""
    if not backend.HAS_TRITON:
        pytest.skip("needs Triton")
    if request.param == "split":
        monkeypatch.setattr(ops, "whole_plan", lambda *_: None)
        monkeypatch.setattr(backend, "multiprocessors", lambda device: 3)
    return request.param


def laid_out(t, layout):
    """``t`` in another order of memory. "gaps": every other element of a wider tensor."""
    if layout == "channels_last":
        order = {3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}[t.dim()]
    elif layout == "channels_outermost":
        order = (1, 0, *range(2, t.dim()))
    elif layout == "planes_turned":
        order = (*range(t.dim() - 2), t.dim() - 1, t.dim() - 2)
    elif layout == "samples_innermost":
        order = (*range(1, t.dim()), 0)
    elif layout == "gaps":
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
        wide[..., ::2] = t
        return wide[..., ::2]
    else:
        return t.contiguous()
    inverse = [order.index(d) for d in range(t.dim())]
    return t.permute(order).contiguous().permute(inverse)


def batch(x, weight, bias, **fused):
    return F.batch_norm(x, None, None, weight, bias, True, **fused)


def group(groups):
    return lambda x, weight, bias, **fused: F.group_norm(x, groups, weight, bias, **fused)


def exact(groups):
    """The reference; ``groups`` is None for batch normalization."""
    if groups is None:
        return lambda x, w, b: TF.batch_norm(x, None, None, w, b, True)
    return lambda x, w, b: TF.group_norm(x, groups, w, b)


def check(
    shape, norm, reference, *, dtype=torch.float32, layout="contiguous", activation=None, residual=False,
    affine=True, parameters=None, mean=1.5, device="cpu",
):  # fmt: skip
    """Result and all gradients equal those of the reference in fp64."""
    parameters = parameters or dtype
    x = laid_out((torch.randn(shape, dtype=torch.float64) * 2 + mean).to(dtype), layout)
    r = laid_out(torch.randn(shape, dtype=torch.float64).to(dtype), layout) if residual else None
    w, b = torch.randn(2, shape[1], dtype=torch.float64).to(parameters).unbind() if affine else (None, None)
    tensors = [None if t is None else t.to(device).detach().requires_grad_() for t in (x, w, b, r)]
    exact = [None if t is None else t.detach().cpu().double().requires_grad_() for t in tensors]

    y = norm(*tensors[:3], activation=activation, residual=tensors[3])
    expected = activated(reference(*exact[:3]), activation, exact[3])
    dy = torch.randn(shape, dtype=torch.float64).to(dtype)
    given = [t for t in tensors if t is not None]
    gradients = torch.autograd.grad(y, given, dy.to(device))
    expected_gradients = torch.autograd.grad(expected, [t for t in exact if t is not None], dy.double())

    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(tensors[0]).stride()
    near(y.cpu(), expected, TOLERANCE[dtype])
    for t, gradient, exact_gradient in zip(given, gradients, expected_gradients, strict=True):
        assert gradient.dtype == t.dtype
        # dx of few values a unit is a small difference of large terms.
        near(gradient.cpu(), exact_gradient, 4.0 * TOLERANCE[dtype])
    return y


# --- forms, layouts, dtypes -------------------------------------------------------------------------------

SHAPES = {
    "planes": (4, 6, 5, 8),
    "vectors": (3, 16, 4, 8),
    "features": (9, 10),
    "sequence": (3, 5, 11),
    "volume": (2, 4, 3, 2, 5),
    "short odd planes": (20, 8, 7, 7),
    "one sample": (1, 12, 9, 7),
    "one channel": (3, 1, 6, 5),
    "long": (2, 3, 50, 41),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("fused", [(None, False), ("relu", True)], ids=str)
def test_batch_norm(plan, device, shape, fused):
    activation, residual = fused
    check(shape, batch, exact(None), activation=activation, residual=residual, device=device)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((4, 6, 5, 8), 3), ((2, 16, 4, 8), 2), ((3, 12, 10), 12), ((2, 20, 9, 7), 2), ((1, 24, 30, 20), 1),
     ((3, 8, 2, 3, 5), 4), ((5, 12), 3), ((2, 40, 6, 6), 4)],
)  # fmt: skip
@pytest.mark.parametrize("fused", [(None, False), ("silu", False), ("relu", True)], ids=str)
def test_group_norm(plan, device, shape, groups, fused):
    activation, residual = fused
    check(shape, group(groups), exact(groups), activation=activation, residual=residual, device=device)


# shape, groups, layout
KEPT = {
    "one tile": ((4, 6, 5, 8), 3, "contiguous"),
    "ragged last tile": ((2, 6, 30, 23), 3, "contiguous"),
    "groups of 10": ((2, 20, 16, 16), 2, "contiguous"),
    "groups of 3": ((2, 6, 16, 16), 2, "contiguous"),
    "groups of 3, channels last": ((2, 24, 9, 7), 8, "channels_last"),
    "channels last": ((2, 32, 13, 12), 2, "channels_last"),
    "instances": ((2, 5, 21, 20), 5, "contiguous"),
    "short odd planes": ((10, 8, 7, 7), None, "contiguous"),
    "batch, channels last": ((9, 16, 5, 5), None, "channels_last"),
}


@pytest.fixture
def tiles_kept(monkeypatch) -> list[int]:
    """How many tiles of a line the launches that follow keep in registers; 0 where they read them twice."""
    found = []
    run = backend.Launch.run

    def recorded(launch, device):
        if "plan" in launch.arguments:
            found.append(launch.arguments["plan"].tiles)
        run(launch, device)

    monkeypatch.setattr(backend.Launch, "run", recorded)
    return found


@pytest.mark.parametrize(("shape", "groups", "layout"), KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("form", ["kept", "read twice"])
@pytest.mark.parametrize("fused", [("silu", False), ("relu", True)], ids=str)
def test_units_kept_in_registers_and_read_twice(
    device, monkeypatch, tiles_kept, shape, groups, layout, form, fused
):
    """The two forms of the kernels that take whole units, both against fp64, at a mean where sums would cancel."""
    if form == "read twice":
        monkeypatch.setattr(lines, "_kept_plan", lambda *_: None)
    norm = batch if groups is None else group(groups)
    activation, residual = fused
    check(
        shape, norm, exact(groups), layout=layout, activation=activation, residual=residual, mean=30.0,
        device=device,
    )  # fmt: skip
    assert [tiles > 0 for tiles in tiles_kept] == [form == "kept"] * 2


@pytest.mark.smoke
def test_group_norm_with_a_bias_alone(path, device):
    """torch up to 2.13 fails in its backward pass on the CPU: a tensor that is not there."""
    x = torch.randn(2, 4, 2, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: F.group_norm(x, 2, None, bias), (x, bias))


# Batches of three and of five full tiles: kernels are compiled for four and for eight, and those behind are empty.
EMPTY_TILES = [
    ((48, 64), torch.float32, "contiguous"),
    ((96, 64), torch.bfloat16, "contiguous"),
    ((160, 64), torch.bfloat16, "contiguous"),
    ((80, 64), torch.float16, "contiguous"),
    ((8, 64, 3, 2), torch.float32, "channels_last"),
    ((3, 512), torch.float32, "contiguous"),
]


@pytest.mark.sampled  # all of them
@pytest.mark.parametrize(("shape", "dtype", "layout"), EMPTY_TILES, ids=str)
@pytest.mark.parametrize("fused", [(None, False), ("relu", True)], ids=str)
def test_tiles_behind_the_batch(device, tiles_kept, shape, dtype, layout, fused):
    activation, residual = fused
    check(
        shape, batch, exact(None), dtype=dtype, layout=layout, activation=activation, residual=residual,
        device=device,
    )  # fmt: skip
    assert tiles_kept
    assert all(tiles in (2, 4, 8, 16) for tiles in tiles_kept)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_x_read_again_where_registers_hold_the_gradient_alone(device, monkeypatch, activation, layout):
    monkeypatch.setattr(lines, "_kept_most", lambda *_: (16, 64))
    monkeypatch.setattr(backend, "multiprocessors", lambda device: 3)
    x = laid_out(torch.randn(2, 16, 16, 12), layout)
    plan = lines.whole_plan(lines.view(x, 2), (4, 4), x.device)
    assert plan.kept
    assert plan.reread
    check(x.shape, group(2), exact(2), layout=layout, activation=activation, device=device)


# Rows of 8 planes or more; the last are narrower than a vector, which then has lines of several channels.
ODD_PLANES = [(20, 24, 7, 7), (10, 40, 3, 3), (33, 24, 5), (9, 24, 3)]


@pytest.fixture(params=["kept", "x read again", "read twice"])
def sixteen_planes(request, monkeypatch):
    """Programs of 16 channels, of which the last has 8, in all forms: also those that few sizes would get."""

    def plan(seen, itemsizes, *_):
        block = 16 * seen.width
        tiles = 0 if request.param == "read twice" else -(-seen.along // 4)
        again = request.param == "x read again" and len(itemsizes) == 2
        size = 1 << (block - 1).bit_length()
        return lines.Plan(block, size, 4, lines._vector(seen, itemsizes[0]), 4, 16, 1, tiles, again)

    monkeypatch.setattr(lines, "_kept_plan", plan)


@pytest.mark.parametrize("shape", ODD_PLANES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_planes_that_no_vector_divides(sixteen_planes, device, shape, dtype, activation):
    check(shape, batch, exact(None), dtype=dtype, activation=activation, mean=30.0, device=device)


@pytest.mark.executed
@pytest.mark.parametrize("shape", ODD_PLANES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_spoils_no_other_plane(sixteen_planes, device, shape, bad):
    x = torch.randn(shape)
    x[1, 2, ..., -1] = bad
    x = x.to(device).requires_grad_()
    weight = torch.ones(shape[1], device=device, requires_grad=True)
    y = batch(x, weight, None, activation="relu")
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.randn_like(y))
    spoilt = torch.arange(shape[1]) == 2
    for t in (y, dx, dweight[None]):
        assert torch.equal(t.isnan().transpose(0, 1).flatten(1).any(1).cpu(), spoilt)


def test_a_run_has_lines_of_two_units_at_most():
    for width, vector in itertools.product(range(2, 70), (1, 2, 4, 8)):
        seen = lines.View(True, 1, 16 * width, 32, 1, 16, width, width)
        plan = lines.Plan(16 * width, 1 << (16 * width - 1).bit_length(), 4, vector, 4, 16)
        run, touched = plan.run(seen), plan.touched(seen)
        units = [line // width for line in range(16 * width)]
        assert all(units[i + run - 1] - units[i] <= 1 for i in range(0, 16 * width - run, run))
        for unit in range(16):
            first, last = unit * width, (unit + 1) * width - 1
            assert last // run - first // run < touched
        assert run == vector or run <= width < 2 * run


LAYOUTS = ["channels_last", "channels_outermost", "planes_turned", "samples_innermost", "gaps"]


@pytest.mark.executed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [None, 2, pytest.param(3, marks=SLOW), pytest.param(12, marks=SLOW)])
def test_any_layout_is_kept(plan, device, layout, groups):
    norm = batch if groups is None else group(groups)
    check(
        (3, 12, 5, 8),
        norm,
        exact(groups),
        layout=layout,
        activation="leaky_relu",
        residual=True,
        device=device,
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 16, 4, 5), (2, 20, 6, 6), (2, 10, 3, 4, 5), (4, 7, 9)], ids=str)
@pytest.mark.parametrize("per_group", [1, 5, 10, None])
def test_channels_last_with_groups_of_any_width(plan, device, shape, per_group):
    """Also widths that no vector divides, and one group of all channels."""
    width = per_group if per_group and shape[1] % per_group == 0 else shape[1]
    check(
        shape, group(shape[1] // width), exact(shape[1] // width), layout="channels_last", activation="silu",
        device=device,
    )  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float16, marks=SLOW), torch.bfloat16], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("fused", [(None, False), ("relu", True)], ids=str)
def test_dtypes(plan, device, dtype, layout, groups, fused):
    norm = batch if groups is None else group(groups)
    activation, residual = fused
    check(
        (3, 16, 4, 6), norm, exact(groups), dtype=dtype, layout=layout, activation=activation, residual=residual,
        device=device,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [None, 4])
def test_16_bit_input_with_fp32_parameters(plan, device, dtype, groups):
    norm = batch if groups is None else group(groups)
    check((3, 16, 4, 6), norm, exact(groups), dtype=dtype, parameters=torch.float32, device=device)


@pytest.mark.smoke
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_every_activation(path, device, activation, residual):
    check((4, 8, 5, 3), batch, exact(None), activation=activation, residual=residual, device=device)


@pytest.mark.parametrize("groups", [None, 2, 6])
def test_without_affine_parameters(plan, device, groups):
    norm = batch if groups is None else group(groups)
    check((4, 6, 5, 3), norm, exact(groups), affine=False, activation="gelu", device=device)


@pytest.mark.parametrize("dtypes", list(itertools.permutations([torch.float32, torch.bfloat16])), ids=str)
def test_result_has_promoted_dtype_of_input_and_residual(path, device, dtypes):
    x, r = (torch.randn(4, 6, 5, dtype=dtype, device=device, requires_grad=True) for dtype in dtypes)
    y = batch(x, None, None, activation="relu", residual=r)
    assert y.dtype == torch.float32
    dx, dr = torch.autograd.grad(y, (x, r), torch.randn_like(y))
    assert (dx.dtype, dr.dtype) == dtypes
    expected = activated(
        exact(None)(x.detach().double().cpu(), None, None), "relu", r.detach().double().cpu()
    )
    near(y.cpu(), expected, TOLERANCE[torch.bfloat16])


# --- batch normalization in evaluation, and its running statistics -----------------------------------------


@pytest.mark.smoke
@pytest.mark.executed
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("fused", [(None, False), ("relu", False), ("silu", True), ("relu", True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluation(path, device, layout, fused, dtype):
    activation, residual = fused
    mean, var = torch.randn(16), torch.rand(16) + 0.5

    def norm(x, w, b, **fused):
        return F.batch_norm(x, mean.to(x.device), var.to(x.device), w, b, False, **fused)

    def reference(x, w, b):
        return TF.batch_norm(x, mean.double(), var.double(), w, b)

    check(
        (3, 16, 4, 5), norm, reference, dtype=dtype, parameters=torch.float32, layout=layout,
        activation=activation, residual=residual, device=device,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, "tensor"])
@pytest.mark.parametrize("shape", [(4, 6, 5, 7), (10, 8, 7, 7)], ids=["planes", "short odd planes"])
def test_running_statistics(plan, device, dtype, momentum, shape):
    x = (torch.randn(shape) * 3 + 20).to(dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = torch.randn(2, shape[1], dtype=kept)
    var = var.abs()
    ours = [t.clone().to(device) for t in (mean, var)]
    share = 0.25 if momentum == "tensor" else momentum
    given = torch.tensor(0.25, device=device) if momentum == "tensor" else momentum
    F.batch_norm(x.to(device), *ours, training=True, momentum=given)
    exact_mean, exact_var = mean.double(), var.double()
    TF.batch_norm(x.double(), exact_mean, exact_var, training=True, momentum=share)
    near(ours[0].cpu(), exact_mean, TOLERANCE[kept])
    near(ours[1].cpu(), exact_var, TOLERANCE[kept])


def test_running_statistics_that_are_views_are_updated_where_they_lie(device):
    x = torch.randn(3, 4, 5, device=device)
    store, exact = torch.ones(2, 8, device=device), torch.ones(2, 8, dtype=torch.float64)
    F.batch_norm(x, store[0, ::2], store[1, ::2], training=True)
    TF.batch_norm(x.cpu().double(), exact[0, ::2], exact[1, ::2], training=True)
    near(store.cpu(), exact, TOLERANCE[torch.float32])


def test_parameters_of_a_subclass_make_a_result_of_it(path, device):
    weight = torch.rand(4, device=device).as_subclass(Marked)
    x = torch.randn(3, 4, 5, device=device)
    assert type(F.batch_norm(x, None, None, weight, training=True)) is Marked
    assert type(F.group_norm(x, 2, weight)) is Marked


def test_whoever_saved_running_statistics_hears_of_their_update(device):
    """Evaluation saves them for its backward pass: torch's own error, not a wrong gradient."""
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    x = torch.randn(3, 4, 5, device=device, requires_grad=True)
    y = F.batch_norm(x, mean, var)
    F.batch_norm(x.detach(), mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_average_over_all_batches_needs_no_number_on_the_host(path, device, monkeypatch):
    """momentum=None: the share is 1 / num_batches_tracked, which stays where it is."""
    layer = fnn.BatchNorm1d(4, momentum=None).to(device)
    exact = torch.nn.BatchNorm1d(4, momentum=None).double()
    batches = torch.randn(5, 8, 4)
    if path == "kernels" or device.type == "cuda":
        monkeypatch.setattr(torch.Tensor, "item", lambda t: pytest.fail("waited for the device"))
        monkeypatch.setattr(torch.Tensor, "__float__", lambda t: pytest.fail("waited for the device"))
    for x in batches:
        layer(x.to(device))
    monkeypatch.undo()
    for x in batches:
        exact(x.double())
    near(layer.running_mean.cpu(), exact.running_mean, TOLERANCE[torch.float32])
    near(layer.running_var.cpu(), exact.running_var, TOLERANCE[torch.float32])
    assert layer.num_batches_tracked == 5


# --- numerics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("groups", [None, 2])
def test_variance_does_not_cancel_at_large_means(plan, device, mean, groups):
    """E[x^2] - E[x]^2 in fp32 is off by 12 % at a mean of 1e3, and negative at 1e4."""
    x = torch.randn(4, 6, 30, 7) + mean
    norm = batch if groups is None else group(groups)
    y = norm(x.to(device), None, None).cpu()
    # The data are what fp32 holds of them; the result can be as wrong as the mean: half a unit in ITS last place.
    tolerance = 2e-6 + mean * 2**-24 * 2
    torch.testing.assert_close(y.double(), exact(groups)(x.double(), None, None), rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_elements_far_from_the_rest(plan, device, layout):
    """The shift of the sums is a mean, so one wild element does not drown the others."""
    x = torch.randn(4, 6, 30, 8)
    x[0, :, 0, 0] = 3e3
    y = batch(laid_out(x, layout).to(device), None, None).cpu()
    near(y, exact(None)(x.double(), None, None), 4.0 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("groups", [None, 3])
def test_a_bad_value_spoils_only_its_unit(plan, device, layout, bad, groups):
    x = torch.randn(2, 6, 5, 8)
    x[1, 2, 3, 4] = bad
    x = laid_out(x, layout).to(device).requires_grad_()
    norm = batch if groups is None else group(groups)
    weight = torch.ones(6, device=device, requires_grad=True)
    y = norm(x, weight, None)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.randn_like(y))
    spoilt = torch.zeros(2, 6, dtype=torch.bool)
    if groups is None:
        spoilt[:, 2] = True
    else:
        spoilt[1, 2:4] = True
    assert torch.equal(y.isnan().flatten(2).any(2).cpu(), spoilt)
    assert torch.equal(dx.isnan().flatten(2).any(2).cpu(), spoilt)
    assert torch.equal(dweight.isnan().cpu(), spoilt.any(0))


@pytest.mark.parametrize("groups", [None, 2])
def test_constant_channels_give_the_bias(plan, device, groups):
    x = torch.full((3, 4, 5, 6), 7.25, device=device, requires_grad=True)
    bias = torch.randn(4, device=device)
    norm = batch if groups is None else group(groups)
    y = norm(x, None, bias)
    assert torch.equal(y, bias[None, :, None, None].expand_as(y))
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.isfinite().all()


def test_groups_of_one_element_give_the_bias(plan, device):
    x, bias = torch.randn(6, 4, device=device), torch.randn(4, device=device)
    assert torch.equal(F.group_norm(x, 4, None, bias), bias.expand(6, 4))


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("shape", [(1, 8), (1, 8, 2, 2)])
def test_statistics_of_one_tile_of_one_split(device, shape):
    """As a process has that normalizes one sample together with others."""
    x, seen = lines.viewed(torch.randn(shape, device=device), 0)
    mean, var = torch.empty(2, 8, device=device)
    for launch in ops.statistics_launches(x, mean, var, None, seen):
        launch.run(device)
    exact_var, exact_mean = torch.var_mean(x.cpu().double().view(8, -1), 1, correction=0)
    near(mean.cpu(), exact_mean, TOLERANCE[torch.float32])
    near(var.cpu(), exact_var, TOLERANCE[torch.float32])


def test_same_input_same_bits(plan, device):
    x = torch.randn(5, 8, 9, 7, device=device, requires_grad=True)
    weight = torch.randn(8, device=device, requires_grad=True)
    dy = torch.randn_like(x)

    def step():
        y = batch(x, weight, None, activation="silu")
        return y, *torch.autograd.grad(y, (x, weight), dy)

    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


# --- autograd ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["x", "w", "r", "xw", "br", "xbr"], ids="".join)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", pytest.param("silu", marks=SLOW)])
def test_any_subset_of_gradients(plan, device, wanted, training, activation):
    names = dict(zip("xwbr", ((3, 6, 8), (6,), (6,), (3, 6, 8)), strict=True))
    tensors = {n: torch.randn(s, device=device).requires_grad_(n in wanted) for n, s in names.items()}
    stats = (torch.zeros(6, device=device), torch.ones(6, device=device))
    y = F.batch_norm(
        tensors["x"],
        *stats,
        tensors["w"],
        tensors["b"],
        training,
        activation=activation,
        residual=tensors["r"],
    )
    y.square().sum().backward()
    doubles = {n: t.detach().cpu().double().requires_grad_(n in wanted) for n, t in tensors.items()}
    stats = (torch.zeros(6).double(), torch.ones(6).double())
    z = TF.batch_norm(doubles["x"], *stats, doubles["w"], doubles["b"], training)
    activated(z, activation, doubles["r"]).square().sum().backward()
    for name, t in tensors.items():
        assert (t.grad is not None) == (name in wanted)
        if name in wanted:
            near(t.grad.cpu(), doubles[name].grad, 4.0 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("groups", [None, 4])
def test_nothing_as_large_as_the_input_is_saved_but_the_input(device, groups):
    x = torch.randn(4, 16, 8, 8, device=device, requires_grad=True)
    norm = batch if groups is None else group(groups)
    found, _ = kept_storages(lambda: norm(x, None, None, activation="silu"))
    assert found.pop(x.untyped_storage().data_ptr()) == 4 * x.numel()
    assert sum(found.values()) <= 2 * 4 * 16 * 4  # a mean and a variance a unit


def test_a_residual_behind_relu_costs_one_bit_an_element(device):
    x, r = (torch.randn(4, 16, 8, 8, device=device, requires_grad=True) for _ in range(2))
    found, y = kept_storages(lambda: batch(x, None, None, activation="relu", residual=r))
    assert r.untyped_storage().data_ptr() not in found
    assert y.untyped_storage().data_ptr() not in found
    assert x.numel() // 8 in found.values()


def test_no_signs_without_gradients(device, monkeypatch):
    """None of what only a backward pass would need is written."""
    x = torch.randn(4, 16, 8, 8, device=device)
    written = []
    run = backend.Launch.run
    monkeypatch.setattr(
        backend.Launch,
        "run",
        lambda launch, device: [written.append(launch.leaves.get("tensors.signs")), run(launch, device)][1],
    )
    for needed in (False, True):
        batch(x.requires_grad_(needed), None, None, activation="relu", residual=x)
        assert any(signs is not None for signs in written) == needed


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_signs_are_those_of_what_the_activation_had(plan, device, activation):
    x, r = (torch.randn(3, 16, 5, 8, device=device) for _ in range(2))
    form = ops.Form(0, 1e-5, activation)
    signs = torch.empty(x.numel() // 8, dtype=torch.uint8, device=device)
    statistics = (torch.empty(x.shape[1], device=device) for _ in range(2))
    ops.forward(x, None, None, r, torch.empty_like(x), signs, *statistics, None, None, 0.0, None, form)
    v = exact(None)(x.cpu().double(), None, None) + r.cpu().double()
    assert torch.equal(ops.unpacked_signs(signs, x.shape, x.stride()).cpu(), v > 0)


@pytest.mark.parametrize(
    ("groups", "activation", "residual"),
    [(None, "silu", False), (None, "relu", True), (2, "relu", False), (2, "tanh", True)],
)
def test_second_derivatives(device, groups, activation, residual):
    shape = (3, 4, 2, 4)
    inputs = [torch.randn(s, dtype=torch.float64, device=device) for s in (shape, (4,), (4,), shape)]
    inputs = [t.requires_grad_() for t in inputs][: 4 if residual else 3]

    def norm(x, w, b, r=None):
        if groups is None:
            return F.batch_norm(x, None, None, w, b, True, activation=activation, residual=r)
        return F.group_norm(x, groups, w, b, activation=activation, residual=r)

    assert torch.autograd.gradcheck(norm, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(norm, inputs, fast_mode=True)


# --- plans -------------------------------------------------------------------------------------------------


def meta(shape, layout="contiguous", dtype=torch.bfloat16):
    return laid_out(torch.empty(shape, dtype=dtype, device="meta"), layout)


def launches(x, groups=0, activation=None, residual=False):
    """(forward, backward) launches of the kernels of this family on a tensor without data."""
    seen = ops.view(x, groups)
    form = ops.Form(groups, 1e-5, activation)
    parameters = x.new_empty(x.shape[1], dtype=torch.float32)
    statistics = x.new_empty(seen.units, dtype=torch.float32)
    r = x if residual else None
    forward = ops.forward_launches(
        x, parameters, parameters, r, x, None, statistics, statistics, None, None, 0.0, form
    )
    lines = x.new_empty(seen.batches * seen.lines, dtype=torch.float32)
    dv = x if residual and activation else None
    backward = ops.backward_launches(
        x, x, parameters, parameters, r, None, statistics, statistics, x, lines, lines, dv, True, form
    )
    return forward, [launch for launch in backward if launch.kernel.__name__ != "sum_partials"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((256, 3, 112, 112), 0), ((256, 64, 56, 56), 0), ((2, 2048, 64, 64), 0), ((1, 32, 512, 512), 8),
     ((2, 320, 64, 64), 32), ((256, 256, 56, 56), 32), ((32, 2048, 7, 7), 0), ((64, 512, 28, 28), 512)],
)  # fmt: skip
def test_large_tensors_fill_a_gpu(shape, groups, layout):
    """Whatever the number of channels or groups: every pass over the tensor has a program a multiprocessor."""
    for launch in itertools.chain(*launches(meta(shape, layout), groups)):
        if "tile" in launch.arguments:
            assert math.prod(launch.grid) >= 132


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_units_that_fit_take_one_launch(layout):
    forward, backward = launches(meta((32, 512, 28, 28), layout), 32, activation="silu")
    assert (len(forward), len(backward)) == (1, 1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_units_that_fit_registers_are_read_once(layout, dtype):
    """And take no more of them than leaves room for what is computed: 64 of a thread's 128."""
    for launch in itertools.chain(*launches(meta((32, 512, 28, 28), layout, dtype), 32, activation="silu")):
        tile, plan = launch.arguments["tile"], launch.arguments["plan"]
        elements = plan.tiles * plan.parts * tile.lines * tile.along / (32 * launch.arguments["num_warps"])
        tensors = 2 if "tensors.dy" in launch.leaves and not plan.reread else 1
        assert 0 < elements * tensors * dtype.itemsize / 4 <= 64
        assert tile.lines * tile.along * plan.tiles <= 1.2 * 16 * 28 * 28  # little that is not there


def test_units_too_large_for_registers_are_read_twice():
    forward, backward = launches(meta((8, 512, 64, 64)), 32, activation="silu")  # 65,536 elements
    assert forward[0].arguments["plan"].tiles == 0
    assert len(backward) == 3


def test_groups_of_10_waste_nothing():
    forward, _ = launches(meta((8, 320, 64, 64)), 32, activation="silu")
    tile, plan = forward[0].arguments["tile"], forward[0].arguments["plan"]
    assert (tile.lines, plan.parts, tile.even) == (2, 5, True)


def test_batches_of_any_size_compile_few_kernels():
    """The tiles of a line of a batch are counted in powers of 2."""
    for size in range(2, 100):
        for launch in itertools.chain(*launches(meta((size, 64, 8, 8), "channels_last"))):
            tiles = launch.leaves.get("plan.tiles", 0)
            assert tiles & (tiles - 1) == 0
            assert launch.leaves.get("plan.full", 0) == 0


def test_a_unit_too_large_to_be_read_again_from_a_cache_is_split():
    forward, backward = launches(meta((256, 64, 112, 112)))
    assert (len(forward), len(backward)) == (3, 3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_rows_of_vectors_take_16_byte_accesses(layout):
    for dtype, vector in ((torch.bfloat16, 8), (torch.float32, 4), (torch.float64, 2)):
        for launch in itertools.chain(*launches(meta((32, 64, 56, 56), layout, dtype))):
            assert launch.leaves.get("tile.vector", vector) == vector


def test_views():
    last, first = ops.view(meta((4, 6, 5, 8), "channels_last"), 0), ops.view(meta((4, 6, 5, 8)), 0)
    assert last == ops.View(True, 1, 6, 160, 1, 6, 1)
    assert first == ops.View(False, 1, 6, 40, 4, 6, 1)
    assert ops.view(meta((4, 6, 5, 8), "channels_outermost"), 0) == ops.View(False, 1, 6, 160, 1, 6, 1)
    assert ops.view(meta((4, 6, 5, 8)), 3) == ops.View(False, 1, 24, 40, 1, 6, 2)
    assert ops.view(meta((4, 6, 5, 8), "channels_last"), 3) == ops.View(True, 4, 6, 40, 1, 6, 2)
    assert ops.view(meta((4, 6, 5, 8), "samples_innermost"), 3) is None


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(layout):
    x = torch.randn((1 << 11, 64, 128, 129), dtype=torch.bfloat16, device="cuda")
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    y = batch(x, None, None)
    for part in (slice(0, 2), slice(-2, None)):
        mean, var = x.float().mean((0, 2, 3)), x.float().var((0, 2, 3), correction=0)
        expected = (x[part].float() - mean[:, None, None]) * (var[:, None, None] + 1e-5).rsqrt()
        torch.testing.assert_close(y[part].float(), expected, rtol=2e-2, atol=2e-2)

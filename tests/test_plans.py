"""Every launch keeps its promises, which is found without running a kernel.

A kernel leaves a mask out where its launch says that all tiles are full (EVEN, FULL, ...), and computes in 32 bits what
its launch says is small. Here tensors lie on the meta device, so that any size is free: public functions are called on
them, their launches are recorded, and of each it is shown that

- every element is in exactly one tile of one program,
- a tile that is not masked lies inside the tensor,
- offsets, counts and grids fit in their types.
"""

import contextlib
import functools
import math
import sys
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from drawing import ACTIVATIONS, DTYPES, FLOATS, drawn, laid_out, layouts, shapes, sizes
from hypothesis import strategies as st

import fastreg
import fastreg.functional as F
import fastreg.optim
from fastreg.ops import backend
from fastreg.ops.dropout import activation_backward
from fastreg.ops.launch import forget
from fastreg.ops.multi_tensor import averages as averages_of_lists
from fastreg.ops.norms import channel_norm, lines

pytestmark = pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")

if backend.HAS_TRITON:
    from fastreg.kernels import (
        averages,
        drop_connect,
        dropout,
        dual_linear,
        expectation,
        layer_norm,
        local_response_norm,
        noise,
        noisy_linear,
        optimizers,
        partial_sums,
        penalties,
    )
    from fastreg.kernels import channel_norm as norms

INT32 = 1 << 31
GRID = (INT32 - 1, 65535, 65535)  # the most programs along each dimension


# --- what is shown of an axis -----------------------------------------------------------------------------


def power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def check_covered(length: int, tiles: int, size: int, masked: bool) -> None:
    """``tiles`` neighbouring tiles of ``size`` cover the first ``length`` places, and without a mask no others."""
    assert tiles * size >= length
    assert masked or tiles * size == length


def check_no_idle(length: int, tiles: int, size: int) -> None:
    """Each tile has something to do: the first one of a program is loaded without asking."""
    check_covered(length, tiles, size, masked=True)
    assert (tiles - 1) * size < length


# --- batch, group and instance norm -----------------------------------------------------------------------


class Lines(NamedTuple):
    """What the kernels make of their view (``shape_of``)."""

    batches: int
    lines: int
    along: int
    segments: int
    block: int


def extents(a: dict) -> Lines:
    view, tile = a["view"], a["tile"]
    x = a["x_ptr"] if "x_ptr" in a else a["tensors"].x
    inner = view.inner_vectors * tile.vector
    block = view.block * tile.vector if tile.last else view.block
    along, lines = (view.outer, inner) if tile.last else (inner, view.outer)
    assert tile.segmented or view.segments == 1
    batches = x.numel() // (lines * along * view.segments)
    assert batches * view.segments * lines * along == x.numel()
    assert batches == 1 or view.segments == 1
    if tile.last:  # whole vectors, and whole bytes of signs
        assert lines % tile.vector == block % tile.vector == 0
    if getattr(a.get("tensors"), "signs", None) is not None:
        assert inner % 8 == 0
        assert (tile.lines if tile.last else tile.along) % 8 == 0
        assert not tile.last or block % 8 == 0
    return Lines(batches, lines, along, view.segments, block)


def check_tiles(a: dict) -> Lines:
    """The tiles of a line and the lines of a tile."""
    seen, tile = extents(a), a["tile"]
    plan = a.get("plan") or norms.Plan(tiles=0, parts=1, full=0)
    assert power_of_2(tile.lines)
    assert power_of_2(tile.along)
    assert tile.lines * tile.along * plan.parts < 1 << 20
    # The lines of a program are dealt to its parts, which know no end of their own.
    check_covered(seen.block, plan.parts, tile.lines, masked=plan.parts == 1)
    if tile.even or plan.full:
        assert seen.block == plan.parts * tile.lines
        assert seen.lines % seen.block == 0
    assert seen.segments == 1 or not plan.tiles
    check_covered(seen.along, plan.tiles or -(-seen.along // tile.along), tile.along, masked=not tile.even)
    assert plan.full <= plan.tiles
    assert plan.full * tile.along <= seen.along
    # Within a tile, and along a line, offsets have 32 bits.
    tall = min(tile.along, seen.along) if tile.last else min(tile.lines, seen.lines)
    offset = tall * (seen.lines if tile.last else seen.along)
    assert offset < INT32
    assert seen.along + tile.along <= INT32
    assert a["view"].inner_vectors * tile.vector < INT32
    assert seen.batches * seen.lines < INT32
    return seen


def check_split(launch: backend.Launch) -> None:
    """Programs (batches x splits x blocks of lines): each split takes every ``splits``-th tile of its lines."""
    a = launch.arguments
    seen = check_tiles(a)
    blocks = -(-seen.lines // seen.block)
    assert launch.grid == (seen.batches * a["splits"] * blocks,)
    assert 1 <= a["splits"] <= seen.segments * -(-seen.along // a["tile"].along) < INT32
    if "batches" in a:  # partial sums, of which a line has one a split
        assert a["batches"] == seen.batches
        assert a["splits"] * seen.batches * seen.lines < INT32


def check_units(units, width: int, lines: int, block: int, padded: int) -> None:
    """A program has whole units, as many as it says; and a run of its lines touches two of them at most.

    padded: the lines of a program, rounded up to a power of 2.
    """
    assert lines % width == 0
    assert block % width == 0
    assert (units.slots == 0) == (width == 1)
    if units.slots == 0:
        return
    assert power_of_2(units.slots)
    assert units.slots * width >= block
    if units.slots == 1:
        assert block == width
        return
    assert power_of_2(units.run)
    assert padded % units.run == 0
    unit = np.arange(block) // width
    runs = np.arange(block) // units.run
    for first in range(0, block, units.run):
        assert len(set(unit[first : first + units.run])) <= (2 if units.run > 1 else 1)
    for one in range(block // width):
        assert len(set(runs[unit == one])) <= units.touched


def check_whole(launch: backend.Launch) -> None:
    """Programs (blocks of lines, batches), each with all of its units."""
    a = launch.arguments
    seen, width = check_tiles(a), a["view"].width
    assert launch.grid == (-(-seen.lines // seen.block), seen.batches)
    check_units(a["units"], width, seen.lines, seen.block, a["tile"].lines)
    if a["plan"].parts > 1:
        assert a["units"].slots <= 1
        assert width % a["plan"].parts == 0
    if "elements" in a:
        assert a["elements"] == width * seen.segments * seen.along


def check_merge(launch: backend.Launch) -> None:
    """Programs with whole units of all lines, over all splits."""
    merged, merge, units = (launch.arguments[name] for name in ("merged", "merge", "units"))
    assert launch.grid == (-(-merged.lines // merged.block),)
    check_covered(merged.block, 1, merge.lines, masked=True)
    assert units.run == 1
    check_units(units, merged.width, merged.lines, merged.block, merge.lines)
    assert merged.splits * merged.lines < INT32


# --- tiles of rows and columns ----------------------------------------------------------------------------


def elements(a: dict, *names: str) -> int:
    return next(a[name] for name in names if a.get(name) is not None).numel()


def check_wide(a: dict, numel: int) -> None:
    assert a["WIDE"] or numel < INT32


def check_dropout(launch: backend.Launch) -> None:
    a = launch.arguments
    numel = elements(a, "x_ptr", "dy_ptr")
    vector, rows = a["VECTOR"], a["rows"] or 1
    whole, tail = a["vectors"] * vector, a.get("tail", 0)
    assert rows * (whole + tail) == numel
    assert tail < vector
    assert a.get("RAGGED", False) == (tail > 0)
    assert tail == 0 or a["rows"] is None  # only one row has an end that is taken care of
    assert a["BLOCK_COLUMNS"] % vector == 0
    row_blocks, column_blocks = -(-rows // a["BLOCK_ROWS"]), max(1, -(-whole // a["BLOCK_COLUMNS"]))
    if launch.kernel is dropout.backward_bias_columns:
        assert launch.grid[0] == column_blocks
        assert launch.grid[1] <= row_blocks
    else:
        assert launch.grid == (row_blocks * column_blocks,)
    check_covered(rows, row_blocks, a["BLOCK_ROWS"], masked=not a["EVEN"])
    check_covered(whole, column_blocks, a["BLOCK_COLUMNS"], masked=not a["EVEN"])
    assert rows % a["mask_repeat"] == 0
    if a.get("BIAS") == "rows":
        assert rows % (a["bias_repeat"] * a["bias_size"]) == 0  # read without a mask
    partial = a.get("partial_ptr")
    if partial is not None:
        bias_rows = rows if launch.kernel is dropout.backward else launch.grid[1]
        assert partial.shape == (
            bias_rows,
            column_blocks if launch.kernel is dropout.backward else whole,
        )
    check_wide(a, numel)


def check_layer_norm(launch: backend.Launch) -> None:
    a, plan = launch.arguments, launch.arguments["plan"]
    rows, columns = a["rows"], a["vectors"] * plan.vector
    assert rows * columns == (a["tensors"].x if hasattr(a["tensors"], "x") else a["tensors"].h).numel()
    assert plan.columns % plan.vector == 0
    row_blocks, column_blocks = -(-rows // plan.rows), -(-columns // plan.columns)
    check_covered(rows, row_blocks, plan.rows, masked=not plan.even_rows)
    check_covered(columns, column_blocks, plan.columns, masked=not plan.even_columns)
    kernel = launch.kernel
    if kernel in (layer_norm.forward, layer_norm.backward):
        assert column_blocks == 1
    if kernel in (layer_norm.forward_long, layer_norm.backward_long):
        assert plan.rows == 1
    if kernel in (layer_norm.forward, layer_norm.forward_long, layer_norm.backward_long):
        assert launch.grid == (row_blocks,)
    else:
        *blocks, programs = launch.grid
        assert blocks in ([], [column_blocks])
        assert 1 <= programs <= row_blocks
        assert all(t is None or t.shape == (programs, columns) for t in a["sums"])
    assert plan.wide or rows * columns < INT32


def check_sum_partials(launch: backend.Launch) -> None:
    a = launch.arguments
    check_covered(a["columns"], launch.grid[0], a["BLOCK_COLUMNS"], masked=True)
    assert launch.grid[1] == 1 + (a["second_ptr"] is not None)
    check_wide(a, a["programs"] * a["columns"])


def check_local_response_norm(launch: backend.Launch) -> None:
    a = launch.arguments
    vector, last = a["VECTOR"], a["LAST"]
    channels = a["channel_vectors"] * (vector if last else 1)
    inner = 1 if last else a["inner_vectors"] * vector
    numel = elements(a, "x_ptr")
    assert a["samples"] * channels * inner == numel
    blocks = -(-channels // a["CHANNELS"])
    assert power_of_2(a["ROWS"])
    if last:
        assert a["CHANNELS"] % vector == 0
        check_covered(a["samples"] * blocks, *launch.grid, a["ROWS"], masked=True)
    else:
        assert launch.grid[0] % blocks == 0
        check_covered(a["samples"] * a["inner_vectors"], launch.grid[0] // blocks, a["ROWS"], masked=True)
    check_wide(a, numel)


# --- one row ----------------------------------------------------------------------------------------------


def check_noise(launch: backend.Launch) -> None:
    a = launch.arguments
    whole = a["vectors"] * a["VECTOR"]
    assert whole + a["tail"] == elements(a, "x_ptr")
    assert 0 <= a["tail"] < a["VECTOR"]
    assert a["RAGGED"] == (a["tail"] > 0)
    assert a["BLOCK"] % a["VECTOR"] == 0
    check_covered(whole, *launch.grid, a["BLOCK"], masked=True)
    check_wide(a, whole + a["tail"])


def check_average(launch: backend.Launch) -> None:
    a = launch.arguments
    assert a["elements"] == elements(a, "mean_ptr")
    check_covered(a["elements"], *launch.grid, a["BLOCK"], masked=True)
    check_wide(a, a["elements"])


# --- rows of a matrix, and matrix products ----------------------------------------------------------------


def check_rows(launch: backend.Launch) -> None:
    """A program a block of a row, or a whole row."""
    a = launch.arguments
    rows, columns = next(a[name] for name in ("x_ptr", "dy_ptr") if name in a).shape
    assert a["columns"] == columns
    blocks = a.get("blocks", 1)
    assert launch.grid == (rows * blocks,)
    if "blocks" in a:
        check_covered(columns, blocks, a["BLOCK"], masked=True)
    assert a["BLOCK"] % 8 == 0
    assert columns + a["BLOCK"] <= INT32


def check_masked_product(launch: backend.Launch) -> None:
    a = launch.arguments
    examples, rows, columns = a["examples"], a["rows"], a["columns"]
    assert a["u_ptr"].shape == (examples, columns)
    assert a["w_ptr"].shape == ((columns, rows) if a["TRANSPOSED"] else (rows, columns))
    programs, splits = launch.grid
    row_blocks = -(-rows // a["BLOCK_ROWS"])
    assert programs % row_blocks == 0
    programs //= row_blocks
    check_covered(rows, row_blocks, a["BLOCK_ROWS"], masked=not a["EVEN"])
    check_covered(columns, splits * a["trips"], a["BLOCK_COLUMNS"], masked=not a["EVEN"])
    assert a["SPLIT"] == (splits > 1)
    if splits > 1:
        assert a["z_ptr"].shape == (splits, examples, rows)
    span = a["group_size"] * (1 if a["SHARED"] else 16)
    assert programs % a["chunks"] == 0
    check_no_idle(examples, programs // a["chunks"], span)
    check_covered(min(span, examples), a["chunks"], a["BLOCK_EXAMPLES"], masked=True)
    if not a["SHARED"] and a["group_size"] == 1:
        assert a["BLOCK_EXAMPLES"] == 16
    assert a["BLOCK_COLUMNS"] % 8 == a["BLOCK_ROWS"] % 8 == 0  # whole calls of Philox


def check_merged_product(launch: backend.Launch) -> None:
    a = launch.arguments
    assert a["partial_ptr"].shape == (a["splits"], a["examples"], a["rows"])
    assert launch.grid[0] == a["examples"]
    check_covered(a["rows"], launch.grid[1], a["BLOCK"], masked=True)


def check_weight_blocks(launch: backend.Launch) -> None:
    """Blocks of outputs times blocks of inputs."""
    a = launch.arguments
    blocks = [-(-a[f"{name}puts"] // a[f"BLOCK_{name.upper()}PUTS"]) for name in ("out", "in")]
    assert launch.grid == (math.prod(blocks),)


def check_weight_gradient(launch: backend.Launch) -> None:
    a = launch.arguments
    assert a["dz_ptr"].shape == (a["examples"], a["outputs"])
    assert a["v_ptr"].shape == (a["examples"], a["inputs"])
    check_weight_blocks(launch)
    assert a["BLOCK_INPUTS"] % 8 == 0
    if "words" in a:
        check_covered(a["examples"], a["words"], 16 * a["group_size"], masked=True)
    if "groups" in a:
        check_no_idle(a["examples"], a["groups"], a["group_size"])


def check_masked_weights(launch: backend.Launch) -> None:
    a = launch.arguments
    assert a["w_ptr"].shape == a["masked_ptr"].shape == (a["outputs"], a["inputs"])
    check_weight_blocks(launch)
    assert a["BLOCK_INPUTS"] % 8 == 0


def check_two_products(launch: backend.Launch) -> None:
    a = launch.arguments
    examples, rows, columns = a["examples"], a["rows"], a["columns"]
    assert a["u_ptr"].shape == a["u2_ptr"].shape == (examples, columns)
    assert a["w_ptr"].shape == ((columns, rows) if a["TRANSPOSED"] else (rows, columns))
    row_blocks = -(-rows // a["BLOCK_ROWS"])
    assert launch.grid == (-(-examples // a["BLOCK_EXAMPLES"]) * row_blocks,)
    check_covered(rows, row_blocks, a["BLOCK_ROWS"], masked=not a["EVEN"])
    check_covered(columns, -(-columns // a["BLOCK_COLUMNS"]), a["BLOCK_COLUMNS"], masked=not a["EVEN"])
    assert a["BLOCK_COLUMNS"] % 8 == a["BLOCK_ROWS"] % 8 == 0


# --- tables of many tensors -------------------------------------------------------------------------------


def check_chunks(launch: backend.Launch) -> None:
    """Each tensor of the table is cut into chunks, each of them one program's; those of rows end with their row."""
    a, kernel = launch.arguments, launch.kernel
    entries, chunks = a["entries_ptr"].numpy(), a["chunks_ptr"].numpy()
    assert launch.grid == (chunks.shape[1],) == (a["programs"],)
    assert entries.shape[1] == a["tensors"]
    rows = a.get("ROWS", False) or kernel in (penalties.project_rows, penalties.shorten)
    lengths = None
    if kernel.fn.__module__ == optimizers.__name__:
        rows = a.get("PROJECTION") == "rows" or "chunk_units_ptr" in a
        lengths = entries[optimizers.ROW.value]
    else:
        numel = entries[penalties.NUMEL.value]
        if rows:
            lengths = entries[penalties.ROW.value]
    units = 0
    for tensor in range(a["tensors"]):
        mine = chunks[0] == tensor
        first = chunks[1][mine]
        row = int(lengths[tensor]) if rows else 0
        if len(chunks) == 3:
            end = chunks[2][mine]
        else:
            end = np.minimum(first + a["BLOCK"], numel[tensor])
            if a.get("WIDTH"):
                end = np.minimum(first + row * (a["BLOCK"] // a["WIDTH"]), numel[tensor])
            elif rows:
                end = np.minimum(end, first - first % row + row)
        assert first[0] == 0
        assert (end[:-1] == first[1:]).all()
        assert end[-1] == (sizes_of(launch)[tensor] if len(chunks) == 3 else numel[tensor])
        if a.get("WIDTH", 1) > 1:  # whole rows, each in a row of the tile
            assert power_of_2(a["WIDTH"])
            assert row <= a["WIDTH"] <= a["BLOCK"]
            assert (first % row == 0).all()
            assert ((end - first) % row == 0).all()
            assert ((end - first) // row <= a["BLOCK"] // a["WIDTH"]).all()
        else:
            assert (end - first <= a["BLOCK"]).all()
        if "chunk_units_ptr" in a:
            row = row or int(end[-1])
            assert (a["chunk_units_ptr"].numpy()[mine] == units + first // row).all()
            assert (first // row == (end - 1) // row).all()
            units += int(end[-1]) // row
    if kernel in (averages.follow, averages.copy_if):  # a full tile is taken for one that begins on 16 bytes
        assert a["BLOCK"] % 16 == 0
        assert (chunks[1] % a["BLOCK"] == 0).all()


def sizes_of(launch: backend.Launch) -> list[int]:
    """How many elements lie at the first addresses of a table, which the test has made."""
    return [tensors_at[int(address)].numel() for address in launch.arguments["entries_ptr"][0]]


def check_advance(launch: backend.Launch) -> None:
    check_covered(launch.arguments["tensors"], *launch.grid, launch.arguments["BLOCK"], masked=True)


def check_fold(launch: backend.Launch) -> None:
    """The chunks of a unit are neighbours, and each chunk is of one."""
    a = launch.arguments
    first, count = a["units_ptr"].numpy()
    assert launch.grid == (len(first),) == (a["units"],)
    assert (first == np.cumsum(count) - count).all()
    assert count.sum() == len(a["partials_ptr"])
    assert (count > 0).all()


# --- every kernel has its promises ------------------------------------------------------------------------

PROMISES = {}
if backend.HAS_TRITON:
    PROMISES = {
        norms.whole_forward: check_whole,
        norms.whole_backward: check_whole,
        norms.statistics: check_split,
        norms.apply: check_split,
        norms.gradient_sums: check_split,
        norms.gradient_apply: check_split,
        norms.merge_statistics: check_merge,
        norms.merge_gradient_sums: check_merge,
        dropout.forward: check_dropout,
        dropout.backward: check_dropout,
        dropout.backward_bias_columns: check_dropout,
        layer_norm.forward: check_layer_norm,
        layer_norm.forward_long: check_layer_norm,
        layer_norm.backward: check_layer_norm,
        layer_norm.backward_long: check_layer_norm,
        layer_norm.backward_columns: check_layer_norm,
        partial_sums.sum_partials: check_sum_partials,
        local_response_norm.forward: check_local_response_norm,
        local_response_norm.backward: check_local_response_norm,
        noise.add_noise: check_noise,
        expectation.integrate: check_average,
        expectation.integrate_backward: check_average,
        expectation.average: check_average,
        expectation.average_backward: check_average,
        noisy_linear.row_noise: check_rows,
        noisy_linear.row_noise_backward: check_rows,
        dual_linear.second_input: check_rows,
        dual_linear.product: check_two_products,
        dual_linear.weight_gradient: check_weight_gradient,
        drop_connect.product: check_masked_product,
        drop_connect.merge: check_merged_product,
        drop_connect.weight_gradient: check_weight_gradient,
        drop_connect.shared_weight_gradient: check_weight_gradient,
        drop_connect.mask_weights: check_masked_weights,
        averages.follow: check_chunks,
        averages.copy_if: check_chunks,
        optimizers.advance: check_advance,
        optimizers.step: check_chunks,
        optimizers.squares: check_chunks,
        optimizers.fold: check_fold,
        optimizers.project: check_chunks,
        penalties.penalize: check_chunks,
        penalties.project_rows: check_chunks,
        penalties.shorten: check_chunks,
    }


def test_every_kernel_has_its_promises():
    """A module of a family has no public functions but its kernels."""
    families = {sys.modules[kernel.fn.__module__] for kernel in PROMISES}
    kernels = {
        value
        for family in families
        for name, value in vars(family).items()
        if hasattr(value, "arg_names") and value.fn.__module__ == family.__name__ and not name.startswith("_")
    }
    assert kernels == set(PROMISES)


@contextlib.contextmanager
def recorded(multiprocessors: int = 132):
    """Calls on meta tensors go to the kernels, and come as far as their launches, of which this is the list."""
    launches: list[backend.Launch] = []
    forget()  # what is planned here is planned anew
    with (
        mock.patch.object(backend, "runs_kernels", return_value=True),
        mock.patch.object(backend, "multiprocessors", return_value=multiprocessors),
        mock.patch.object(backend.Launch, "run", lambda launch, device: launches.append(launch)),
    ):
        yield launches
    forget()


def check(launches: list[backend.Launch]) -> None:
    assert launches
    for launch in launches:
        assert all(0 < n <= most for n, most in zip(launch.grid, GRID, strict=False)), launch.grid
        PROMISES[launch.kernel](launch)
        checked.add(launch.kernel)


checked: set = set()


def check_call(function, *inputs: torch.Tensor, dy_dtype=None, multiprocessors: int = 132, **options) -> None:
    """Forward and backward of ``function(*inputs)``."""
    with recorded(multiprocessors) as launches:
        y = function(*inputs, **options)
        y = y[0] if isinstance(y, tuple) else y
        if y.requires_grad:
            torch.autograd.grad(
                y,
                [t for t in inputs if t is not None and t.requires_grad],
                torch.empty_like(y, dtype=dy_dtype),
            )
    check(launches)


# --- drawn tensors ----------------------------------------------------------------------------------------


multiprocessor_counts = st.sampled_from([1, 3, 16, 108, 132, 148])


@st.composite
def tensors(draw, least: int = 1, most: int = 5) -> torch.Tensor:
    """From tiny ones to some of far more than 2^31 elements, on the meta device."""
    shape = draw(shapes(least, most, 1 << draw(st.integers(8, 36)), longest=5000))
    if draw(st.integers(0, 9)) == 0:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(1 << 16, 1 << 33))
        while math.prod(shape) > 1 << 36:
            shape[int(np.argsort(shape)[-2])] = 1
    x = torch.empty(shape, device="meta", dtype=draw(st.sampled_from(DTYPES)))
    return laid_out(x, draw(layouts(x.dim())))


def grad(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def reaches(kernels: ModuleType, names: str):
    """The sample has to launch all these kernels."""

    def decorate(test):
        @functools.wraps(test)
        def run(start, count):
            checked.clear()
            test(start, count)
            assert start or {getattr(kernels, name) for name in names.split()} <= checked

        return run

    return decorate


# --- the sweeps -------------------------------------------------------------------------------------------


def check_norm(data, x, groups, function) -> None:
    """With a plan that is chosen, or one that is not the best."""
    if not lines.indexable(x, groups):
        return
    plan = data.draw(st.sampled_from(["chosen", "chosen", "read twice", "split"]), label="plan")
    forced = contextlib.nullcontext()
    if plan == "split":
        forced = mock.patch.object(channel_norm, "whole_plan", return_value=None)
    elif plan == "read twice":
        forced = mock.patch.object(lines, "_kept_plan", return_value=None)
    residual = None
    if data.draw(st.booleans(), label="residual"):
        residual = torch.empty_like(x).requires_grad_()
    parameters = (None, None)
    if data.draw(st.booleans(), label="parameters"):
        parameters = grad(2, x.shape[1], dtype=x.dtype).unbind()
    options = {"activation": data.draw(st.sampled_from(ACTIVATIONS)), "residual": residual}
    with forced:
        check_call(
            lambda x, *parameters: function(x, *parameters, **options),
            x.requires_grad_(), *parameters, multiprocessors=data.draw(multiprocessor_counts),
        )  # fmt: skip


@reaches(
    norms,
    "whole_forward whole_backward statistics apply gradient_sums gradient_apply merge_statistics merge_gradient_sums",
)
@drawn(700, 7000)
def test_batch_norms(data):
    x = data.draw(tensors(least=2))
    training = data.draw(st.booleans(), label="training") and x.numel() >= 2 * x.shape[1]
    running = torch.empty(2, x.shape[1], device="meta", dtype=x.dtype).unbind()
    check_norm(
        data, x, 0,
        lambda x, *parameters, **options: F.batch_norm(x, *running, *parameters, training=training, **options),
    )  # fmt: skip


@reaches(
    norms,
    "whole_forward whole_backward statistics apply gradient_sums gradient_apply merge_statistics merge_gradient_sums",
)
@drawn(700, 7000)
def test_group_norms(data):
    x = data.draw(tensors(least=2))
    width = data.draw(sizes(data.draw(st.sampled_from([1, 16, 64]))), label="width")
    groups = data.draw(sizes(64), label="groups")
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    x = laid_out(x.new_empty(x.shape[0], groups * width, *x.shape[2:]), order)
    if x.numel() > groups:
        check_norm(
            data, x, groups,
            lambda x, *parameters, **options: F.group_norm(x, groups, *parameters, **options),
        )  # fmt: skip


@reaches(dropout, "forward backward backward_bias_columns")
@drawn(500, 5000)
def test_dropouts(data):
    x = data.draw(tensors()).requires_grad_()
    channels = data.draw(st.booleans(), label="mask of channels") and x.dim() >= 3
    function = data.draw(st.sampled_from([F.dropout1d, F.dropout2d, F.dropout3d])) if channels else F.dropout
    if channels and x.dim() != {F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5}[function]:
        function = F.drop_path
    bias = None
    if data.draw(st.booleans(), label="bias"):
        dim = data.draw(st.integers(0, x.dim() - 1))
        bias = grad(x.shape[dim], *[1] * (x.dim() - 1 - dim), dtype=x.dtype)
    residual = None
    if data.draw(st.booleans(), label="residual"):
        residual = torch.empty_like(x, dtype=data.draw(st.sampled_from(DTYPES)))
    options = {"activation": data.draw(st.sampled_from(ACTIVATIONS)), "residual": residual, "seed": 1}
    check_call(
        lambda x, bias: function(x, 0.3, True, bias=bias, **options),
        x, bias, multiprocessors=data.draw(multiprocessor_counts),
    )  # fmt: skip


@reaches(dropout, "backward backward_bias_columns")
@drawn(300, 3000)
def test_activations_behind_products(data):
    dy = data.draw(tensors(least=2, most=2))
    with recorded(data.draw(multiprocessor_counts)) as launches:
        activation_backward(dy, torch.empty_like(dy), "relu", data.draw(st.booleans(), label="bias"))
    check(launches)


@reaches(layer_norm, "forward forward_long backward backward_long backward_columns")
@drawn(500, 5000)
def test_layer_norms(data):
    x = data.draw(tensors()).requires_grad_()
    normalized = data.draw(st.integers(1, x.dim()))
    parameters = [None, None]
    for i in range(2):
        if data.draw(st.booleans(), label=("weight", "bias")[i]):
            parameters[i] = grad(*x.shape[-normalized:], dtype=x.dtype)
    counts = data.draw(multiprocessor_counts)
    around = {"activation": data.draw(st.sampled_from(ACTIVATIONS))}
    residual = None
    if data.draw(st.booleans(), label="residual"):
        others = [torch.float64] if x.dtype == torch.float64 else FLOATS
        residual = torch.empty_like(x, dtype=data.draw(st.sampled_from(others))).requires_grad_()
    if data.draw(st.booleans(), label="dropout"):
        around |= {"p": 0.3, "seed": 1, "prenorm": data.draw(st.booleans())}
        check_call(
            lambda x, residual, *parameters: F.dropout_add_layer_norm(
                x, residual, x.shape[-normalized:], *parameters, **around
            ),
            x, residual, *parameters, multiprocessors=counts,
        )  # fmt: skip
    else:
        check_call(
            lambda x, residual, *parameters: F.layer_norm(
                x, x.shape[-normalized:], *parameters, residual=residual, **around
            ),
            x, residual, *parameters, multiprocessors=counts,
        )  # fmt: skip


@reaches(local_response_norm, "forward backward")
@drawn(250, 2500)
def test_local_response_norms(data):
    x = data.draw(tensors(least=3)).requires_grad_()
    size = data.draw(st.integers(1, 9))
    beta = data.draw(st.sampled_from([0.75, 0.5]))
    around = {"activation": data.draw(st.sampled_from(ACTIVATIONS))}
    check_call(lambda x: F.local_response_norm(x, size, beta=beta, **around), x)


@reaches(noise, "add_noise")
@drawn(300, 3000)
def test_noise(data):
    x = data.draw(tensors()).requires_grad_()
    mode = data.draw(st.sampled_from(["additive", "multiplicative"]))
    check_call(lambda x: F.gaussian_noise(x, mode=mode, seed=1), x)


matrices = st.tuples(*[sizes(5000)] * 3)  # examples, outputs, inputs


def linear(data) -> tuple[torch.Tensor, ...]:
    examples, outputs, inputs = data.draw(matrices)
    dtype = data.draw(st.sampled_from(FLOATS))
    bias = grad(outputs, dtype=dtype) if data.draw(st.booleans(), label="bias") else None
    return grad(examples, inputs, dtype=dtype), grad(outputs, inputs, dtype=dtype), bias


@reaches(drop_connect, "product merge weight_gradient shared_weight_gradient mask_weights")
@drawn(300, 3000)
def test_drop_connect(data):
    operands = linear(data)
    mode = data.draw(st.sampled_from(["example", "group", "batch"]))
    options = {"mode": mode, "p": data.draw(st.sampled_from([0.5, 0.3])), "seed": 1}
    if mode == "group":
        options["group_size"] = data.draw(sizes(300))
    options["activation"] = data.draw(st.sampled_from(ACTIVATIONS))
    counts = data.draw(multiprocessor_counts)
    check_call(F.drop_connect_linear, *operands, multiprocessors=counts, **options)


@reaches(dual_linear, "second_input product weight_gradient")
@drawn(300, 3000)
def test_products_of_noise(data):
    options = {"activation": data.draw(st.sampled_from(ACTIVATIONS)), "seed": 1}
    mode = data.draw(st.sampled_from(["flipout", "gaussian"]))
    check_call(F.drop_connect_linear, *linear(data), mode=mode, **options)


@reaches(expectation, "integrate integrate_backward average average_backward")
@drawn(200, 2000)
def test_inference_of_drop_connect(data):
    operands = linear(data)
    samples = data.draw(st.one_of(st.none(), st.integers(1, 9)))
    check_call(
        lambda *operands: F.drop_connect_linear(
            *operands, training=False, activation="tanh", samples=samples, seed=1
        ),
        *operands,
    )


@reaches(noisy_linear, "row_noise row_noise_backward")
@drawn(300, 3000)
def test_noisy_linear(data):
    operands = linear(data)
    mode = data.draw(st.sampled_from(["additive", "multiplicative", "factorised"]))
    sigma = 0.1
    options = {"mode": mode, "seed": 1, "activation": data.draw(st.sampled_from(ACTIVATIONS))}
    if mode == "factorised":
        sigma = torch.empty_like(operands[1]).requires_grad_()
        if operands[2] is not None:
            options["bias_sigma"] = torch.empty_like(operands[2]).requires_grad_()
    elif data.draw(st.booleans(), label="learned"):
        sigma = grad(dtype=operands[0].dtype)
    check_call(lambda *operands: F.noisy_linear(*operands, sigma, **options), *operands)


tensors_at: dict[int, torch.Tensor] = {}  # by address


@st.composite
def parameters(draw) -> list[torch.Tensor]:
    """A few tensors on the CPU, some of them views that begin anywhere."""
    found = []
    tensors_at.clear()
    dtype = draw(st.sampled_from(DTYPES))
    for _ in range(draw(st.integers(1, 6))):
        shape = [draw(sizes(draw(st.sampled_from([4, 300, 5000])))) for _ in range(draw(st.integers(1, 3)))]
        while math.prod(shape) > 1 << 17:
            shape[int(np.argmax(shape))] = draw(sizes(16))
        start = draw(st.integers(0, 3))
        x = torch.empty(math.prod(shape) + start, dtype=dtype)[start:].view(shape)
        x = torch.nn.Parameter(x)
        x.grad = torch.empty_like(x)
        tensors_at[x.data_ptr()] = x
        found.append(x)
    return found


@reaches(optimizers, "advance step squares fold project")
@drawn(150, 1500)
def test_optimizers(data):
    params = data.draw(parameters())
    function = data.draw(st.sampled_from([fastreg.optim.SGD, fastreg.optim.AdamW]))
    options = {}
    if data.draw(st.booleans(), label="max_norm"):
        options |= {"max_norm": 1.0, "max_norm_dim": data.draw(st.sampled_from([None, 0]))}
    if data.draw(st.booleans(), label="max_grad_norm"):
        options["max_grad_norm"] = 1.0
    with recorded() as launches:
        function(params, lr=0.1, **options).step()
    check(launches)


@reaches(penalties, "penalize project_rows shorten")
@drawn(100, 1000)
def test_penalties(data):
    params = data.draw(parameters())
    with recorded() as launches:
        fastreg.penalties.l2(params, 0.1)
        fastreg.penalties.max_norm_(params, 1.0, dim=data.draw(st.sampled_from([None, 0])))
    check(launches)


@reaches(averages, "follow copy_if")
@drawn(100, 1000)
def test_averages(data):
    params = data.draw(parameters())
    others = [torch.empty_like(p) for p in params]
    with recorded() as launches, torch.no_grad():
        averages_of_lists.follow_(params, others, 0.9)
        averages_of_lists.copy_if_(params, others, torch.tensor(True))
    check(launches)

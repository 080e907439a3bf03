"""Every launch keeps its promises, which is found without running a kernel.

A kernel leaves a mask out where its launch says that all tiles are full (EVEN, FULL, ...), and computes in 32 bits what
its launch says is small. Here tensors lie on the meta device, so that any size is free: public functions are called on
them, their launches are recorded, and of each it is shown that

- every element is in exactly one tile of one program,
- a tile that is not masked lies inside the tensor,
- offsets, counts and grids fit in their types.
"""

import contextlib
import sys
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch

from fastreg.ops import backend
from fastreg.ops.launch import forget

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
    a, view, plan = launch.arguments, launch.arguments["view"], launch.arguments["plan"]
    numel = (a["tensors"].y if launch.kernel is dropout.forward else a["tensors"].dx).numel()
    rows, whole, tail = view.rows or 1, view.vectors * plan.vector, a.get("tail", 0)
    assert rows * (whole + tail) == numel
    assert tail < plan.vector
    assert plan.ragged == (tail > 0)
    assert tail == 0 or view.rows is None  # only one row has an end that is taken care of
    assert plan.columns % plan.vector == 0
    row_blocks, column_blocks = -(-rows // plan.rows), max(1, -(-whole // plan.columns))
    if launch.kernel is dropout.backward_bias_columns:
        assert launch.grid[0] == column_blocks
        assert launch.grid[1] <= row_blocks
        assert plan.bias == "columns"
    else:
        assert launch.grid == (row_blocks * column_blocks,)
    check_covered(rows, row_blocks, plan.rows, masked=not plan.even)
    check_covered(whole, column_blocks, plan.columns, masked=not plan.even)
    assert rows % view.mask_repeat == 0
    if plan.bias == "rows":
        assert rows % (view.bias_repeat * view.bias_size) == 0  # read without a mask
    partial = getattr(a["tensors"], "partial", None)
    if partial is not None:
        by_rows = launch.kernel is dropout.backward
        assert partial.shape == ((rows, column_blocks) if by_rows else (launch.grid[1], whole))
    assert plan.wide or numel < INT32


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
    view, plan = launch.arguments["view"], launch.arguments["plan"]
    channels = view.channel_vectors * (plan.vector if plan.last else 1)
    inner = 1 if plan.last else view.inner_vectors * plan.vector
    numel = launch.arguments["tensors"].x.numel()
    assert view.samples * channels * inner == numel
    blocks = -(-channels // plan.channels)
    assert power_of_2(plan.rows)
    if plan.last:
        assert plan.channels % plan.vector == 0
        check_covered(view.samples * blocks, *launch.grid, plan.rows, masked=True)
    else:
        assert launch.grid[0] % blocks == 0
        check_covered(view.samples * view.inner_vectors, launch.grid[0] // blocks, plan.rows, masked=True)
    assert plan.wide or numel < INT32


# --- one row ----------------------------------------------------------------------------------------------


def check_noise(launch: backend.Launch) -> None:
    a, plan = launch.arguments, launch.arguments["plan"]
    whole, tail = a["vectors"] * plan.vector, a["tail"]
    assert whole + tail == a["x_ptr"].numel()
    assert 0 <= tail < plan.vector
    assert plan.ragged == (tail > 0)
    assert plan.block % plan.vector == 0
    check_covered(whole, *launch.grid, plan.block, masked=True)
    assert plan.wide or whole + tail < INT32


def check_average(launch: backend.Launch) -> None:
    a, plan = launch.arguments, launch.arguments["plan"]
    assert a["elements"] == a["tensors"].mean.numel()
    check_covered(a["elements"], *launch.grid, plan.block, masked=True)
    assert plan.wide or a["elements"] < INT32


# --- rows of a matrix, and matrix products ----------------------------------------------------------------


def check_rows(launch: backend.Launch) -> None:
    """A program a block of a row, or a whole row."""
    a = launch.leaves
    rows, columns = next(a[name] for name in ("x_ptr", "dy_ptr", "tensors.x") if name in a).shape
    assert a["columns"] == columns
    blocks = a.get("blocks", 1)
    block = next(a[name] for name in ("BLOCK", "plan.block") if name in a)
    assert launch.grid == (rows * blocks,)
    if "blocks" in a:
        check_covered(columns, blocks, block, masked=True)
    assert block % 8 == 0
    assert columns + block <= INT32


def check_masked_product(launch: backend.Launch) -> None:
    operands, shape, plan = (launch.arguments[name] for name in ("operands", "shape", "plan"))
    examples, rows, columns = shape.examples, shape.rows, shape.columns
    assert operands.u.shape == (examples, columns)
    assert operands.w.shape == ((columns, rows) if plan.transposed else (rows, columns))
    programs, splits = launch.grid
    row_blocks = -(-rows // plan.rows)
    assert programs % row_blocks == 0
    programs //= row_blocks
    check_covered(rows, row_blocks, plan.rows, masked=not plan.even)
    check_covered(columns, splits * shape.trips, plan.columns, masked=not plan.even)
    assert plan.split == (splits > 1)
    if splits > 1:
        assert launch.arguments["epilogue"].z.shape == (splits, examples, rows)
    span = shape.group_size * (1 if plan.shared else 16)
    assert programs % shape.chunks == 0
    check_no_idle(examples, programs // shape.chunks, span)
    check_covered(min(span, examples), shape.chunks, plan.examples, masked=True)
    assert plan.own == (not plan.shared and shape.group_size == 1)
    if plan.own:
        assert plan.examples == 16
    assert plan.columns % 8 == plan.rows % 8 == 0  # whole calls of Philox


def check_merged_product(launch: backend.Launch) -> None:
    a = launch.arguments
    assert a["partial_ptr"].shape == (a["splits"], a["examples"], a["rows"])
    assert launch.grid[0] == a["examples"]
    check_covered(a["rows"], launch.grid[1], a["BLOCK"], masked=True)


def check_weight_blocks(launch: backend.Launch, outputs: int, inputs: int) -> None:
    """Blocks of outputs times blocks of inputs."""
    plan = launch.arguments["plan"]
    assert launch.grid == (-(-outputs // plan.rows) * -(-inputs // plan.columns),)
    assert plan.columns % 8 == 0


def check_weight_gradient(launch: backend.Launch) -> None:
    a, tensors, shape = launch.arguments, launch.arguments["tensors"], launch.arguments["shape"]
    assert tensors.dz.shape == (shape.examples, shape.outputs)
    assert tensors.v.shape == (shape.examples, shape.inputs)
    check_weight_blocks(launch, shape.outputs, shape.inputs)
    if launch.kernel is drop_connect.weight_gradient:
        assert a["plan"].own == (shape.group_size == 1)
        check_covered(shape.examples, a["words"], 16 * shape.group_size, masked=True)
    if launch.kernel is drop_connect.shared_weight_gradient:
        check_no_idle(shape.examples, a["groups"], shape.group_size)


def check_masked_weights(launch: backend.Launch) -> None:
    a = launch.arguments
    assert a["w_ptr"].shape == a["masked_ptr"].shape == (a["outputs"], a["inputs"])
    check_weight_blocks(launch, a["outputs"], a["inputs"])


def check_two_products(launch: backend.Launch) -> None:
    operands, shape, plan = (launch.arguments[name] for name in ("operands", "shape", "plan"))
    assert operands.u.shape == operands.u2.shape == (shape.examples, shape.columns)
    size = shape.rows, shape.columns
    assert operands.w.shape == (size[::-1] if plan.transposed else size)
    row_blocks = -(-shape.rows // plan.rows)
    assert launch.grid == (-(-shape.examples // plan.examples) * row_blocks,)
    check_covered(shape.rows, row_blocks, plan.rows, masked=not plan.even)
    check_covered(shape.columns, -(-shape.columns // plan.columns), plan.columns, masked=not plan.even)
    assert plan.columns % 8 == plan.rows % 8 == 0


# --- tables of many tensors -------------------------------------------------------------------------------


def check_chunks(launch: backend.Launch) -> None:
    """Each tensor of the table is cut into chunks, each of them one program's; those of rows end with their row."""
    a, kernel = launch.leaves, launch.kernel
    block = a["BLOCK"] if "BLOCK" in a else a["plan.block"]
    width = a.get("WIDTH", a.get("plan.width"))
    entries, chunks = a["entries_ptr"].numpy(), a["chunks_ptr"].numpy()
    assert launch.grid == (chunks.shape[1],) == (a["programs"],)
    assert entries.shape[1] == a["tensors"]
    rows = a.get("plan.rows", False) or kernel in (penalties.project_rows, penalties.shorten)
    lengths = None
    if kernel.fn.__module__ == optimizers.__name__:
        rows = a.get("plan.projection") == "rows" or "chunk_units_ptr" in a
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
            end = np.minimum(first + block, numel[tensor])
            if width:
                end = np.minimum(first + row * (block // width), numel[tensor])
            elif rows:
                end = np.minimum(end, first - first % row + row)
        assert first[0] == 0
        assert (end[:-1] == first[1:]).all()
        assert end[-1] == (sizes_of(launch)[tensor] if len(chunks) == 3 else numel[tensor])
        if (width or 1) > 1:  # whole rows, each in a row of the tile
            assert power_of_2(width)
            assert row <= width <= block
            assert (first % row == 0).all()
            assert ((end - first) % row == 0).all()
            assert ((end - first) // row <= block // width).all()
        else:
            assert (end - first <= block).all()
        if "chunk_units_ptr" in a:
            row = row or int(end[-1])
            assert (a["chunk_units_ptr"].numpy()[mine] == units + first // row).all()
            assert (first // row == (end - 1) // row).all()
            units += int(end[-1]) // row
    if kernel in (averages.follow, averages.copy_if):  # a full tile is taken for one that begins on 16 bytes
        assert block % 16 == 0
        assert (chunks[1] % block == 0).all()


tensors_at: dict[int, torch.Tensor] = {}  # by address: those of the test, for ``sizes_of``


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

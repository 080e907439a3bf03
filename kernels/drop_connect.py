"""DropConnect (Wan et al. 2013): a linear layer whose weights are dropped, with a separate mask for every example.

    z[b, n] = scale sum_k m(b, n, k) W[n, k] v[b, k] + bias[n]             forward            (``product``)
    dv[b, k] = scale sum_n m(b, n, k) W[n, k] dz[b, n]                     input gradient     (``product``, transposed)
    dW[n, k] = scale sum_b m(b, n, k) dz[b, n] v[b, k]                     weight gradient    (``weight_gradient``)

A connection (b, n, k) is kept where m is 1. No mask is stored: m(b, n, k) is a bit of Philox under (seed, b, n, k),
so it is the same in every pass and for every tiling (``fastreg/random.py``). ``group_size`` neighbouring examples,
or all of a batch, may share a mask.

Random bits. A lane is 16 random bits of one weight, and serves 16 examples (with shared masks, 16 groups). So
Philox takes 1/128 of a call for a connection, which is 0.4 instructions. p = 1/2 needs one bit for a connection,
and any other p one bit for each binary digit of p.

Cost with a mask for every example: memory does not matter, because each of the B N K connections takes
instructions.

- ``product`` computes on the tensor cores. The 16 examples of a tile share its weights, but not their products: in
  place of 16 dot products of a row of W, the kernel multiplies the tile, masked for example e (2 instructions for
  two elements), by the examples' columns, where all columns but e are set to zero. So all examples add to one tile
  of z. The tensor cores do 16 times the work, and have the time for it: the kernel issues 2.8 instructions for a
  connection (sm_90, p = 1/2), and issue is the limit. fp32 takes three products of TF32 (``_split_fp32``) and 7
  instructions. An infinite weight times a zero column gives NaN, and so do the two parts of an infinity or of a
  number that rounds to one. ``_repair`` computes every result again that is NaN at the end, without zero columns
  and without parts. Programs without NaN pay for one test.
- ``weight_gradient`` is no matrix product, because its mask depends on all three indices. It takes one predicated
  FFMA for a connection and one instruction that turns the bit into the predicate; 3.6 instructions with everything
  around them.

Cost with shared masks: a group of 16 or more examples fills tiles by itself (``Plan.shared``). Then ``product`` is
a dense product whose left operand, W, is masked in registers, where the tensor cores read it, and
``shared_weight_gradient`` is a dense product with a mask on the result. That takes about 9 instructions for a
weight and 128 examples (sm_90, p = 1/2); reading W once, in 16 bits, leaves time for 19. For groups of more than a
few hundred examples it is cheaper to mask once: ``mask_weights`` is one pass over W (2 accesses and 13 instructions
for an element), and a dense product follows.

Cost of an activation f. Forward, it is computed where the sum is stored (``_finish``), and costs only its
instructions; gelu and others, whose derivative does not follow from their result, also store the sum: e more bytes
for an output. Backward, dz = dy f'(z) is one pass over [examples, outputs], which also sums the bias gradient: 3 e
bytes for an output, where the bias gradient alone reads e. On an H100 6 bytes take 2 ps, and the gradients of a
connection 0.25 ps (both predicted), so with 4,096 inputs that pass is 1/500 of the backward pass. Computing f'
where the two products load dy would repeat it for every 64 and every 32 inputs, and would read a second tensor each
time.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import activation
from .fastmath import INTERPRETED, bound, tf32, upcast
from .philox import high_word, low_word, philox4x32
from .ptxas import terms
from .structs import of_constants
from .tiles import block_of_program, plus_product, weight_tile

EXAMPLES = tl.constexpr(16)  # examples, or groups of them, that one lane of random bits serves
# Examples in one step of an unrolled loop. With all 16, sm_90 takes three times the shared memory, and Triton for
# sm_100 emits nothing but a trap instruction.
UNROLLED = tl.constexpr(4)
CALL = tl.constexpr(8)  # lanes of one call of Philox: neighbouring inputs
# Columns of a tile of ``_repair``: with more, it would take the registers of the loop before it.
REPAIRED = 16
NOT_SPECIALIZED = ("seed_ptr", "seed", "offset", "keep")


class Operands(NamedTuple):
    """Pointers to what is multiplied, fp32, fp16 or bf16."""

    u: tl.tensor  # [examples, columns]: v (forward) or dz
    w: tl.tensor  # [rows, columns]; transposed: [columns, rows]


class Epilogue(NamedTuple):
    """Pointers for the end of a product: z = activation(scale sum + bias)."""

    bias: tl.tensor  # [rows], or None
    z: tl.tensor  # [examples, rows]; with split columns, fp32 partial sums [splits, examples, rows]
    before: tl.tensor  # [examples, rows], receives the argument of the activation; or None


class Shape(NamedTuple):
    """The sizes of a product: integers."""

    examples: tl.tensor
    rows: tl.tensor
    columns: tl.tensor
    group_size: tl.tensor
    chunks: tl.tensor  # tiles of examples in a group (shared), or in the 16 groups of a word of lanes
    trips: tl.tensor  # tiles of columns in a split


class GradientTensors(NamedTuple):
    """Pointers of a weight gradient, fp32, fp16 or bf16."""

    dz: tl.tensor  # [examples, outputs]
    v: tl.tensor  # [examples, inputs]
    dw: tl.tensor  # [outputs, inputs]


class GradientShape(NamedTuple):
    """The sizes of a weight gradient: integers."""

    examples: tl.tensor
    outputs: tl.tensor
    inputs: tl.tensor
    group_size: tl.tensor


class Plan(NamedTuple):
    """Compile-time choices. A tile of W, or of its transpose, is [rows, columns]."""

    rows: int
    columns: int
    digits: int  # binary digits of the probability
    examples: int = 0  # of a tile
    transposed: bool = False  # the product is with the transpose of W
    even: bool = False  # the tiles cover W exactly
    shared: bool = False  # all examples of a tile have one mask
    own: bool = False  # every example has its own mask: group_size is 1
    three: bool = False  # fp32 is multiplied as three products of TF32
    split: bool = False  # each program sums a part of the columns
    activation: str | None = None


class Matrix(NamedTuple):
    """The size of W, as ``_weights`` reads it from a ``Shape``."""

    rows: tl.tensor
    columns: tl.tensor


class Draw(NamedTuple):
    """What determines all masks: scalars."""

    seed: tl.tensor
    offset: tl.tensor
    keep: tl.tensor  # the binary digits of the probability of keeping a connection


class Examples(NamedTuple):
    """The examples of a tile, and where their random bits are."""

    number: tl.tensor  # [examples of a tile]
    known: tl.tensor  # which of them exist and belong to this tile
    bit: tl.tensor  # which bit of its lanes each one takes
    word: tl.tensor  # which lanes: scalars from here on
    first_bit: tl.tensor
    bits: tl.tensor  # how many different ones


class Outputs(NamedTuple):
    """The elements of a tile of results."""

    row: tl.tensor  # [rows]
    in_rows: tl.tensor  # which rows exist
    place: tl.tensor  # [rows, examples]: offsets from the first element
    inside: tl.tensor  # which elements exist


class Masked(NamedTuple):
    """Weights, zero where they are dropped, and their lanes, shifted to the next example."""

    w: tl.tensor
    lanes: tl.tensor


class Parts(NamedTuple):
    """A factor of a matrix product; fp32 as a sum of two numbers of TF32."""

    high: tl.tensor
    low: tl.tensor


# --- random bits ------------------------------------------------------------------------------------------


@triton.jit
def _draw(seed_ptr, seed, offset, keep):
    return Draw(seed if seed_ptr is None else tl.load(seed_ptr), offset, keep)


@triton.jit
def _word_and_bit(group):
    """Which word of lanes has the bit of a group, and which bit that is."""
    word = group // EXAMPLES
    return word, group - word * EXAMPLES


@triton.jit
def _kept(output, call, word, draw, plan: tl.constexpr):
    """The lanes of outputs [N] and calls [C] of 8 inputs, in pairs: uint32 [N, C, 2, 2]. A set bit keeps."""
    DIGITS: tl.constexpr = plan.digits
    none = tl.zeros([output.shape[0], call.shape[0]], tl.uint32)
    c0 = none + call[None, :].to(tl.uint32)
    c1 = none + output[:, None].to(tl.uint32)
    c2 = none + low_word(draw.offset)
    c3 = none + high_word(draw.offset) + word
    k0 = low_word(draw.seed)
    k1 = high_word(draw.seed)
    a0, a1, a2, a3 = philox4x32(c0, c1, c2, c3, k0, k1)
    for digit in tl.static_range(1, DIGITS):
        r0, r1, r2, r3 = philox4x32(c0, c1, c2, c3 + (digit << 28), k0, k1)
        one = (0 - (draw.keep >> digit & 1)).to(tl.uint32)  # all bits set where the digit is one, else none
        a0 = _horner(a0, r0, one)
        a1 = _horner(a1, r1, one)
        a2 = _horner(a2, r2, one)
        a3 = _horner(a3, r3, one)
    return tl.join(tl.join(a0, a2), tl.join(a1, a3))


@triton.jit
def _horner(kept, bits, one):
    """kept | bits where the digit is one, else kept & bits: the majority of the three, which is a single LOP3."""
    return (kept & bits) | (one & (kept | bits))


@triton.jit
def _lanes(output, call, word, bit, draw, plan: tl.constexpr):
    """int16 [N, 8 C] for outputs [N] and calls [C]: the sign bit belongs to example ``bit`` of the word, the bits below
    it to the next examples."""
    # Shifted in pairs, which takes one instruction for two lanes.
    pairs = _kept(output, call, word, draw, plan) << bit
    lanes = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(lanes, [output.shape[0], call.shape[0] * CALL])


# --- masked weights ---------------------------------------------------------------------------------------


@triton.jit
def _signs(lanes):
    """int32: all bits set where the sign bit of the lane is, else none; and the lanes, shifted to the next example."""
    if INTERPRETED:
        return lanes.to(tl.int32) >> 31, lanes << 1
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $3, 0, 0x9999; prmt.b32 $1, $3, 0, 0xBBBB; add.u32 $2, $3, $3;",
            "=r,=r,=r,r",
            [lanes],
            dtype=(tl.int32, tl.int16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def _and(w, signs):
    return (w.to(tl.int32, bitcast=True) & signs).to(tl.float32, bitcast=True)


@triton.jit
def _masked(w, lanes):
    """w where the sign bit of its lane is set, else 0."""
    if w.dtype == tl.float32:
        signs, lanes = _signs(lanes)
        return Masked(_and(w, signs), lanes)
    elif INTERPRETED:
        return Masked(_where(lanes < 0, w), lanes << 1)
    else:
        # Three instructions for two elements: a byte permutation that repeats the sign bits, an AND, and a sum that
        # shifts both lanes of a word (the lower lane carries into the upper only after 16 examples).
        bits, lanes = tl.inline_asm_elementwise(
            """{
            .reg .b32 signs;
            prmt.b32 signs, $3, 0, 0xBB99;
            and.b32 $0, signs, $2;
            add.u32 $1, $3, $3;
            }""",
            "=r,=r,r,r",
            [w.to(tl.int16, bitcast=True), lanes],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
        return Masked(bits.to(w.dtype, bitcast=True), lanes)


@triton.jit
def _split_fp32(x):
    """fp32 as a sum of two numbers: x rounded to TF32, and the rest. The tensor cores drop the last 13 bits of both.

    TF32 keeps 10 bits after the leading one. For x from 1 to 2, rounding to nearest leaves a rest of at most 2^-11,
    with 12 bits, and the tensor cores drop its last bit, 2^-23. (Truncating x would leave a rest of 13 bits, which
    loses up to 3 2^-23, always with the same sign.) A product of two such numbers misses at most 2^-22, the product
    of both rests, which is not computed, and 2^-23 for each dropped bit: together 2^-21 of its size, where fp32 has
    2^-24. Most of these errors cancel in a sum.

    Infinities, and the largest numbers, which round to infinity, leave NaN or an infinity of the other sign as the
    rest.
    """
    high = tf32(x)
    return Parts(high, x - high)


@triton.jit
def _parts(x, plan: tl.constexpr):
    """x as a factor of ``_plus_product``, which reads no ``low`` unless it makes three products."""
    if plan.three:
        return _split_fp32(x)
    else:
        return Parts(x, x)


@triton.jit
def _plus_product(z, w, u, plan: tl.constexpr):
    """z + w u. fp32 is one product of TF32, or three: all but that of both rests."""
    if plan.three:
        z = plus_product(z, w.low, u.high, "tf32")
        z = plus_product(z, w.high, u.low, "tf32")
    return plus_product(z, w.high, u.high, "tf32")


@triton.jit
def _plus_masked_product(z, w, lanes, u, columns, plan: tl.constexpr):
    """z + the masked w times the ``columns`` (bool) of u; and the lanes, shifted to the next example."""
    if plan.three:
        signs, lanes = _signs(lanes)
        w = Parts(_and(w.high, signs), _and(w.low, signs))
    else:
        masked = _masked(w.high, lanes)
        w, lanes = Parts(masked.w, masked.w), masked.lanes
    return _plus_product(z, w, _parts(_where(columns, u), plan), plan), lanes


@triton.jit
def _where(condition, values):
    return tl.where(condition, values, tl.zeros_like(values))


@triton.jit
def _weights(w_ptr, first_row, first_column, word, bit, shape, draw, plan: tl.constexpr):
    """A tile of W (or of its transpose) [rows, columns], and its lanes."""
    w = weight_tile(w_ptr, first_row, first_column, shape, plan)
    row = first_row + tl.arange(0, plan.rows)
    column = first_column + tl.arange(0, plan.columns)
    if plan.transposed:
        call = first_row // CALL + tl.arange(0, plan.rows // CALL)
        return tl.trans(w), tl.trans(_lanes(column, call, word, bit, draw, plan))
    else:
        call = first_column // CALL + tl.arange(0, plan.columns // CALL)
        return w, _lanes(row, call, word, bit, draw, plan)


# --- the product ------------------------------------------------------------------------------------------


@triton.jit
def _finish(z, at, epilogue, scale, ACTIVATION: tl.constexpr):
    """Stores activation(scale z + bias), and the argument of the activation where ``before`` asks for it.

    z: fp32 [rows, examples].
    """
    z = z * scale
    if epilogue.bias is not None:
        z += upcast(tl.load(epilogue.bias + at.row, mask=at.in_rows, other=0.0))[:, None]
    if epilogue.before is not None:
        tl.store(epilogue.before + at.place, z.to(epilogue.before.dtype.element_ty), mask=at.inside)
    if ACTIVATION is not None:
        z = activation.forward(z, ACTIVATION, epilogue.z.dtype.element_ty)
    tl.store(epilogue.z + at.place, z.to(epilogue.z.dtype.element_ty), mask=at.inside)


@triton.jit
def _write(z, at, epilogue, scale, plan: tl.constexpr):
    """Stores the results of a tile, or its partial sums."""
    ACTIVATION: tl.constexpr = plan.activation
    if plan.split:
        tl.store(epilogue.z + at.place, z, mask=at.inside)
    else:
        _finish(z, at, epilogue, scale, ACTIVATION)


@triton.jit
def _examples(tile, shape, plan: tl.constexpr):
    """The examples of a program: chunk ``tile % chunks`` of a group (shared), or of 16 groups."""
    part = tile // shape.chunks
    first = (tile % shape.chunks) * plan.examples
    span = shape.group_size if plan.shared else EXAMPLES * shape.group_size
    within = first + tl.arange(0, plan.examples)
    index = part * span + within
    known = (index < shape.examples) & (within < span)
    if plan.shared:
        word, first_bit = _word_and_bit(part)
        bit = tl.zeros_like(within) + first_bit
    else:
        word = part
        first_bit = first // shape.group_size
        bit = within // shape.group_size
    bits = tl.max(tl.where(known, bit, 0), 0) - first_bit + 1
    return Examples(index, known, bit, word, first_bit, bits)


@triton.constexpr_function
def _repair_plan(plan):
    return of_constants(plan, Plan)._replace(columns=REPAIRED, even=False)


@triton.jit
def _repair(
    nan, operands, epilogue, scale, examples, first_row, first_column, end, shape, draw, plan: tl.constexpr
):
    """Computes the results again that are NaN (bool [rows, examples]): one example at a time, without zero columns.

    A weight that is infinite or NaN makes NaN of every zero column, also for the examples that dropped it.
    """
    ROWS: tl.constexpr = plan.rows
    COLUMNS: tl.constexpr = plan.columns
    COUNT: tl.constexpr = plan.examples
    row = first_row + tl.arange(0, ROWS)
    for turn in range(COUNT):
        one = tl.arange(0, COUNT) == turn
        bit = tl.max(tl.where(one, examples.bit, 0), 0)
        example = tl.max(tl.where(one & examples.known, examples.number, 0), 0).to(tl.int64)
        z = tl.zeros([ROWS], tl.float32)
        for start in range(bound(first_column), bound(end), COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            place = example * shape.columns + column
            u = upcast(tl.load(operands.u + place, mask=column < shape.columns, other=0.0))
            w, lanes = _weights(operands.w, first_row, start, examples.word, bit, shape, draw, plan)
            z += tl.sum(terms(_where(lanes < 0, upcast(w)), u[None, :], 1), 1)
        in_rows = row < shape.rows
        wanted = (tl.max((nan & (one & examples.known)[None, :]).to(tl.int32), 1) > 0) & in_rows
        at = Outputs(row, in_rows, example * shape.rows + row[:, None], wanted[:, None])
        _write(z[:, None], at, epilogue, scale, plan)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def product(
    operands: Operands,
    epilogue: Epilogue,
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    keep: tl.int32,
    scale: tl.float32,
    shape: Shape,
    plan: tl.constexpr,
):
    """z[b, r] = activation(scale sum_c m(b, r, c) W[r, c] u[b, c] + bias[r]).

    Grid: chunks of examples times blocks of rows, splits of the columns.
    """
    ROWS: tl.constexpr = plan.rows
    COUNT: tl.constexpr = plan.examples
    draw = _draw(seed_ptr, seed, offset, keep)
    tile, row_block = block_of_program(tl.num_programs(0) // tl.cdiv(shape.rows, ROWS))
    first_row = row_block * ROWS
    first_column = tl.program_id(1) * shape.trips * plan.columns
    row = first_row + tl.arange(0, ROWS)
    examples = _examples(tile, shape, plan)
    z = tl.zeros([ROWS, COUNT], tl.float32)
    for trip in range(bound(shape.trips)):
        start = first_column + trip * plan.columns
        column = start + tl.arange(0, plan.columns)
        u = tl.load(
            operands.u + examples.number.to(tl.int64)[None, :] * shape.columns + column[:, None],
            mask=examples.known[None, :] & (column < shape.columns)[:, None],
            other=0.0,
        )
        w, lanes = _weights(
            operands.w, first_row, start, examples.word, examples.first_bit, shape, draw, plan
        )
        if plan.shared:
            z = _plus_product(z, _parts(_masked(w, lanes).w, plan), _parts(u, plan), plan)
        elif plan.own:
            w = _parts(w, plan)
            for index in range(0, EXAMPLES, UNROLLED):
                for step in tl.static_range(UNROLLED):
                    mine = (examples.bit == index + step)[None, :]
                    z, lanes = _plus_masked_product(z, w, lanes, u, mine, plan)
        else:
            w = _parts(w, plan)
            for index in range(bound(examples.bits)):
                mine = (examples.bit == examples.first_bit + index)[None, :]
                z, lanes = _plus_masked_product(z, w, lanes, u, mine, plan)

    in_rows = row < shape.rows
    inside = examples.known[None, :] & in_rows[:, None]
    place = examples.number.to(tl.int64)[None, :] * shape.rows + row[:, None]
    at = Outputs(row, in_rows, place, inside)
    if plan.split:
        sums = epilogue.z + tl.program_id(1).to(tl.int64) * shape.examples * shape.rows
        epilogue = Epilogue(epilogue.bias, sums, epilogue.before)
    nan = z != z
    _write(z, at, epilogue, scale, plan)
    if plan.three or not plan.shared:  # noqa: SIM102 - decided at compile time, unlike the next
        if tl.max(tl.max(nan.to(tl.int32), 1), 0) > 0:
            tl.debug_barrier()  # a thread may overwrite results that another one has stored
            end = tl.minimum(first_column + shape.trips * plan.columns, shape.columns)
            _repair(
                nan, operands, epilogue, scale, examples, first_row, first_column, end, shape, draw,
                _repair_plan(plan),
            )  # fmt: skip


@triton.jit
def merge(
    partial_ptr,  # fp32 [splits, examples, rows]
    epilogue: Epilogue,
    scale: tl.float32,
    examples,
    rows,
    splits,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z = activation(scale sum of the splits + bias). Grid: examples, blocks of rows."""
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_rows = row < rows
    place = tl.program_id(0).to(tl.int64) * rows + row
    stride = examples.to(tl.int64) * rows
    z = tl.zeros([BLOCK], tl.float32)
    for split in range(bound(splits)):
        z += tl.load(partial_ptr + split * stride + place, mask=in_rows, other=0.0)
    _finish(z[:, None], Outputs(row, in_rows, place[:, None], in_rows[:, None]), epilogue, scale, ACTIVATION)


# --- the weight gradient ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def weight_gradient(
    tensors: GradientTensors,
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    keep: tl.int32,
    scale: tl.float32,
    shape: GradientShape,
    words,  # of lanes: blocks of 16 groups
    plan: tl.constexpr,
):
    """dW[n, k] = scale sum_b m(b, n, k) dz[b, n] v[b, k]. Grid: blocks of outputs times blocks of inputs."""
    OUTPUTS: tl.constexpr = plan.rows
    CALLS: tl.constexpr = plan.columns // CALL
    draw = _draw(seed_ptr, seed, offset, keep)
    input_block, output_block = block_of_program(tl.cdiv(shape.inputs, plan.columns))
    output = output_block * OUTPUTS + tl.arange(0, OUTPUTS)
    call = input_block * CALLS + tl.arange(0, CALLS)
    input = call[:, None] * CALL + tl.arange(0, CALL)[None, :]
    dw = tl.zeros([OUTPUTS, CALLS, CALL], tl.float32)
    for word in range(bound(words)):
        pairs = _kept(output, call, word, draw, plan)
        # Each lane in the upper half of a word; the lower half is not cleared.
        lanes = tl.reshape(tl.join(pairs << 16, pairs), [OUTPUTS, CALLS, CALL])
        for index in tl.static_range(EXAMPLES):
            kept = (lanes & (0x80000000 >> index)) != 0
            start = (word * EXAMPLES + index) * shape.group_size
            if plan.own:
                dw = _plus_outer(dw, kept, start, tensors, output, input, shape)
            else:
                for example in range(
                    bound(start), bound(tl.minimum(start + shape.group_size, shape.examples))
                ):
                    dw = _plus_outer(dw, kept, example, tensors, output, input, shape)
    place = output.to(tl.int64)[:, None, None] * shape.inputs + input[None, :, :]
    inside = (output < shape.outputs)[:, None, None] & (input < shape.inputs)[None, :, :]
    tl.store(tensors.dw + place, (dw * scale).to(tensors.dw.dtype.element_ty), mask=inside)


@triton.jit
def _plus_outer(dw, kept, example, tensors, output, input, shape):
    """dw + dz v where the connection is kept. A select: a dropped connection adds nothing, not even NaN."""
    row = tl.full([1], 0, tl.int64) + example
    known = row < shape.examples
    dz = tl.load(tensors.dz + row * shape.outputs + output, mask=known & (output < shape.outputs), other=0.0)
    v = tl.load(
        tensors.v + row[:, None] * shape.inputs + input,
        mask=known[:, None] & (input < shape.inputs),
        other=0.0,
    )
    dz, v = (
        dz.to(tl.float32),
        v.to(tl.float32),
    )  # a thread has few of them: ``upcast``'s pairs take more registers
    none = tl.zeros_like(dw)
    return tl.where(kept, tl.fma(dz[:, None, None] + none, v[None, :, :] + none, dw), dw)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def shared_weight_gradient(
    tensors: GradientTensors,
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    keep: tl.int32,
    scale: tl.float32,
    shape: GradientShape,
    groups,
    plan: tl.constexpr,
):
    """dW = scale sum of the groups' dz^T v, each under its mask. Grid: blocks of outputs times blocks of inputs."""
    OUTPUTS: tl.constexpr = plan.rows
    INPUTS: tl.constexpr = plan.columns
    COUNT: tl.constexpr = plan.examples
    PRECISION: tl.constexpr = "tf32x3" if plan.three else "tf32"
    draw = _draw(seed_ptr, seed, offset, keep)
    output_block, input_block = block_of_program(tl.cdiv(shape.outputs, OUTPUTS))
    output = output_block * OUTPUTS + tl.arange(0, OUTPUTS)
    input = input_block * INPUTS + tl.arange(0, INPUTS)
    call = input_block * (INPUTS // CALL) + tl.arange(0, INPUTS // CALL)
    dw = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for group in range(bound(groups)):
        first = group * shape.group_size
        end = tl.minimum(first + shape.group_size, shape.examples)
        product = tl.zeros([OUTPUTS, INPUTS], tl.float32)
        for start in range(bound(first), bound(end), COUNT):
            example = start + tl.arange(0, COUNT)
            place = example.to(tl.int64)[:, None]
            known = (example < end)[:, None]
            dz = tl.load(
                tensors.dz + place * shape.outputs + output[None, :],
                mask=known & (output < shape.outputs),
                other=0.0,
            )
            v = tl.load(
                tensors.v + place * shape.inputs + input[None, :],
                mask=known & (input < shape.inputs),
                other=0.0,
            )
            product = plus_product(product, tl.trans(dz), v, PRECISION)
        word, bit = _word_and_bit(group)
        dw += _where(_lanes(output, call, word, bit, draw, plan) < 0, product)
    place = output.to(tl.int64)[:, None] * shape.inputs + input[None, :]
    inside = (output < shape.outputs)[:, None] & (input < shape.inputs)[None, :]
    tl.store(tensors.dw + place, (dw * scale).to(tensors.dw.dtype.element_ty), mask=inside)


# --- masks in memory --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=(*NOT_SPECIALIZED, "group"))
def mask_weights(
    w_ptr,  # fp32, fp16 or bf16 [outputs, inputs]
    masked_ptr,  # the same; may be w_ptr
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    keep: tl.int32,
    outputs,
    inputs,
    group: tl.int32,
    plan: tl.constexpr,
):
    """W where ``group`` keeps the connection, else 0. Grid: blocks of outputs times blocks of inputs."""
    draw = _draw(seed_ptr, seed, offset, keep)
    output_block, input_block = block_of_program(tl.cdiv(outputs, plan.rows))
    first_output, first_input = output_block * plan.rows, input_block * plan.columns
    word, bit = _word_and_bit(group)
    w, lanes = _weights(w_ptr, first_output, first_input, word, bit, Matrix(outputs, inputs), draw, plan)
    output = first_output + tl.arange(0, plan.rows)
    input = first_input + tl.arange(0, plan.columns)
    place = output.to(tl.int64)[:, None] * inputs + input[None, :]
    inside = (output < outputs)[:, None] & (input < inputs)[None, :]
    tl.store(masked_ptr + place, _where(lanes < 0, w), mask=inside)

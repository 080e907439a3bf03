"""DropConnect (Wan et al. 2013): a linear layer in which every example has a mask of its own for all weights.

    z[b, n] = scale sum_k m(b, n, k) W[n, k] v[b, k] + bias[n]             forward            (``product``)
    dv[b, k] = scale sum_n m(b, n, k) W[n, k] dz[b, n]                     input gradient     (``product``, TRANSPOSED)
    dW[n, k] = scale sum_b m(b, n, k) dz[b, n] v[b, k]                     weight gradient    (``weight_gradient``)

m is 1 where the connection is kept. No mask is stored: m(b, n, k) is a bit of Philox under (seed, b, n, k), the same
in every pass and every tiling (``fastreg/random.py``). ``group_size`` neighbouring examples may share a mask: all of a
batch, or fewer.

Cost of own masks: bytes hardly count, for each of the B N K connections takes instructions. A lane of 16 random bits
serves 16 examples: Philox is 1/128 of a call a connection (0.4 instructions), p = 1/2 needs one bit, other p one a
binary digit.

``product`` has each example's masked weights on the tensor cores. They share the tile of W, but no product: in
place of 16 dot products of a row of W with 16 examples, example e multiplies the tile (W and its mask, 2
instructions for two elements) with the examples' columns, of which all but e are zero. So all accumulate in one tile of
z, and the tensor cores do 16 times the work, which they can: 2.8 instructions a connection are issued (sm_90, p = 1/2),
and the limit is their issue, not the tensor cores. fp32 takes three products of TF32 (``_halves``) and 7 instructions.
Zero columns times an infinite weight are NaN, and so are the halves of infinities and of numbers that round to them:
what is NaN in the end is computed once more, without either (``_repair``), which costs those that have none a test a
program.

``weight_gradient`` has a mask in all three indices, so there is no matrix product in it: one predicated FFMA a
connection, and one instruction that makes a predicate of its bit; 3.6 with all that comes with them.

Cost of shared masks: 16 and more examples of a group have a tile to themselves (SHARED). Then it is a dense product
with one operand masked in registers, from where the tensor cores take it (W on the left), and
``shared_weight_gradient`` one with a mask behind it. That is about 9 instructions a weight for every 128 examples
(sm_90, p = 1/2), where reading W in 16 bits once leaves time for 19. Beyond a few hundred examples to a group it is
cheaper to draw once: ``mask_weights`` is one pass over W, 2 accesses an element and 13 instructions, and a dense
product follows.

Cost of an activation: forward none but its instructions, once an output, where the sum is stored (``_finish``); gelu
and others whose derivative does not follow from their result have the sum stored beside it, e bytes an output more.
Backward dz = dy f'(z) is one pass over [examples, outputs], which makes the bias gradient too: 3 e bytes an output,
where the gradient of a bias alone would read e. 6 bytes take an H100 2 ps, the gradients of a connection 0.25 ps (both
predicted), so that with 4,096 inputs it is 1/500 of the backward pass. In the loads of its two products f' would be
computed anew for every 64 and every 32 inputs, and another tensor read with dy each time.
"""

import triton
import triton.language as tl

from . import activation
from .fastmath import INTERPRETED, bound, tf32, upcast
from .philox import high_word, low_word, philox4x32
from .ptxas import terms
from .tiles import block_of_program, plus_product, weight_tile

EXAMPLES = tl.constexpr(16)  # that a lane has bits for
# Examples at a time. With all 16, sm_90 takes three times the shared memory, and the code for sm_100 is one trap.
UNROLLED = tl.constexpr(4)
CALL = tl.constexpr(8)  # lanes of a call of Philox: neighbouring inputs
REPAIRED = tl.constexpr(
    16
)  # columns at a time: with more, the repair would take the registers of the loop it follows
NOT_SPECIALIZED = ("seed_ptr", "seed", "offset", "keep")


@triton.jit
def _seed(seed_ptr, seed):
    return seed if seed_ptr is None else tl.load(seed_ptr)


@triton.jit
def _word_and_bit(group):
    """Where the lanes have the bit of a group."""
    word = group // EXAMPLES
    return word, group - word * EXAMPLES


@triton.jit
def _kept(
    output, call, word, seed, offset, keep, OUTPUTS: tl.constexpr, CALLS: tl.constexpr, DIGITS: tl.constexpr
):
    """The lanes of outputs [OUTPUTS] and calls [CALLS] of 8 inputs: four words of two, uint32 [OUTPUTS, CALLS]."""
    none = tl.zeros([OUTPUTS, CALLS], tl.uint32)
    c0 = none + call[None, :].to(tl.uint32)
    c1 = none + output[:, None].to(tl.uint32)
    c2 = none + low_word(offset)
    c3 = none + high_word(offset) + word
    k0 = low_word(seed)
    k1 = high_word(seed)
    a0, a1, a2, a3 = philox4x32(c0, c1, c2, c3, k0, k1)
    for digit in tl.static_range(1, DIGITS):
        r0, r1, r2, r3 = philox4x32(c0, c1, c2, c3 + (digit << 28), k0, k1)
        one = (0 - (keep >> digit & 1)).to(tl.uint32)  # all bits, or none
        a0, a1, a2, a3 = (
            _horner(a0, r0, one),
            _horner(a1, r1, one),
            _horner(a2, r2, one),
            _horner(a3, r3, one),
        )
    return a0, a1, a2, a3


@triton.jit
def _horner(kept, bits, one):
    """kept | bits where the digit is one, else kept & bits: the majority of the three, a single LOP3."""
    return (kept & bits) | (one & (kept | bits))


@triton.jit
def _lanes(
    output, call, word, bit, seed, offset, keep,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    """int16 [OUTPUTS, INPUTS]: the sign bit is that of example ``bit`` of the word; behind it are those of the next."""
    a0, a1, a2, a3 = _kept(output, call, word, seed, offset, keep, OUTPUTS, INPUTS // CALL, DIGITS)
    # Shifted in words, where it takes one instruction for two lanes.
    pairs = tl.join(tl.join(a0, a2), tl.join(a1, a3)) << bit
    return tl.reshape(tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)), [OUTPUTS, INPUTS])


@triton.jit
def _signs(lanes):
    """int32: all bits where the sign bit of the lane is set, else none; and the lanes moved on to the next example."""
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
    """w where the sign bit of its lane is set, else 0; and the lanes moved on to the next example."""
    if w.dtype == tl.float32:
        signs, lanes = _signs(lanes)
        return _and(w, signs), lanes
    elif INTERPRETED:
        return _where(lanes < 0, w), lanes << 1
    else:
        # Two elements in three instructions: a byte permutation that repeats the sign bits, AND, and a sum of both
        # lanes in one word (the lower carries into the upper only after 16 examples).
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
        return bits.to(w.dtype, bitcast=True), lanes


@triton.jit
def _halves(x):
    """fp32 as a sum: what TF32 holds, and a rest. The tensor cores cut off 13 bits of either.

    TF32 has 10 bits behind the first. Rounded to the nearest, a number x from 1 to 2 leaves a rest of 2^-11 or less and
    12 bits, of which the cut takes the last, 2^-23; cut off, it would leave 13 bits and lose 3 2^-23, with one sign
    always. A product of two such numbers is off by 2^-22 for the rests' product, which is left out, and by 2^-23 for
    each cut: 2^-21 of its size at most, where fp32 has 2^-24. The errors of a sum cancel for the most part.

    Infinities and the largest numbers, which round to them, have a NaN or an infinity of the other sign as their rest.
    """
    high = tf32(x)
    return high, x - high


@triton.jit
def _operand(x, THREE: tl.constexpr):
    """What is multiplied: the halves of x; else x itself, twice, as a function cannot return None."""
    if THREE:
        return _halves(x)
    else:
        return x, x


@triton.jit
def _plus_product(z, w, u, THREE: tl.constexpr):
    """z + w u. THREE: fp32 as three products of TF32 (without that of both rests), else as one."""
    w, w_low = w
    u, u_low = u
    if THREE:
        z = plus_product(z, w_low, u, "tf32")
        z = plus_product(z, w, u_low, "tf32")
    return plus_product(z, w, u, "tf32")


@triton.jit
def _plus_masked_product(z, w, lanes, u, own, THREE: tl.constexpr):
    """z + the masked w times the columns ``own`` of u; and the lanes moved on to the next example."""
    w, w_low = w
    if THREE:
        signs, lanes = _signs(lanes)
        w, w_low = _and(w, signs), _and(w_low, signs)
    else:
        w, lanes = _masked(w, lanes)
    return _plus_product(z, (w, w_low), _operand(_where(own, u), THREE), THREE), lanes


@triton.jit
def _where(condition, values):
    return tl.where(condition, values, tl.zeros_like(values))


@triton.jit
def _weights(
    w_ptr, first_row, first_column, word, bit, shape, draw,
    TRANSPOSED: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    """A tile of W [ROWS, COLUMNS], whichever way it lies in memory, and its lanes."""
    rows, columns = shape
    seed, offset, keep = draw
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    w = weight_tile(w_ptr, first_row, first_column, rows, columns, TRANSPOSED, EVEN, ROWS, COLUMNS)
    if TRANSPOSED:
        call = first_row // CALL + tl.arange(0, ROWS // CALL)
        lanes = _lanes(column, call, word, bit, seed, offset, keep, COLUMNS, ROWS, DIGITS)
        return tl.trans(w), tl.trans(lanes)
    else:
        call = first_column // CALL + tl.arange(0, COLUMNS // CALL)
        return w, _lanes(row, call, word, bit, seed, offset, keep, ROWS, COLUMNS, DIGITS)


@triton.jit
def _finish(z, bias_ptr, scale, before_ptr, z_ptr, place, inside, row, rows, ACTIVATION: tl.constexpr):
    """Stores activation(scale z + bias), and before it the activation's argument, where that is wanted.

    z: fp32 [ROWS, EXAMPLES], bias [rows].
    """
    z = z * scale
    if bias_ptr is not None:
        z += upcast(tl.load(bias_ptr + row, mask=row < rows, other=0.0))[:, None]
    if before_ptr is not None:
        tl.store(before_ptr + place, z.to(before_ptr.dtype.element_ty), mask=inside)
    if ACTIVATION is not None:
        z = activation.forward(z, ACTIVATION, z_ptr.dtype.element_ty)
    tl.store(z_ptr + place, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _repair(
    nan, z_ptr, before_ptr, u_ptr, w_ptr, bias_ptr, scale, example, group, known, word,
    first_row, first_column, end, shape, draw,
    SPLIT: tl.constexpr, ACTIVATION: tl.constexpr, TRANSPOSED: tl.constexpr, DIGITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Computes again what is NaN (bool [ROWS, COUNT]) in z, an example at a time, with no other's zeros beside it.

    A weight that is infinite or NaN is so times the zero columns, which makes NaN of the examples that dropped it.
    """
    rows, columns = shape
    row = first_row + tl.arange(0, ROWS)
    index = tl.arange(0, COUNT)
    for own in range(COUNT):
        one = index == own
        bit = tl.max(tl.where(one, group, 0), 0)
        b = tl.max(tl.where(one & known, example, 0), 0).to(tl.int64)
        again = tl.zeros([ROWS], tl.float32)
        for start in range(bound(first_column), bound(end), COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            u = upcast(tl.load(u_ptr + b * columns + column, mask=column < columns, other=0.0))
            w, lanes = _weights(
                w_ptr, first_row, start, word, bit, shape, draw, TRANSPOSED, False, ROWS, COLUMNS, DIGITS
            )
            again += tl.sum(terms(_where(lanes < 0, upcast(w)), u[None, :], 1), 1)
        again = again[:, None]
        wanted = (tl.max((nan & (one & known)[None, :]).to(tl.int32), 1) > 0) & (row < rows)
        place, inside = b * rows + row[:, None], wanted[:, None]
        if SPLIT:
            tl.store(z_ptr + place, again, mask=inside)
        else:
            _finish(again, bias_ptr, scale, before_ptr, z_ptr, place, inside, row, rows, ACTIVATION)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def product(
    u_ptr,  # [examples, columns]: v (forward) or dz
    w_ptr,  # [rows, columns], or TRANSPOSED [columns, rows]
    bias_ptr,  # [rows] or None
    z_ptr,  # [examples, rows], or fp32 partial sums [splits, examples, rows] where there is more than one
    before_ptr,  # [examples, rows], is given what stands before the activation; or None
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    keep: tl.int32,
    scale: tl.float32,
    examples,
    rows,
    columns,
    group_size,
    chunks,  # of BLOCK_EXAMPLES, of the examples of a group (SHARED), or of those of a word of lanes
    trips,  # tiles of a split
    SPLIT: tl.constexpr,
    DIGITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SHARED: tl.constexpr,  # all examples of a tile have one mask
    THREE: tl.constexpr,  # products of TF32 for fp32
    EVEN: tl.constexpr,  # the tiles cover rows and columns exactly
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_EXAMPLES: tl.constexpr,
):
    """z[b, r] = activation(scale sum_c m(b, r, c) W[r, c] u[b, c] + bias[r]).

    Grid: chunks of examples times blocks of rows, splits of the columns.
    """
    shape = (rows, columns)
    draw = (_seed(seed_ptr, seed), offset, keep)
    tile, row_block = block_of_program(tl.num_programs(0) // tl.cdiv(rows, BLOCK_ROWS))
    first_row = row_block * BLOCK_ROWS
    first_column = tl.program_id(1) * trips * BLOCK_COLUMNS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    part = tile // chunks
    span = group_size if SHARED else EXAMPLES * group_size
    within = (tile % chunks) * BLOCK_EXAMPLES + tl.arange(0, BLOCK_EXAMPLES)
    example = part * span + within
    known = (example < examples) & (within < span)
    if SHARED:
        word, bit = _word_and_bit(part)
        group = tl.full([BLOCK_EXAMPLES], bit, tl.int32)
    else:
        word = part
        group = within // group_size
        bit = (tile % chunks) * BLOCK_EXAMPLES // group_size
        groups = tl.max(tl.where(known, group, 0), 0) - bit + 1
    OWN: tl.constexpr = BLOCK_EXAMPLES == EXAMPLES and group_size == 1
    z = tl.zeros([BLOCK_ROWS, BLOCK_EXAMPLES], tl.float32)
    for trip in range(bound(trips)):
        start = first_column + trip * BLOCK_COLUMNS
        column = start + tl.arange(0, BLOCK_COLUMNS)
        u = tl.load(
            u_ptr + example.to(tl.int64)[None, :] * columns + column[:, None],
            mask=known[None, :] & (column < columns)[:, None],
            other=0.0,
        )
        w, lanes = _weights(
            w_ptr, first_row, start, word, bit, shape, draw,
            TRANSPOSED, EVEN, BLOCK_ROWS, BLOCK_COLUMNS, DIGITS,
        )  # fmt: skip
        if SHARED:
            w, _ = _masked(w, lanes)
            z = _plus_product(z, _operand(w, THREE), _operand(u, THREE), THREE)
        elif OWN:
            w = _operand(w, THREE)
            for index in range(0, EXAMPLES, UNROLLED):
                for step in tl.static_range(UNROLLED):
                    z, lanes = _plus_masked_product(z, w, lanes, u, (group == index + step)[None, :], THREE)
        else:
            w = _operand(w, THREE)
            for index in range(bound(groups)):
                z, lanes = _plus_masked_product(z, w, lanes, u, (group == bit + index)[None, :], THREE)

    nan = z != z
    place = example.to(tl.int64)[None, :] * rows + row[:, None]
    inside = known[None, :] & (row < rows)[:, None]
    if SPLIT:
        z_ptr += tl.program_id(1).to(tl.int64) * examples * rows
        tl.store(z_ptr + place, z, mask=inside)
    else:
        _finish(z, bias_ptr, scale, before_ptr, z_ptr, place, inside, row, rows, ACTIVATION)
    if THREE or not SHARED:  # noqa: SIM102 - known when it is compiled, unlike the next
        if tl.max(tl.max(nan.to(tl.int32), 1), 0) > 0:
            tl.debug_barrier()  # what another thread has stored is stored again
            end = tl.minimum(first_column + trips * BLOCK_COLUMNS, columns)
            _repair(
                nan, z_ptr, before_ptr, u_ptr, w_ptr, bias_ptr, scale, example, group, known, word,
                first_row, first_column, end, shape, draw,
                SPLIT, ACTIVATION, TRANSPOSED, DIGITS, BLOCK_ROWS, REPAIRED, BLOCK_EXAMPLES,
            )  # fmt: skip


@triton.jit
def merge(
    partial_ptr,  # fp32 [splits, examples, rows]
    bias_ptr,  # [rows] or None
    z_ptr,  # [examples, rows]
    before_ptr,  # as ``product``'s
    scale: tl.float32,
    examples,
    rows,
    splits,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z = activation(scale sum of the splits + bias). Grid: examples, blocks of rows."""
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * rows + row
    stride = examples.to(tl.int64) * rows
    z = tl.zeros([BLOCK], tl.float32)
    for split in range(bound(splits)):
        z += tl.load(partial_ptr + split * stride + place, mask=row < rows, other=0.0)
    inside = (row < rows)[:, None]
    _finish(z[:, None], bias_ptr, scale, before_ptr, z_ptr, place[:, None], inside, row, rows, ACTIVATION)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def weight_gradient(
    dz_ptr,  # [examples, outputs]
    v_ptr,  # [examples, inputs]
    dw_ptr,  # [outputs, inputs]
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    keep: tl.int32,
    scale: tl.float32,
    examples,
    outputs,
    inputs,
    group_size,
    words,  # of lanes: blocks of 16 groups
    DIGITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """dW[n, k] = scale sum_b m(b, n, k) dz[b, n] v[b, k]. Grid: blocks of outputs times blocks of inputs."""
    seed = _seed(seed_ptr, seed)
    input_block, output_block = block_of_program(tl.cdiv(inputs, BLOCK_INPUTS))
    output = output_block * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    call = input_block * (BLOCK_INPUTS // CALL) + tl.arange(0, BLOCK_INPUTS // CALL)
    input = call[:, None] * CALL + tl.arange(0, CALL)[None, :]
    dw = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS // CALL, CALL], tl.float32)
    for word in range(bound(words)):
        a0, a1, a2, a3 = _kept(
            output, call, word, seed, offset, keep, BLOCK_OUTPUTS, BLOCK_INPUTS // CALL, DIGITS
        )
        pairs = tl.join(tl.join(a0, a2), tl.join(a1, a3))
        # Each lane in the upper half of a word; below it may stand anything.
        lanes = tl.reshape(tl.join(pairs << 16, pairs), [BLOCK_OUTPUTS, BLOCK_INPUTS // CALL, CALL])
        for index in tl.static_range(EXAMPLES):
            kept = (lanes & (0x80000000 >> index)) != 0
            start = (word * EXAMPLES + index) * group_size
            if group_size == 1:
                dw = _plus_outer(dw, kept, start, dz_ptr, v_ptr, output, input, examples, outputs, inputs)
            else:
                for example in range(bound(start), bound(tl.minimum(start + group_size, examples))):
                    dw = _plus_outer(
                        dw, kept, example, dz_ptr, v_ptr, output, input, examples, outputs, inputs
                    )
    dw = dw * scale
    place = output.to(tl.int64)[:, None, None] * inputs + input[None, :, :]
    inside = (output < outputs)[:, None, None] & (input < inputs)[None, :, :]
    tl.store(dw_ptr + place, dw.to(dw_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _plus_outer(dw, kept, example, dz_ptr, v_ptr, output, input, examples, outputs, inputs):
    """dw + dz v where it is kept. A select, so that what is dropped adds nothing, not even a NaN."""
    row = tl.full([1], 0, tl.int64) + example
    known = row < examples
    dz = tl.load(dz_ptr + row * outputs + output, mask=known & (output < outputs), other=0.0)
    v = tl.load(v_ptr + row[:, None] * inputs + input, mask=known[:, None] & (input < inputs), other=0.0)
    dz, v = dz.to(tl.float32), v.to(tl.float32)  # few of each a thread: in pairs they take more registers
    return tl.where(
        kept, tl.fma(dz[:, None, None] + tl.zeros_like(dw), v[None, :, :] + tl.zeros_like(dw), dw), dw
    )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def shared_weight_gradient(
    dz_ptr,  # [examples, outputs]
    v_ptr,  # [examples, inputs]
    dw_ptr,  # [outputs, inputs]
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    keep: tl.int32,
    scale: tl.float32,
    examples,
    outputs,
    inputs,
    group_size,
    groups,
    DIGITS: tl.constexpr,
    PRECISION: tl.constexpr,  # of the products of fp32
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_EXAMPLES: tl.constexpr,
):
    """dW = scale sum of the groups' dz^T v, each under its mask. Grid: blocks of outputs times blocks of inputs."""
    seed = _seed(seed_ptr, seed)
    output_block, input_block = block_of_program(tl.cdiv(outputs, BLOCK_OUTPUTS))
    output = output_block * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    input = input_block * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
    call = input_block * (BLOCK_INPUTS // CALL) + tl.arange(0, BLOCK_INPUTS // CALL)
    dw = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS], tl.float32)
    for group in range(bound(groups)):
        first = group * group_size
        end = tl.minimum(first + group_size, examples)
        product = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS], tl.float32)
        for start in range(bound(first), bound(end), BLOCK_EXAMPLES):
            example = start + tl.arange(0, BLOCK_EXAMPLES)
            place = example.to(tl.int64)[:, None]
            known = (example < end)[:, None]
            dz = tl.load(
                dz_ptr + place * outputs + output[None, :], mask=known & (output < outputs), other=0.0
            )
            v = tl.load(v_ptr + place * inputs + input[None, :], mask=known & (input < inputs), other=0.0)
            product = plus_product(product, tl.trans(dz), v, PRECISION)
        word, bit = _word_and_bit(group)
        lanes = _lanes(output, call, word, bit, seed, offset, keep, BLOCK_OUTPUTS, BLOCK_INPUTS, DIGITS)
        dw += _where(lanes < 0, product)
    place = output.to(tl.int64)[:, None] * inputs + input[None, :]
    inside = (output < outputs)[:, None] & (input < inputs)[None, :]
    tl.store(dw_ptr + place, (dw * scale).to(dw_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=(*NOT_SPECIALIZED, "group"))
def mask_weights(
    w_ptr,  # 16 bits or fp32 [outputs, inputs]
    masked_ptr,  # the same; may be w_ptr
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    keep: tl.int32,
    outputs,
    inputs,
    group: tl.int32,
    DIGITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """W where ``group`` keeps the connection, else 0. Grid: blocks of outputs times blocks of inputs."""
    draw = (_seed(seed_ptr, seed), offset, keep)
    output_block, input_block = block_of_program(tl.cdiv(outputs, BLOCK_OUTPUTS))
    first_output, first_input = output_block * BLOCK_OUTPUTS, input_block * BLOCK_INPUTS
    word, bit = _word_and_bit(group)
    w, lanes = _weights(
        w_ptr, first_output, first_input, word, bit, (outputs, inputs), draw,
        False, False, BLOCK_OUTPUTS, BLOCK_INPUTS, DIGITS,
    )  # fmt: skip
    output = first_output + tl.arange(0, BLOCK_OUTPUTS)
    input = first_input + tl.arange(0, BLOCK_INPUTS)
    place = output.to(tl.int64)[:, None] * inputs + input[None, :]
    inside = (output < outputs)[:, None] & (input < inputs)[None, :]
    tl.store(masked_ptr + place, _where(lanes < 0, w), mask=inside)

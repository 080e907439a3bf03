"""A linear layer with noise in its weights that is no more than two dense products, for every example its own noise.

    a = W v     b = W' v'     z = scale (a noise-free, b with noise) + bias

    GAUSSIAN      W' = W ∘ W   v' = v ∘ v       z = scale a + sigma sqrt(b) eps         (Kingma et al. 2015)
    FLIPOUT       W' = S ∘ W   v' = s ∘ v       z = scale (a + r ∘ b)                   (Wen et al. 2018)
    FACTORISED    W' = Sigma   v' = e_in ∘ v    z = a + e_out ∘ b + sigma_b ∘ e_out     (Fortunato et al. 2018)

eps [examples, outputs] normal; S, s, r random signs; e_in, e_out are f(x) = sign(x) sqrt|x| of normals. The gradients
have the same shape: dv is a ``product`` with W transposed, and dW of the first two a ``weight_gradient``,

    GAUSSIAN      dv = scale W^T dz + 2 v ∘ (W'^T q)             dW = scale dz^T v + 2 W ∘ (q^T v')
    FLIPOUT       dv = scale (W^T dz + s ∘ (W'^T (r ∘ dz)))      dW = scale (dz^T v + S ∘ ((r ∘ dz)^T v'))
    FACTORISED    dv = W^T dz + e_in ∘ (Sigma^T (e_out ∘ dz))    (dW and dSigma are plain products)

with q = dz eps sigma / (2 sqrt(b)).

Cost: ``product`` reads W once for both products, where two calls of a matrix library read it twice and a copy of W' was
made before (2 + 2 accesses of W more). W' is made in registers, from where the tensor cores take it: W stands on the
left, examples are the columns. v' is made once by ``second_input`` (one pass over an operand that is smaller than W by
examples / outputs), for every block of rows would make it again. The noise of an output is drawn where the output is
stored. Nothing random is kept: the backward pass draws it again. Saved beside v and W is sqrt(b) (GAUSSIAN), in fp32.

An activation f stands in the same place, and its derivative in ``second_input``, which reads dy in any case: it then
writes dz = dy f'(z) beside r ∘ dz and its like. That moves 2 e bytes an output more (f' reads what was kept, dz is
written), where a pass of its own would move 3 e. What is kept is f(z), of which the next layer has need too, or, where
f' does not follow from that (gelu and others), z, e bytes more forward.

The squares of fp16 numbers are bf16: that of 1e-4 is no fp16 number. A variance then has 8 bits, the noise is off by
2^-9 of itself.
"""

import triton
import triton.language as tl

from . import activation
from .fastmath import bound, sqrt, upcast
from .philox import row_normals, row_words
from .ptxas import terms
from .tiles import block_of_program, plus_product, weight_tile

GAUSSIAN = tl.constexpr(0)
FLIPOUT = tl.constexpr(1)
FACTORISED = tl.constexpr(2)
SLOPE = tl.constexpr(3)  # of ``second_input``: q of the Gaussian's gradients

# Which draw of the operation it is: that many streams further on. Signs and factors belong to an example and an input
# (IN), or an example and an output (OUT); the signs S to an output and an input, with no further step.
IN = tl.constexpr(1)
OUT = tl.constexpr(2)
NOT_SPECIALIZED = ("seed_ptr", "seed", "offset")


@triton.jit
def _factors(row, first, seed, offset, use, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x = row_normals(row, first, seed, offset, use, ROWS, COLUMNS)
    root = sqrt(tl.abs(x))
    return tl.where(x < 0, -root, root)


@triton.jit
def _flipped(x, row, first, seed, offset, use, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS], fp32 or of 16 bits, with the signs of its rows and columns; ``first`` is a multiple of 8."""
    block = first // 8 + tl.arange(0, COLUMNS // 8)
    r0, r1, r2, r3 = row_words(row[:, None], block[None, :], seed, offset, use)
    pairs = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    if x.dtype == tl.float32:
        lanes = tl.reshape(tl.join(pairs << 16, pairs), [ROWS, COLUMNS]).to(tl.int32, bitcast=True)
        return (x.to(tl.int32, bitcast=True) ^ (lanes & -0x80000000)).to(tl.float32, bitcast=True)
    else:
        lanes = tl.reshape(tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)), [ROWS, COLUMNS])
        return (x.to(tl.int16, bitcast=True) ^ (lanes & -0x8000)).to(x.dtype, bitcast=True)


@triton.jit
def _noisy(x, row, first, seed, offset, use, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] times the signs (FLIPOUT) or factors (FACTORISED) of an example."""
    if KIND == FLIPOUT:
        return _flipped(x, row, first, seed, offset, use, ROWS, COLUMNS)
    else:
        return x * _factors(row, first, seed, offset, use, ROWS, COLUMNS)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def second_input(
    x_ptr,  # [examples, columns]: v, or dz; dy with an activation
    kept_ptr,  # [examples, columns]: what the derivative of the activation needs; or None
    dz_ptr,  # [examples, columns], is given dz = dy f'(z); or None
    root_ptr,  # SLOPE: fp32 sqrt(b) [examples, columns]
    y_ptr,  # [examples, columns]
    slope_ptr,  # SLOPE: fp32 [examples, blocks], sums of dz eps sqrt(b), the gradient of sigma; or None
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    sigma_ptr,  # SLOPE: one number in memory, or None: then ``sigma``
    sigma: tl.float32,
    columns,
    blocks,  # of columns
    KIND: tl.constexpr,
    USE: tl.constexpr,  # IN or OUT: whose noise
    DERIVATIVE: tl.constexpr,  # of the activation, from what is kept
    BLOCK: tl.constexpr,
):
    """v' = v ∘ v, s ∘ v or e_in ∘ v; of dz (OUT) r ∘ dz or e_out ∘ dz; SLOPE: q. Grid: blocks of rows' columns."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    row = tl.program_id(0) // blocks + tl.arange(0, 1)
    first = (tl.program_id(0) % blocks) * BLOCK
    column = first + tl.arange(0, BLOCK)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column
    inside = column < columns
    # Of what is squared and rounded again, the compiler makes operations on 16 bits, if it sees how it came to 32.
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if DERIVATIVE is not None:
        kept = upcast(tl.load(kept_ptr + place, mask=inside, other=0.0))
        x = activation.backward(x, kept, DERIVATIVE, kept_ptr.dtype.element_ty)
        tl.store(dz_ptr + place, x.to(dz_ptr.dtype.element_ty), mask=inside)
    if KIND == GAUSSIAN:
        y = x * x
    elif KIND == SLOPE:
        if sigma_ptr is not None:
            sigma = upcast(tl.load(sigma_ptr))
        root = tl.load(root_ptr + place, mask=inside, other=0.0)
        noise = x * row_normals(row, first, seed, offset, OUT, 1, BLOCK)
        y = tl.where(root == 0, 0.0, noise * (0.5 * sigma) / tl.where(root == 0, 1.0, root))
        if slope_ptr is not None:
            tl.store(slope_ptr + tl.program_id(0), tl.sum(tl.sum(terms(noise, root, 1), 1), 0))
    else:
        y = _noisy(x, row, first, seed, offset, USE, KIND, 1, BLOCK)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _second_weights(
    w, first_output, first_input, seed, offset,
    KIND: tl.constexpr, SECOND: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """A tile of W' [OUTPUTS, INPUTS] from that of W: its squares, or W with signs."""
    if KIND == GAUSSIAN:
        w = w.to(tl.float32)  # as in ``second_input``
        return (w * w).to(SECOND)
    else:
        output = first_output + tl.arange(0, OUTPUTS)
        return _flipped(w, output, first_input, seed, offset, 0, OUTPUTS, INPUTS)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def product(
    u_ptr,  # [examples, columns]: v, or dz
    u2_ptr,  # [examples, columns]: v', or q and its like
    w_ptr,  # [rows, columns], or TRANSPOSED [columns, rows]
    w2_ptr,  # Sigma of FACTORISED, shaped as W; or None
    v_ptr,  # TRANSPOSED GAUSSIAN: v [examples, rows]; or None
    bias_ptr,  # [rows] or None
    bias_sigma_ptr,  # [rows] of FACTORISED, or None
    z_ptr,  # [examples, rows]
    before_ptr,  # [examples, rows], is given what stands before the activation; or None
    root_ptr,  # GAUSSIAN: fp32 [examples, rows], is given sqrt(b); or None
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    sigma_ptr,  # GAUSSIAN: one number in memory, or None: then ``sigma``
    sigma: tl.float32,
    scale: tl.float32,
    examples,
    rows,
    columns,
    KIND: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,  # of the products of fp32
    EVEN: tl.constexpr,  # the tiles cover W exactly
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_EXAMPLES: tl.constexpr,
):
    """z, or TRANSPOSED dv. Grid: blocks of examples times blocks of rows."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    example_block, row_block = block_of_program(tl.cdiv(examples, BLOCK_EXAMPLES))
    first_row = row_block * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    example = example_block * BLOCK_EXAMPLES + tl.arange(0, BLOCK_EXAMPLES)
    known = example < examples
    a = tl.zeros([BLOCK_ROWS, BLOCK_EXAMPLES], tl.float32)
    b = tl.zeros([BLOCK_ROWS, BLOCK_EXAMPLES], tl.float32)
    for start in range(0, bound(columns), BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        place = example.to(tl.int64)[None, :] * columns + column[:, None]
        inside = known[None, :] & (column < columns)[:, None]
        u = tl.load(u_ptr + place, mask=inside, other=0.0)
        u2 = tl.load(u2_ptr + place, mask=inside, other=0.0)
        w = weight_tile(w_ptr, first_row, start, rows, columns, TRANSPOSED, EVEN, BLOCK_ROWS, BLOCK_COLUMNS)
        if KIND == FACTORISED:
            w2 = weight_tile(
                w2_ptr, first_row, start, rows, columns, TRANSPOSED, EVEN, BLOCK_ROWS, BLOCK_COLUMNS
            )
        elif TRANSPOSED:
            w2 = _second_weights(
                w, start, first_row, seed, offset, KIND, u2_ptr.dtype.element_ty, BLOCK_COLUMNS, BLOCK_ROWS
            )
        else:
            w2 = _second_weights(
                w, first_row, start, seed, offset, KIND, u2_ptr.dtype.element_ty, BLOCK_ROWS, BLOCK_COLUMNS
            )
        if TRANSPOSED:
            w, w2 = tl.trans(w), tl.trans(w2)
        a = plus_product(a, w, u, PRECISION)
        b = plus_product(b, w2, u2, PRECISION)

    # The noise is that of four or eight neighbours in a row of the results, so the tile is turned first.
    a = tl.trans(a)
    b = tl.trans(b)
    place = example.to(tl.int64)[:, None] * rows + row[None, :]
    inside = known[:, None] & (row < rows)[None, :]
    if KIND == GAUSSIAN:
        if TRANSPOSED:
            z = scale * a + 2 * upcast(tl.load(v_ptr + place, mask=inside, other=0.0)) * b
        else:
            if sigma_ptr is not None:
                sigma = upcast(tl.load(sigma_ptr))
            root = sqrt(b)
            if root_ptr is not None:
                tl.store(root_ptr + place, root, mask=inside)
            eps = row_normals(example, first_row, seed, offset, OUT, BLOCK_EXAMPLES, BLOCK_ROWS)
            z = scale * a + sigma * root * eps
    else:
        USE: tl.constexpr = IN if TRANSPOSED else OUT
        if bias_sigma_ptr is not None:
            b += upcast(tl.load(bias_sigma_ptr + row, mask=row < rows, other=0.0))[None, :]
        z = scale * (a + _noisy(b, example, first_row, seed, offset, USE, KIND, BLOCK_EXAMPLES, BLOCK_ROWS))
    if bias_ptr is not None:
        z += upcast(tl.load(bias_ptr + row, mask=row < rows, other=0.0))[None, :]
    if before_ptr is not None:
        tl.store(before_ptr + place, z.to(before_ptr.dtype.element_ty), mask=inside)
    if ACTIVATION is not None:
        z = activation.forward(z, ACTIVATION, z_ptr.dtype.element_ty)
    tl.store(z_ptr + place, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def weight_gradient(
    dz_ptr,  # [examples, outputs]
    dz2_ptr,  # [examples, outputs]: q, or r ∘ dz
    v_ptr,  # [examples, inputs]
    v2_ptr,  # [examples, inputs]: v'
    w_ptr,  # [outputs, inputs]
    dw_ptr,  # [outputs, inputs]
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    scale: tl.float32,
    examples,
    outputs,
    inputs,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_EXAMPLES: tl.constexpr,
):
    """dW of GAUSSIAN and FLIPOUT. Grid: blocks of outputs times blocks of inputs."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    output_block, input_block = block_of_program(tl.cdiv(outputs, BLOCK_OUTPUTS))
    first_output, first_input = output_block * BLOCK_OUTPUTS, input_block * BLOCK_INPUTS
    output = first_output + tl.arange(0, BLOCK_OUTPUTS)
    input = first_input + tl.arange(0, BLOCK_INPUTS)
    a = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS], tl.float32)
    b = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS], tl.float32)
    for start in range(0, bound(examples), BLOCK_EXAMPLES):
        example = start + tl.arange(0, BLOCK_EXAMPLES)
        known = (example < examples)[:, None]
        place = example.to(tl.int64)[:, None] * outputs + output[None, :]
        inside = known & (output < outputs)[None, :]
        dz = tl.load(dz_ptr + place, mask=inside, other=0.0)
        dz2 = tl.load(dz2_ptr + place, mask=inside, other=0.0)
        place = example.to(tl.int64)[:, None] * inputs + input[None, :]
        inside = known & (input < inputs)[None, :]
        v = tl.load(v_ptr + place, mask=inside, other=0.0)
        v2 = tl.load(v2_ptr + place, mask=inside, other=0.0)
        a = plus_product(a, tl.trans(dz), v, PRECISION)
        b = plus_product(b, tl.trans(dz2), v2, PRECISION)
    place = output.to(tl.int64)[:, None] * inputs + input[None, :]
    inside = (output < outputs)[:, None] & (input < inputs)[None, :]
    if KIND == GAUSSIAN:
        dw = scale * a + 2 * upcast(tl.load(w_ptr + place, mask=inside, other=0.0)) * b
    else:
        dw = scale * (a + _flipped(b, output, first_input, seed, offset, 0, BLOCK_OUTPUTS, BLOCK_INPUTS))
    tl.store(dw_ptr + place, dw.to(dw_ptr.dtype.element_ty), mask=inside)

"""A linear layer with separate noise in its weights for every example, from two dense products.

    a = W v     b = W' v'     z = scale (a without noise, b with noise) + bias

    GAUSSIAN      W' = W ∘ W   v' = v ∘ v       z = scale a + sigma sqrt(b) eps         (Kingma et al. 2015)
    FLIPOUT       W' = S ∘ W   v' = s ∘ v       z = scale (a + r ∘ b)                   (Wen et al. 2018)
    FACTORISED    W' = Sigma   v' = e_in ∘ v    z = a + e_out ∘ b + sigma_b ∘ e_out     (Fortunato et al. 2018)

eps [examples, outputs] is standard normal; S, s, r are random signs; e_in, e_out are f(x) = sign(x) sqrt|x| of standard
normals. The gradients have the same form: dv is a ``product`` with W transposed, and dW of the first two a
``weight_gradient``,

    GAUSSIAN      dv = scale W^T dz + 2 v ∘ (W'^T q)             dW = scale dz^T v + 2 W ∘ (q^T v')
    FLIPOUT       dv = scale (W^T dz + s ∘ (W'^T (r ∘ dz)))      dW = scale (dz^T v + S ∘ ((r ∘ dz)^T v'))
    FACTORISED    dv = W^T dz + e_in ∘ (Sigma^T (e_out ∘ dz))    (dW and dSigma are plain products)

with q = dz eps sigma / (2 sqrt(b)).

Cost. ``product`` reads W once for both products. Two calls of a matrix library read it twice, after a pass that
makes a copy of W' (2 + 2 more accesses of W). Here W' is made in registers, from where the tensor cores read it: W
is the left operand, and the examples are the columns of the right one. ``second_input`` makes v' once, in one pass
over an operand that is smaller than W by examples / outputs; otherwise every block of rows would make it again. The
noise of an output is drawn where the output is stored. Nothing random is kept: the backward pass draws it again.
Besides v and W the forward pass saves sqrt(b), in fp32, for GAUSSIAN only.

An activation f is applied where the output is stored, and its derivative in ``second_input``, which reads dy anyway
and then writes dz = dy f'(z) beside r ∘ dz or the like. That moves 2 e more bytes for an output (it reads what f'
needs, and writes dz); a separate pass would move 3 e. f' needs f(z), which the next layer keeps anyway, or z where
the derivative does not follow from the result (gelu and others): then forward writes e more bytes for an output.

The squares of fp16 numbers are bf16, because 1e-4 squared is outside the range of fp16. A variance then has 8 bits,
and the noise has a relative error of 2^-9.
"""

from typing import NamedTuple

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
SLOPE = tl.constexpr(3)  # of ``second_input``: q, for the gradients of GAUSSIAN

# Each draw of an operation has its own random stream: this many after the first. The signs S belong to an output and
# an input, and use the first stream. The others belong to an example and an input (IN), or an example and an output
# (OUT).
IN = tl.constexpr(1)
OUT = tl.constexpr(2)
NOT_SPECIALIZED = ("seed_ptr", "seed", "offset")


class SecondInput(NamedTuple):
    """Pointers of ``second_input``, [examples, columns]."""

    x: tl.tensor  # v, or dz; with an activation dy
    kept: tl.tensor  # what the derivative of the activation needs; or None
    dz: tl.tensor  # receives dz = dy f'(z); or None
    root: tl.tensor  # SLOPE: fp32 sqrt(b)
    y: tl.tensor  # the result
    slope: tl.tensor  # SLOPE: fp32 [examples, blocks], sums of dz eps sqrt(b), the gradient of sigma; or None


class SecondPlan(NamedTuple):
    """Compile-time choices of ``second_input``."""

    kind: int
    use: int  # whose noise: IN or OUT
    derivative: str | None  # of the activation, as a function of what is kept
    block: int  # columns of a program


class Operands(NamedTuple):
    """Pointers to what a product reads."""

    u: tl.tensor  # [examples, columns]: v, or dz
    u2: tl.tensor  # [examples, columns]: v', or its counterpart for dz
    w: tl.tensor  # [rows, columns]; transposed: [columns, rows]
    w2: tl.tensor  # FACTORISED: Sigma, shaped as w; or None
    v: tl.tensor  # GAUSSIAN, transposed: v [examples, rows]; or None


class Epilogue(NamedTuple):
    """Pointers for the end of a product."""

    bias: tl.tensor  # [rows], or None
    bias_sigma: tl.tensor  # FACTORISED: [rows], or None
    z: tl.tensor  # [examples, rows]
    before: tl.tensor  # [examples, rows], receives the argument of the activation; or None
    root: tl.tensor  # GAUSSIAN: fp32 [examples, rows], receives sqrt(b); or None


class Shape(NamedTuple):
    """The sizes of a product: integers."""

    examples: tl.tensor
    rows: tl.tensor
    columns: tl.tensor


class GradientTensors(NamedTuple):
    """Pointers of a weight gradient."""

    dz: tl.tensor  # [examples, outputs]
    dz2: tl.tensor  # [examples, outputs]: q, or r ∘ dz
    v: tl.tensor  # [examples, inputs]
    v2: tl.tensor  # [examples, inputs]: v'
    w: tl.tensor  # [outputs, inputs]
    dw: tl.tensor  # [outputs, inputs]


class GradientShape(NamedTuple):
    """The sizes of a weight gradient: integers."""

    examples: tl.tensor
    outputs: tl.tensor
    inputs: tl.tensor


class Plan(NamedTuple):
    """Compile-time choices. A tile of W, or of its transpose, is [rows, columns]."""

    kind: int
    rows: int
    columns: int
    examples: int  # of a tile
    precision: str  # of products of fp32: "tf32" or "tf32x3"
    transposed: bool = False  # the product is with the transpose of W
    even: bool = False  # the tiles cover W exactly
    activation: str | None = None


class Draw(NamedTuple):
    """What determines all noise: scalars."""

    seed: tl.tensor
    offset: tl.tensor


# --- noise ------------------------------------------------------------------------------------------------


@triton.jit
def _draw(seed_ptr, seed, offset):
    return Draw(seed if seed_ptr is None else tl.load(seed_ptr), offset)


@triton.jit
def _normals(row, first, draw, use, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return row_normals(row, first, draw.seed, draw.offset, use, ROWS, COLUMNS)


@triton.jit
def _flipped(x, row, first, draw, use):
    """x, fp32 or 16 bits, with the signs of its rows and of the columns from ``first`` on, a multiple of 8."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    block = first // 8 + tl.arange(0, COLUMNS // 8)
    r0, r1, r2, r3 = row_words(row[:, None], block[None, :], draw.seed, draw.offset, use)
    pairs = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    if x.dtype == tl.float32:
        lanes = tl.reshape(tl.join(pairs << 16, pairs), [ROWS, COLUMNS]).to(tl.int32, bitcast=True)
        return (x.to(tl.int32, bitcast=True) ^ (lanes & -0x80000000)).to(tl.float32, bitcast=True)
    else:
        lanes = tl.reshape(tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)), [ROWS, COLUMNS])
        return (x.to(tl.int16, bitcast=True) ^ (lanes & -0x8000)).to(x.dtype, bitcast=True)


@triton.jit
def _noisy(x, row, first, draw, use, kind: tl.constexpr):
    """x times the signs (FLIPOUT) or the factors (FACTORISED) of each example; a row is an example."""
    if kind == FLIPOUT:
        return _flipped(x, row, first, draw, use)
    else:
        normal = _normals(row, first, draw, use, x.shape[0], x.shape[1])
        root = sqrt(tl.abs(normal))
        return x * tl.where(normal < 0, -root, root)


# --- v' and its counterparts ------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def second_input(
    tensors: SecondInput,
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    sigma_ptr,  # SLOPE: one number in memory, or None: then ``sigma``
    sigma: tl.float32,
    columns,
    blocks,  # of columns
    plan: tl.constexpr,
):
    """From v: v ∘ v, s ∘ v or e_in ∘ v; from dz (OUT): r ∘ dz or e_out ∘ dz; SLOPE: q. Grid: rows times blocks."""
    BLOCK: tl.constexpr = plan.block
    DERIVATIVE: tl.constexpr = plan.derivative
    draw = _draw(seed_ptr, seed, offset)
    row = tl.program_id(0) // blocks + tl.arange(0, 1)
    first = (tl.program_id(0) % blocks) * BLOCK
    column = first + tl.arange(0, BLOCK)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column
    inside = column < columns
    # Not ``upcast``: the compiler would compute the square in 16 bits if it saw that its operand came from them.
    x = tl.load(tensors.x + place, mask=inside, other=0.0).to(tl.float32)
    if DERIVATIVE is not None:
        kept = upcast(tl.load(tensors.kept + place, mask=inside, other=0.0))
        x = activation.backward(x, kept, DERIVATIVE, tensors.kept.dtype.element_ty)
        tl.store(tensors.dz + place, x.to(tensors.dz.dtype.element_ty), mask=inside)
    if plan.kind == GAUSSIAN:
        y = x * x
    elif plan.kind == SLOPE:
        if sigma_ptr is not None:
            sigma = upcast(tl.load(sigma_ptr))
        root = tl.load(tensors.root + place, mask=inside, other=0.0)
        noise = x * _normals(row, first, draw, OUT, 1, BLOCK)
        y = tl.where(root == 0, 0.0, noise * (0.5 * sigma) / tl.where(root == 0, 1.0, root))
        if tensors.slope is not None:
            tl.store(tensors.slope + tl.program_id(0), tl.sum(tl.sum(terms(noise, root, 1), 1), 0))
    else:
        y = _noisy(x, row, first, draw, plan.use, plan.kind)
    tl.store(tensors.y + place, y.to(tensors.y.dtype.element_ty), mask=inside)


# --- the products -----------------------------------------------------------------------------------------


@triton.jit
def _second_weights(w, operands, first_row, first_column, shape, draw, plan: tl.constexpr):
    """The tile of W' (or of its transpose) that belongs to the tile w of W."""
    if plan.kind == FACTORISED:
        return weight_tile(operands.w2, first_row, first_column, shape, plan)
    elif plan.kind == GAUSSIAN:
        w = w.to(tl.float32)  # not ``upcast``, as in ``second_input``
        return (w * w).to(operands.u2.dtype.element_ty)
    elif plan.transposed:
        return _flipped(w, first_column + tl.arange(0, plan.columns), first_row, draw, 0)
    else:
        return _flipped(w, first_row + tl.arange(0, plan.rows), first_column, draw, 0)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def product(
    operands: Operands,
    epilogue: Epilogue,
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    sigma_ptr,  # GAUSSIAN: one number in memory, or None: then ``sigma``
    sigma: tl.float32,
    scale: tl.float32,
    shape: Shape,
    plan: tl.constexpr,
):
    """z, or (transposed) dv. Grid: blocks of examples times blocks of rows."""
    ROWS: tl.constexpr = plan.rows
    COLUMNS: tl.constexpr = plan.columns
    COUNT: tl.constexpr = plan.examples
    PRECISION: tl.constexpr = plan.precision
    ACTIVATION: tl.constexpr = plan.activation
    draw = _draw(seed_ptr, seed, offset)
    example_block, row_block = block_of_program(tl.cdiv(shape.examples, COUNT))
    first_row = row_block * ROWS
    row = first_row + tl.arange(0, ROWS)
    example = example_block * COUNT + tl.arange(0, COUNT)
    known = example < shape.examples
    a = tl.zeros([ROWS, COUNT], tl.float32)
    b = tl.zeros([ROWS, COUNT], tl.float32)
    for start in range(0, bound(shape.columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        place = example.to(tl.int64)[None, :] * shape.columns + column[:, None]
        inside = known[None, :] & (column < shape.columns)[:, None]
        u = tl.load(operands.u + place, mask=inside, other=0.0)
        u2 = tl.load(operands.u2 + place, mask=inside, other=0.0)
        w = weight_tile(operands.w, first_row, start, shape, plan)
        w2 = _second_weights(w, operands, first_row, start, shape, draw, plan)
        if plan.transposed:
            w, w2 = tl.trans(w), tl.trans(w2)
        a = plus_product(a, w, u, PRECISION)
        b = plus_product(b, w2, u2, PRECISION)

    # Philox gives the noise of four or eight neighbours in a row of the results, so the tile is transposed first.
    a = tl.trans(a)
    b = tl.trans(b)
    place = example.to(tl.int64)[:, None] * shape.rows + row[None, :]
    inside = known[:, None] & (row < shape.rows)[None, :]
    if plan.kind == GAUSSIAN:
        if plan.transposed:
            z = scale * a + 2 * upcast(tl.load(operands.v + place, mask=inside, other=0.0)) * b
        else:
            if sigma_ptr is not None:
                sigma = upcast(tl.load(sigma_ptr))
            root = sqrt(b)
            if epilogue.root is not None:
                tl.store(epilogue.root + place, root, mask=inside)
            eps = _normals(example, first_row, draw, OUT, COUNT, ROWS)
            z = scale * a + sigma * root * eps
    else:
        if epilogue.bias_sigma is not None:
            b += upcast(tl.load(epilogue.bias_sigma + row, mask=row < shape.rows, other=0.0))[None, :]
        USE: tl.constexpr = IN if plan.transposed else OUT
        z = scale * (a + _noisy(b, example, first_row, draw, USE, plan.kind))
    if epilogue.bias is not None:
        z += upcast(tl.load(epilogue.bias + row, mask=row < shape.rows, other=0.0))[None, :]
    if epilogue.before is not None:
        tl.store(epilogue.before + place, z.to(epilogue.before.dtype.element_ty), mask=inside)
    if ACTIVATION is not None:
        z = activation.forward(z, ACTIVATION, epilogue.z.dtype.element_ty)
    tl.store(epilogue.z + place, z.to(epilogue.z.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def weight_gradient(
    tensors: GradientTensors,
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    scale: tl.float32,
    shape: GradientShape,
    plan: tl.constexpr,
):
    """dW of GAUSSIAN and FLIPOUT. Grid: blocks of outputs times blocks of inputs."""
    OUTPUTS: tl.constexpr = plan.rows
    INPUTS: tl.constexpr = plan.columns
    COUNT: tl.constexpr = plan.examples
    PRECISION: tl.constexpr = plan.precision
    draw = _draw(seed_ptr, seed, offset)
    output_block, input_block = block_of_program(tl.cdiv(shape.outputs, OUTPUTS))
    first_output, first_input = output_block * OUTPUTS, input_block * INPUTS
    output = first_output + tl.arange(0, OUTPUTS)
    input = first_input + tl.arange(0, INPUTS)
    a = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    b = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for start in range(0, bound(shape.examples), COUNT):
        example = start + tl.arange(0, COUNT)
        known = (example < shape.examples)[:, None]
        place = example.to(tl.int64)[:, None] * shape.outputs + output[None, :]
        inside = known & (output < shape.outputs)[None, :]
        dz = tl.load(tensors.dz + place, mask=inside, other=0.0)
        dz2 = tl.load(tensors.dz2 + place, mask=inside, other=0.0)
        place = example.to(tl.int64)[:, None] * shape.inputs + input[None, :]
        inside = known & (input < shape.inputs)[None, :]
        v = tl.load(tensors.v + place, mask=inside, other=0.0)
        v2 = tl.load(tensors.v2 + place, mask=inside, other=0.0)
        a = plus_product(a, tl.trans(dz), v, PRECISION)
        b = plus_product(b, tl.trans(dz2), v2, PRECISION)
    place = output.to(tl.int64)[:, None] * shape.inputs + input[None, :]
    inside = (output < shape.outputs)[:, None] & (input < shape.inputs)[None, :]
    if plan.kind == GAUSSIAN:
        dw = scale * a + 2 * upcast(tl.load(tensors.w + place, mask=inside, other=0.0)) * b
    else:
        dw = scale * (a + _flipped(b, output, first_input, draw, 0))
    tl.store(tensors.dw + place, dw.to(tensors.dw.dtype.element_ty), mask=inside)

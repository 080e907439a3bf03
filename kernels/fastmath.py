"""Elementary functions, conversions and sums at the hardware's own speed.

Functions are one instruction of the special-function unit (16 results per clock and multiprocessor, an eighth of
the fp32 rate), flushing denormals. The plain Triton forms of exp2, log2, division, sin and cos wrap the same
instruction in range handling of up to a hundred instructions that our arguments never need.

Conversions between 16 and 32 bits, and on Blackwell sums and products, take two elements at a time: the compiler,
which sees elements one by one, finds few of these pairs.

fp64 tensors, and the interpreter (which has no inline assembly), take the plain form.

Maximum errors, from the PTX ISA: ex2 2 ulp, lg2 2^-22 absolute near 1 and 2 ulp elsewhere, rcp 1 ulp,
sqrt 2^-23 relative, sin and cos 2^-20.5 absolute on [-pi, pi], tanh 2^-11 relative.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def _special(x, NAME: tl.constexpr):
    """One instruction of the special-function unit."""
    return tl.inline_asm_elementwise(NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def exp2(x):
    return tl.exp2(x) if INTERPRETED or x.dtype == tl.float64 else _special(x, "ex2")


@triton.jit
def log2(x):
    return tl.log2(x) if INTERPRETED or x.dtype == tl.float64 else _special(x, "lg2")


@triton.jit
def reciprocal(x):
    return 1.0 / x if INTERPRETED or x.dtype == tl.float64 else _special(x, "rcp")


@triton.jit
def sqrt(x):
    return tl.sqrt(x) if INTERPRETED or x.dtype == tl.float64 else _special(x, "sqrt")


@triton.jit
def sin(x):
    return tl.sin(x) if INTERPRETED or x.dtype == tl.float64 else _special(x, "sin")


@triton.jit
def cos(x):
    return tl.cos(x) if INTERPRETED or x.dtype == tl.float64 else _special(x, "cos")


@tl.core.builtin
def comes_in(x, number, _semantic=None):
    """Whether assembly can take the elements of ``x`` so many at a time."""
    return tl.constexpr(x.type.is_block() and x.numel.value % number.value == 0)


@tl.core.builtin
def _capability(_semantic=None):
    """Of the target that the kernel is compiled for, which may be none that is at hand: 90 is Hopper, 100 Blackwell."""
    return tl.constexpr(int(_semantic.builder.options.arch.removeprefix("sm")))


@tl.core.builtin
def has_capability(least, _semantic=None):
    return tl.constexpr(_capability(_semantic=_semantic).value >= least.value)


@tl.core.builtin
def in_pairs(x, _semantic=None):
    """Whether there are operations on pairs of the elements of ``x``."""
    fp32 = x.dtype == tl.float32 and x.type.is_block() and x.numel.value % 2 == 0
    return tl.constexpr(fp32 and _capability(_semantic=_semantic).value >= 100)


@tl.core.builtin
def _mixes(x, y, _semantic=None):
    """Whether there are operations on bf16 ``x`` and fp32 ``y``."""
    types = x.dtype == tl.bfloat16 and y.dtype == tl.float32
    return tl.constexpr(types and _capability(_semantic=_semantic).value >= 100 and x.numel.value % 2 == 0)


@triton.jit
def bound(number):
    """A runtime number as the bound of a loop. Triton 3.6 interprets numbers as arrays of one element, which numpy 2.4
    and later does not take for an index: where it is interpreted, the number itself."""
    return (number + tl.zeros([1], tl.int32)).handle.data.item() if INTERPRETED else number


# --- between 16 and 32 bits -------------------------------------------------------------------------------


@triton.jit
def upcast(x):
    """fp16, bf16 and fp32 to fp32; fp64 stays. The first operation on every loaded value: the interpreter
    computes on the bit patterns of bf16.

    Two bf16 in a register are one instruction each away from fp32. The compiler takes three for both.
    """
    if x.dtype == tl.float64:
        return x
    elif INTERPRETED or x.dtype != tl.bfloat16 or not comes_in(x, 2):
        return x.to(tl.float32)
    else:
        unpack: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return tl.inline_asm_elementwise(unpack, "=r,=r,r", [x], tl.float32, True, 2)


@triton.jit
def tf32(x):
    """fp32 ``x``, rounded to the 11 bits that TF32 has. The largest numbers become infinite, NaN some number."""
    if INTERPRETED or _capability() < 90:
        return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise("cvt.rn.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)


# --- arithmetic -------------------------------------------------------------------------------------------
#
# Blackwell (sm_100 and later) adds and multiplies two fp32 elements in one instruction (PTX: add, mul and fma.f32x2),
# and adds bf16 to fp32. It has no more lanes for that: what is won are issue slots. Elsewhere these are the plain
# operations. Tiles, or tiles and numbers.


@triton.jit
def _of_pairs(a, b, NAME: tl.constexpr):
    return tl.inline_asm_elementwise(
        "{ .reg .b64 a, b; mov.b64 a, {$2, $3}; mov.b64 b, {$4, $5}; "
        + NAME + ".rn.f32x2 a, a, b; mov.b64 {$0, $1}, a; }",
        "=f,=f,f,f,f,f", [a, b], tl.float32, True, 2,
    )  # fmt: skip


@triton.jit
def add(a, b):
    return a + b if INTERPRETED or not in_pairs(a) else _of_pairs(a, b, "add")


@triton.jit
def mul(a, b):
    return a * b if INTERPRETED or not in_pairs(a) else _of_pairs(a, b, "mul")


@triton.constexpr_function
def _is_number(x):
    """Whether ``x`` is written in the source, and no tensor."""
    return isinstance(x, int | float)


@triton.jit
def _of_dtype(x, like):
    return tl.full([], x, like.dtype) if _is_number(x) else x


@triton.jit
def fma(a, b, c):
    """a b + c. ``b`` and ``c`` may be numbers, in the dtype of ``a``. (``tl.fma`` makes fp32 of them first, until
    Triton 3.8, as ``tl.minimum``, ``tl.maximum`` and comparisons do: these get numbers of few digits.)"""
    if INTERPRETED or not in_pairs(a):
        return tl.fma(a, _of_dtype(b, a), _of_dtype(c, a))
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 a, b, c; mov.b64 a, {$2, $3}; mov.b64 b, {$4, $5}; mov.b64 c, {$6, $7};"
            " fma.rn.f32x2 a, a, b, c; mov.b64 {$0, $1}, a; }",
            "=f,=f,f,f,f,f,f,f", [a, b, c], tl.float32, True, 2,
        )  # fmt: skip


@triton.jit
def negated(x):
    """-x, as an operand. A sign is free but in an operation on pairs."""
    return -x if INTERPRETED or not in_pairs(x) else mul(x, -1.0)


@triton.jit
def _of_mixed_pairs(x, y, NAME: tl.constexpr):
    return tl.inline_asm_elementwise(
        "{ .reg .b16 a, b; mov.b32 {a, b}, $2; "
        + NAME + ".rn.f32.bf16 $0, a, $3; " + NAME + ".rn.f32.bf16 $1, b, $4; }",
        "=f,=f,r,f,f", [x, y], tl.float32, True, 2,
    )  # fmt: skip


@triton.jit
def difference(x, y):
    """x - y of a stored ``x`` and a computed ``y``."""
    return upcast(x) - y if INTERPRETED or not _mixes(x, y) else _of_mixed_pairs(x, y, "sub")


@triton.jit
def total(x, y):
    """x + y of a stored ``x`` and a computed ``y``, in the dtype of ``y``."""
    if INTERPRETED or not _mixes(x, y):
        return add(y, upcast(x).to(y.dtype))
    else:
        return _of_mixed_pairs(x, y, "add")

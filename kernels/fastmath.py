"""Elementary functions at the hardware's own speed.

Each is one instruction of the special-function unit (16 results per clock and multiprocessor, an eighth of
the fp32 rate), flushing denormals. The plain Triton forms of exp2, log2, division, sin and cos wrap the same
instruction in range handling of up to a hundred instructions that our arguments never need.

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


@triton.jit
def bound(number):
    """A runtime number as the bound of a loop. Triton 3.6 interprets numbers as arrays of one element, which numpy 2.4
    and later does not take for an index: where it is interpreted, the number itself."""
    return (number + tl.zeros([1], tl.int32)).handle.data.item() if INTERPRETED else number


@triton.jit
def upcast(x):
    """fp16, bf16 and fp32 to fp32; fp64 stays. The first operation on every loaded value: the interpreter
    computes on the bit patterns of bf16."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def packed(x, DTYPE: tl.constexpr):
    """fp32 to a narrower dtype in which it stays for a while. Of values that are converted back later, LLVM would
    convert each by itself, into a register of its own; the instruction here makes one of two."""
    if INTERPRETED or x.dtype != tl.float32 or DTYPE.primitive_bitwidth > 16:
        return x.to(DTYPE)
    elif DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, True, 2)


@triton.jit
def renamed(x):
    """``x`` behind a move that costs nothing. To the compiler these are other numbers: what it has computed from the
    first, and would keep in registers until it is wanted again, it computes anew."""
    if INTERPRETED or x.dtype == tl.float64:
        return x
    elif x.dtype == tl.float32:
        return tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    elif x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.float16, True, 2)

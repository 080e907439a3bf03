"""Tricks that talk to the compiler: LLVM, and behind it the assembler, ptxas. None changes a result.

A reader of an algorithm may take each for its first argument and read on. They are here because two compilers decide
what stays in registers, and sometimes decide badly: they see neither that a value is needed once more much later, nor
that a thread has no room for it.

Each docstring says what was counted without it, in the 35 forms of whole-unit normalization that ``fastreg inspect``
compiles (Triton 3.9, sm_90 and sm_100). A spill is a value that goes to memory and back, which our budgets forbid.

The interpreter, which has no assembler, returns the value itself.
"""

import triton
import triton.language as tl

from .fastmath import INTERPRETED, comes_in, has_capability, in_pairs, mul

# --- what stays in registers ------------------------------------------------------------------------------


@triton.jit
def force_evaluated(x, nonneg):
    """``x``, computed at this point.

    ptxas puts off long sums, and keeps their terms in registers until then. So the sum is used at once, by a store
    whose predicate is never true. nonneg: any runtime int >= 0, which makes it false in a way that ptxas cannot prove.
    Without it: ``whole_backward`` of 7 x 7 planes with relu in bf16 spills 48 bytes a thread on sm_90, 32 on sm_100.
    """
    if INTERPRETED or x.dtype != tl.float32 or not comes_in(x, 8):
        return x
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred never; setp.lt.s32 never, $16, 0;"
            " @never st.shared.v4.b32 [$16], {$8, $9, $10, $11}; @never st.shared.v4.b32 [$16], {$12, $13, $14, $15};"
            " mov.b32 $0, $8; mov.b32 $1, $9; mov.b32 $2, $10; mov.b32 $3, $11;"
            " mov.b32 $4, $12; mov.b32 $5, $13; mov.b32 $6, $14; mov.b32 $7, $15; }",
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [x, nonneg], tl.float32, False, 8,
        )  # fmt: skip


@triton.jit
def pack_16bit(x, like, nonneg):
    """fp32 to the dtype of ``like``. If that has 16 bits, two elements share a register until they are converted back.

    LLVM would convert each element into a register of its own, and ptxas would put that off to the last moment and keep
    fp32 until then. So eight are converted together and used at once, as in ``force_evaluated``.
    Without it: the same form spills 48 bytes a thread on sm_90 and 16 on sm_100; groups of 10 with silu 8 on sm_100.
    """
    if INTERPRETED or x.dtype != tl.float32 or like.dtype.primitive_bitwidth > 16 or not comes_in(x, 8):
        return x.to(like.dtype)
    else:
        CONVERT: tl.constexpr = "cvt.rn.bf16x2.f32 " if like.dtype == tl.bfloat16 else "cvt.rn.f16x2.f32 "
        return tl.inline_asm_elementwise(
            "{ .reg .pred never; setp.lt.s32 never, $12, 0; "
            + (CONVERT + "$0, $5, $4; ") + (CONVERT + "$1, $7, $6; ")
            + (CONVERT + "$2, $9, $8; ") + (CONVERT + "$3, $11, $10; ")
            + "@never st.shared.v4.b32 [$12], {$0, $1, $2, $3}; }",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [x, nonneg], like.dtype, False, 8,
        )  # fmt: skip


@triton.jit
def opaque(x):
    """``x`` behind a move that costs nothing, which hides it from common-subexpression elimination.

    What was computed from ``x`` before is computed again from the result, and need not be kept until then.
    Without it: 3.5 % fewer instructions in the 15 forms that it changes, but 4 of them spill 8 or 16 bytes on sm_90,
    and one on sm_100.
    """
    if INTERPRETED or x.dtype == tl.float64:
        return x
    elif x.dtype == tl.float32:
        return tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    elif x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.bfloat16, True, 2)
    elif x.dtype == tl.int32:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.float16, True, 2)


@triton.jit
def to_vector_register(x):
    """A value that is the same in all lanes, copied from a register of the warp to one of each lane.

    ptxas for sm_100 keeps it in the warp's, which fp32 arithmetic cannot read, and moves it before every use. (Bit 31
    of the mask of lower lanes is 0 in every lane, which ptxas does not know.)
    Without it: up to 12.5 % more instructions on sm_100, 3.1 % on average in the 11 forms that it changes.
    """
    if INTERPRETED or x.dtype != tl.float32 or not has_capability(100):
        return x
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.u32 zero, %lanemask_lt; shr.u32 zero, zero, 31; or.b32 $0, $1, zero; }",
            "=r,r", [x], tl.float32, True, 1,
        )  # fmt: skip


# --- how loops are written --------------------------------------------------------------------------------


@triton.jit
def unknown_one():
    """1, in a launch of two dimensions. With a constant step, LLVM would know a loop's trips, and write unrolled copies
    and a remainder. Without it: 5 % more written instructions in the 4 forms that it changes, at most 10 %."""
    return tl.num_programs(2)


# --- what becomes an fma ----------------------------------------------------------------------------------


@tl.core.builtin
def _several(x, axis, run, _semantic=None):
    """Whether each thread has several elements of ``x`` along the axis: for want of more threads; or in the layout of
    loads, where it has runs of so many neighbours."""
    threads, shape = 32 * _semantic.builder.options.num_warps, x.type.shape
    own = max(1, x.numel.value // threads)
    run = min(run.value, own)
    of_loads = run > 1 if axis.value == len(shape) - 1 else run > 0 and own // run > 1
    return tl.constexpr(shape[axis.value] >= 2 * threads or of_loads)


@triton.jit
def rounded_product(a, b):
    """a b, rounded, which no sum takes into an fma."""
    if INTERPRETED or in_pairs(a):
        return mul(a, b)
    elif a.dtype == tl.float64:
        return tl.inline_asm_elementwise("mul.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, True, 1)
    else:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)


@triton.jit
def terms(a, b, axis: tl.constexpr, run: tl.constexpr = 0, used: tl.constexpr = False):
    """a b, whose sum along the axis is the same in all lanes.

    Lanes exchange their sums and add: s + (s of the other). Where s is one product, LLVM makes that fma(a, b, s of the
    other): each lane then has its product unrounded and the other's rounded, and lanes differ in their last bits. So
    products are rounded where a thread may have a single one. Several are a sum first.

    run: how many neighbours in a row a thread loads at once, where no other layout than that of its loads is likely.
    used: the products are needed for more than the sum, so that LLVM may not merge them.
    """
    if INTERPRETED or _several(a, axis, run):
        return mul(a, b) if used else a * b
    else:
        return rounded_product(a, b)

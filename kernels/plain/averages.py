"""An exponential moving average of weights, on one tensor: a = a + weight (p - a), weight = 1 - decay.

The tuned twin, ``kernels/averages.py``, follows all tensors of a model in one launch.
"""

import triton
import triton.language as tl


@triton.jit
def follow(a_ptr, p_ptr, size, weight: tl.float32, BLOCK: tl.constexpr):
    """a, p [size]; a is written. Grid: (blocks,)."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + element, mask=element < size, other=0.0).to(tl.float32)
    p = tl.load(p_ptr + element, mask=element < size, other=0.0).to(tl.float32)
    tl.store(a_ptr + element, a + weight * (p - a), mask=element < size)

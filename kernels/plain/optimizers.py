"""A step of SGD with momentum, and of AdamW (Loshchilov and Hutter 2019), on one tensor.

    SGD     g = g + weight_decay p;   m = momentum m + g (g itself at t = 1);   p = p - lr m
    AdamW   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
            p = p (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

The tuned twin, ``kernels/optimizers.py``, steps all tensors in one launch.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, element, size):
    return tl.load(ptr + element, mask=element < size, other=0.0).to(tl.float32)


@triton.jit
def sgd(p_ptr, g_ptr, m_ptr, size, lr: tl.float32, momentum: tl.float32, weight_decay: tl.float32,
        FIRST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """p, g, m [size]; p and m are written. Grid: (blocks,)."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p = _load(p_ptr, element, size)
    g = _load(g_ptr, element, size) + weight_decay * p
    m = g if FIRST else momentum * _load(m_ptr, element, size) + g
    tl.store(m_ptr + element, m, mask=element < size)
    tl.store(p_ptr + element, p - lr * m, mask=element < size)


@triton.jit
def adamw(p_ptr, g_ptr, m_ptr, v_ptr, size, lr: tl.float32, beta1: tl.float32, beta2: tl.float32, eps: tl.float32,
          weight_decay: tl.float32, correction1: tl.float32, correction2: tl.float32, BLOCK: tl.constexpr):  # fmt: skip
    """p, g, m, v [size]; p, m and v are written. correction: 1 - beta^t. Grid: (blocks,)."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p, g = _load(p_ptr, element, size), _load(g_ptr, element, size)
    m = beta1 * _load(m_ptr, element, size) + (1 - beta1) * g
    v = beta2 * _load(v_ptr, element, size) + (1 - beta2) * g * g
    p = p * (1 - lr * weight_decay) - lr / correction1 * m / (tl.sqrt(v / correction2) + eps)
    tl.store(m_ptr + element, m, mask=element < size)
    tl.store(v_ptr + element, v, mask=element < size)
    tl.store(p_ptr + element, p, mask=element < size)

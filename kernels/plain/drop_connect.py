"""DropConnect (Wan et al. 2013): a linear layer in which every example has its own mask for all weights.

    z[b, n]  = scale sum over k of m(b, n, k) W[n, k] v[b, k] + bias[n]
    dv[b, k] = scale sum over n of m(b, n, k) W[n, k] dz[b, n]
    dW[n, k] = scale sum over b of m(b, n, k) dz[b, n] v[b, k]

No mask is stored: m(b, n, k) is drawn from seed, b, n and k wherever it is needed. The tuned twin is
``kernels/drop_connect.py``.
"""

import triton
import triton.language as tl


@triton.jit
def _kept(b, n, k, seed, KEEP: tl.constexpr, DIGITS: tl.constexpr):
    """m(b, n, k), with probability KEEP / 2^DIGITS: a random bit for each binary digit, from the last to the first."""
    none = tl.zeros_like(b + n + k)
    kept = none < 0
    for digit in tl.static_range(DIGITS):
        high = (none + b // 16 + (digit << 28)).to(tl.uint32)  # of the offset
        block = (none + k // 8).to(tl.uint32)
        r0, r1, r2, r3 = tl.philox(seed, block, (none + n).to(tl.uint32), none.to(tl.uint32), high)
        word = tl.where(k % 8 < 4, tl.where(k % 8 < 2, r0, r1), tl.where(k % 8 < 6, r2, r3))
        bit = (word >> (k % 2 * 16 + 15 - b % 16).to(tl.uint32)) & 1 == 1
        kept = kept | bit if (KEEP >> digit) & 1 else kept & bit
    return kept


@triton.jit
def forward(v_ptr, weight_ptr, bias_ptr, z_ptr, outputs, inputs, seed: tl.int64, scale: tl.float32,
            KEEP: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """v [examples, inputs], weight [outputs, inputs], z [examples, outputs]. Grid: (examples, outputs)."""
    b, n, k = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    v = tl.load(v_ptr + b * inputs + k, mask=k < inputs, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + n * inputs + k, mask=k < inputs, other=0.0).to(tl.float32)
    z = scale * tl.sum(tl.where(_kept(b, n, k, seed, KEEP, DIGITS), w * v, 0.0))
    tl.store(z_ptr + b * outputs + n, z + tl.load(bias_ptr + n).to(tl.float32))


@triton.jit
def backward_input(weight_ptr, dz_ptr, dv_ptr, outputs, inputs, seed: tl.int64, scale: tl.float32,
                   KEEP: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid: (examples, inputs)."""
    b, n, k = tl.program_id(0), tl.arange(0, BLOCK), tl.program_id(1)
    w = tl.load(weight_ptr + n * inputs + k, mask=n < outputs, other=0.0).to(tl.float32)
    dz = tl.load(dz_ptr + b * outputs + n, mask=n < outputs, other=0.0).to(tl.float32)
    tl.store(
        dv_ptr + b * inputs + k, scale * tl.sum(tl.where(_kept(b, n, k, seed, KEEP, DIGITS), w * dz, 0.0))
    )


@triton.jit
def backward_weight(v_ptr, dz_ptr, dweight_ptr, examples, outputs, inputs, seed: tl.int64, scale: tl.float32,
                    KEEP: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid: (outputs, inputs)."""
    b, n, k = tl.arange(0, BLOCK), tl.program_id(0), tl.program_id(1)
    v = tl.load(v_ptr + b * inputs + k, mask=b < examples, other=0.0).to(tl.float32)
    dz = tl.load(dz_ptr + b * outputs + n, mask=b < examples, other=0.0).to(tl.float32)
    tl.store(
        dweight_ptr + n * inputs + k,
        scale * tl.sum(tl.where(_kept(b, n, k, seed, KEEP, DIGITS), v * dz, 0.0)),
    )

"""Layer normalization (Ba, Kiros and Hinton 2016) and RMS normalization (Zhang and Sennrich 2019) of each row.

    y = xhat w + b,   xhat = (x - mean) rstd,   rstd = 1 / sqrt(mean((x - mean)^2) + eps)      (RMS: mean = 0)
    dx = rstd (w dy - mean(w dy) - xhat mean(w dy xhat))                                       (RMS: no mean(w dy))

The tuned twin is ``kernels/layer_norm.py``.
"""

import triton
import triton.language as tl


@triton.jit
def _row(x_ptr, columns, eps, RMS: tl.constexpr, BLOCK: tl.constexpr):
    """xhat and rstd of this program's row, its elements, and which are in it."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    element = tl.program_id(0).to(tl.int64) * columns + column
    x = tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32)
    mean = 0.0 if RMS else tl.sum(x) / columns
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred) / columns + eps)
    return centred * rstd, rstd, column, element, inside


@triton.jit
def forward(
    x_ptr, weight_ptr, bias_ptr, y_ptr, columns, eps: tl.float32, RMS: tl.constexpr, BLOCK: tl.constexpr
):
    """x, y [rows, columns]; weight, bias [columns]. Grid: (rows,)."""
    xhat, _, column, element, inside = _row(x_ptr, columns, eps, RMS, BLOCK)
    y = xhat * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if not RMS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + element, y, mask=inside)


@triton.jit
def backward(x_ptr, weight_ptr, dy_ptr, dx_ptr, dweight_ptr, dbias_ptr, columns, eps: tl.float32,
             RMS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Also this row's terms of dweight and dbias, fp32 [rows, columns], which torch adds up. Grid: (rows,)."""
    xhat, rstd, column, element, inside = _row(x_ptr, columns, eps, RMS, BLOCK)
    dy = tl.load(dy_ptr + element, mask=inside, other=0.0).to(tl.float32)
    g = dy * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dx = g - xhat * (tl.sum(g * xhat) / columns)
    if not RMS:
        dx -= tl.sum(g) / columns
        tl.store(dbias_ptr + element, dy, mask=inside)
    tl.store(dx_ptr + element, rstd * dx, mask=inside)
    tl.store(dweight_ptr + element, dy * xhat, mask=inside)

"""Batch normalization (Ioffe and Szegedy 2015) and group normalization (Wu and He 2018), in training.

A tensor [samples, channels, inner] is rows of ``inner`` elements, one for each sample and channel. What shares a mean
and a variance is a unit, and a program takes one: row r of unit u is row u * unit_stride + r * row_stride.

    batch norm   a unit is a channel of all samples      unit_stride = 1              row_stride = channels
    group norm   a unit is some channels of a sample     unit_stride = rows_per_unit  row_stride = 1

The tuned twin is ``kernels/channel_norm/``.
"""

import triton
import triton.language as tl

from ..fastmath import bound


@triton.jit
def _row(r, unit_stride, row_stride, channels, inner, BLOCK: tl.constexpr):
    """The elements of row r of this program's unit, which of them are in it, and its channel."""
    row = tl.program_id(0).to(tl.int64) * unit_stride + r * row_stride
    column = tl.arange(0, BLOCK)
    return row * inner + column, column < inner, row % channels


@triton.jit
def forward(x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows_per_unit, unit_stride, row_stride, channels,
            inner, eps: tl.float32, BLOCK: tl.constexpr):  # fmt: skip
    """x, y [samples, channels, inner]; weight, bias [channels]; mean, rstd fp32 [units]. Grid: (units,)."""
    count = rows_per_unit * inner
    total = tl.zeros([BLOCK], tl.float32)
    for r in range(bound(rows_per_unit)):
        element, inside, _ = _row(r, unit_stride, row_stride, channels, inner, BLOCK)
        total += tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total) / count
    squares = tl.zeros([BLOCK], tl.float32)
    for r in range(bound(rows_per_unit)):
        element, inside, _ = _row(r, unit_stride, row_stride, channels, inner, BLOCK)
        centred = tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32) - mean
        squares += tl.where(inside, centred * centred, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(squares) / count + eps)
    for r in range(bound(rows_per_unit)):
        element, inside, channel = _row(r, unit_stride, row_stride, channels, inner, BLOCK)
        xhat = (tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        y = xhat * tl.load(weight_ptr + channel).to(tl.float32) + tl.load(bias_ptr + channel).to(tl.float32)
        tl.store(y_ptr + element, y, mask=inside)
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), rstd)


@triton.jit
def backward(x_ptr, weight_ptr, mean_ptr, rstd_ptr, dy_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows_per_unit, unit_stride,
             row_stride, channels, inner, BLOCK: tl.constexpr):  # fmt: skip
    """dx, and each row's terms of dweight and dbias: fp32 [samples, channels], which torch adds up. Grid: (units,)."""
    mean, rstd = tl.load(mean_ptr + tl.program_id(0)), tl.load(rstd_ptr + tl.program_id(0))
    count = rows_per_unit * inner
    sum_g = 0.0
    sum_g_xhat = 0.0
    for r in range(bound(rows_per_unit)):
        element, inside, channel = _row(r, unit_stride, row_stride, channels, inner, BLOCK)
        xhat = (tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        dy = tl.load(dy_ptr + element, mask=inside, other=0.0).to(tl.float32)
        row = tl.program_id(0).to(tl.int64) * unit_stride + r * row_stride
        dweight, dbias = tl.sum(dy * xhat), tl.sum(dy)
        tl.store(dweight_ptr + row, dweight)
        tl.store(dbias_ptr + row, dbias)
        weight = tl.load(weight_ptr + channel).to(tl.float32)
        sum_g += weight * dbias
        sum_g_xhat += weight * dweight
    for r in range(bound(rows_per_unit)):
        element, inside, channel = _row(r, unit_stride, row_stride, channels, inner, BLOCK)
        xhat = (tl.load(x_ptr + element, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        g = tl.load(dy_ptr + element, mask=inside, other=0.0).to(tl.float32) * tl.load(weight_ptr + channel)
        tl.store(dx_ptr + element, rstd * (g - sum_g / count - xhat * (sum_g_xhat / count)), mask=inside)

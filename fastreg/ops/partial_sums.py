"""Sums over rows that programs have left (``kernels/partial_sums.py``)."""

from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.backend import Launch
from fastreg.ops.layout import ceil_div

if backend.HAS_TRITON:
    from fastreg.kernels import partial_sums as kernels


def sum_launch(partial: Tensor, *results: Tensor) -> Launch:
    """partial: fp32 (fp64) ``[results, programs, columns]``. results: one or two of ``[columns]``, of any dtype."""
    _, programs, columns = partial.shape
    arguments = {
        "partial_ptr": partial,
        "first_ptr": results[0],
        "second_ptr": results[1] if len(results) > 1 else None,
        "programs": programs,
        "columns": columns,
        "BLOCK_ROWS": 64,
        "BLOCK_COLUMNS": 32,
        "WIDE": programs * columns >= 1 << 31,
        "num_warps": 8,
    }
    return Launch(kernels.sum_partials, (ceil_div(columns, 32), len(results)), arguments)

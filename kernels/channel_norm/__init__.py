"""Batch, group and instance normalization: y = f((x - mean) / sqrt(var + eps) weight + bias + residual).

Ioffe and Szegedy 2015 (batch), Ulyanov et al. 2016 (instance), Wu and He 2018 (group): one set of kernels, which differ
in what shares a mean and a variance. Read the files in this order:

    geometry.py      lines, units, tiles, and the two orders of memory
    moments.py       mean and variance, and why nothing cancels
    elementwise.py   the equations: y, and the gradients
    whole.py         the plan for units that one program can take: one launch
    split.py         the plan for the others: three launches
    units.py         values per unit and per line (needed for groups in channels last, hard to read)
    signs.py         one bit an element in place of a residual

Accesses of an activation-sized tensor in device memory, forward / backward:

    whole   one program takes whole units                                                2 / 3
    split   every line is spread over several programs                                   3 / 5

A residual is one more read forward and one more write backward (its gradient). Its activation needs the sign or the
value of v, which it was applied to: relu and leaky_relu keep one bit an element (``signs``), others read the residual
again. Without a residual the backward pass computes v from x. Nothing else is saved but a mean and a variance a unit.

Predicted for an A100, an H100 and a B200: instructions take less time than memory in every form that is inspected.

The plain twin is ../plain/channel_norm.py. What this one does otherwise:
- A unit stays in registers: x is read once and not three times forward, x and dy once and not twice backward.
- Split units: one program a channel leaves a GPU of 132 multiprocessors idle where a network has 64 channels.
- Channels last without a copy, which would be four accesses more.
- Activation and residual in the same pass, and one bit an element for the sign: at least two accesses less for each.
- Running statistics in the same launch.
"""

from .elementwise import Backward, Forward, Gradients, Means, Sums
from .geometry import Tile, View
from .moments import Partials, Running
from .split import (
    Merge,
    Merged,
    apply,
    gradient_apply,
    gradient_sums,
    merge_gradient_sums,
    merge_statistics,
    statistics,
)
from .units import Affine, Moments, Units
from .whole import Plan, whole_backward, whole_forward

__all__ = [
    "Affine",
    "Backward",
    "Forward",
    "Gradients",
    "Means",
    "Merge",
    "Merged",
    "Moments",
    "Partials",
    "Plan",
    "Running",
    "Sums",
    "Tile",
    "Units",
    "View",
    "apply",
    "gradient_apply",
    "gradient_sums",
    "merge_gradient_sums",
    "merge_statistics",
    "statistics",
    "whole_backward",
    "whole_forward",
]

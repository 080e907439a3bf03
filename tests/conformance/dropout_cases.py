"""Forms of dropout, ours and torch's, for the files ``test_dropout_*.py`` of this folder."""

import pytest
import torch
import torch.nn.functional as F

import fastreg.functional as FF
from fastreg import random

SEED = 20

# Name -> dimensions of a draw (0: elements), and whether it is an alpha dropout.
FORMS = {
    "dropout": (0, False),
    "dropout1d": (2, False),
    "dropout2d": (2, False),
    "dropout3d": (2, False),
    "alpha_dropout": (0, True),
    "feature_alpha_dropout": (2, True),
    "drop_path": (1, False),
}
TORCH_FORMS = [name for name in FORMS if hasattr(F, name)]  # torch has no drop_path
SHAPES = {
    "dropout": (3, 7),
    "dropout1d": (3, 4, 5),
    "dropout2d": (3, 4, 2, 3),
    "dropout3d": (2, 4, 2, 1, 3),
    "alpha_dropout": (3, 7),
    "feature_alpha_dropout": (3, 4, 2, 3),
    "drop_path": (5, 2, 3),
}


all_forms = pytest.mark.parametrize("name", FORMS)
torch_forms = pytest.mark.parametrize("name", TORCH_FORMS)


def ours(name):
    return getattr(FF, name)


def theirs(name):
    return getattr(F, name)


def constants(name: str, p: float, exact_p: bool) -> tuple[float, float, float]:
    """a, b, d of one dropout: a x + b is kept, d is what is dropped to.

    exact_p: the scale of torch, 1 / (1 - p); else ours, which follows the probability applied.
    """
    kept = 1 - p if exact_p else 1 - random.threshold(p) / 2**16
    if kept in (0, 1):
        return 1.0, 0.0, 0.0
    if not FORMS[name][1]:
        return 1 / kept, 0.0, 0.0
    alpha = -1.7580993408473766
    a = ((alpha**2 * (1 - kept) + 1) * kept) ** -0.5
    b = -a * alpha * (1 - kept)
    return a, b, a * alpha + b


def kept_of(y, x, name, p, exact_p, *, unbatched=False):
    """Asserts that y is a dropout of x and returns which elements were kept (False where both look the same).

    Tolerance: 0 where a is a power of two and nothing is added (p = 0.5), for then nothing is rounded. Else 2 ulps
    of the product: torch rounds 1 / (1 - p) and the product to the dtype. Alpha dropout of torch makes six
    roundings of numbers up to |a x| + |d| + |b|.
    """
    a, b, d = constants(name, p, exact_p)
    dims, alpha = FORMS[name]
    dims -= unbatched
    x, y, eps = x.detach().double(), y.detach().double(), torch.finfo(y.dtype).eps
    if alpha and a != 1:
        tolerance = 6 * eps * ((a * x).abs() + abs(b) + abs(d))
    else:
        tolerance = 0.0 if a in (1, 2) else 2 * eps * (a * x).abs()
    kept, dropped = (y - (a * x + b)).abs() <= tolerance, (y - d).abs() <= (tolerance if alpha else 0)
    if dims == 0:
        assert (kept | dropped).all()
    else:
        groups = x.shape[:dims].numel()
        all_kept = kept.reshape(groups, -1).all(1)
        all_dropped = dropped.reshape(groups, -1).all(1)
        assert (all_kept | all_dropped).all(), "a channel is neither kept nor dropped as a whole"
        kept, dropped = (
            group.view(*x.shape[:dims], *[1] * (x.dim() - dims)).expand(x.shape)
            for group in (all_kept, all_dropped)
        )
    return kept & ~dropped


# --- layouts ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "first_dimension_sliced": lambda x: x.repeat_interleave(2, 0)[::2],
    "offset": lambda x: torch.cat((x[:1], x))[1:],
    "expanded": lambda x: x[:1].expand(x.shape),
    "empty": lambda x: x[:0],
}

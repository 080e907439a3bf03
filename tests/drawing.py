"""Drawn, not chosen: tensors of any rank, size and layout, and sweeps of cases that are the same in every run."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (torch.float64, *FLOATS)
ACTIVATIONS = (None, "relu", "silu")  # none, one with signs, one with values

SWEEP = 100  # cases of a test of a sweep


def sizes(most: int) -> st.SearchStrategy[int]:
    """Sizes of all residues; more often than by chance beside powers of 2, and small multiples of them."""
    powers = [2**k for k in range(most.bit_length())]
    beside = [power + d for power in powers for d in (-1, 1) if 0 < power + d <= most]
    multiples = [k * power for power in powers for k in (1, 3, 5, 7, 10) if k * power <= most]
    return st.one_of(st.integers(1, most), st.sampled_from(beside or [1]), st.sampled_from(multiples))


@st.composite
def shapes(draw, least: int, most: int, elements: int, longest: int = 300) -> list[int]:
    """least, most: dimensions. elements: at most so many, all together; longest: along a dimension."""
    rank = draw(st.integers(least, most))
    shape = [draw(sizes(draw(st.sampled_from([4, 16, 64, longest])))) for _ in range(rank)]
    while math.prod(shape) > elements:
        place = int(np.argmax(shape))
        shape[place] = draw(sizes(max(1, shape[place] // 4)))
    return shape


@st.composite
def layouts(draw, rank: int) -> list[int]:
    """The dimensions in the order of memory, from the outermost on."""
    kind = draw(st.sampled_from(["contiguous", "contiguous", "channels_last", "any"]))
    if kind == "any":
        return draw(st.permutations(range(rank)))
    return [0, *range(2, rank), 1] if kind == "channels_last" and rank > 2 else list(range(rank))


def laid_out(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    """``x`` with its dimensions in this order in memory."""
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


def drawn(sample: int, sweep: int):
    """Runs a test of ``data`` on so many drawn cases, and with ``-m slow`` on ``sweep`` other ones."""
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    cases = [(0, sample, "sample")]
    cases += [(start + 1, min(SWEEP, sweep - start), f"sweep{start}") for start in range(0, sweep, SWEEP)]

    def decorate(test):
        @pytest.mark.parametrize(
            ("start", "count"),
            [
                pytest.param(start, count, id=name, marks=[pytest.mark.slow] if start else [])
                for start, count, name in cases
            ],
        )
        def run(start, count):
            bounds = settings(max_examples=count, deadline=None, database=None, suppress_health_check=checks)
            seed(start)(bounds(given(st.data())(test)))()

        run.__name__ = test.__name__
        return run

    return decorate

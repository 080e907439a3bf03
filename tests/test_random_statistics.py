"""Statistics of the random numbers: uniform bits and keep rates, with an error rate.

Every test computes p-values and hands them to ``assert_plausible``, which alone decides."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tests import assert_plausible, binomial_test, chi_square_test, correlation_test, z_test
from scipy import stats

from fastreg import functional, random
from fastreg.random import LANE_VALUES, Stream

# --- uniform bits -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bits():
    """int64 [2^18, 4]: a million words of the definition."""
    return random.words(torch.arange(1 << 18), Stream(77, 12))


def test_every_bit_is_fair(bits):
    ones = torch.stack([(bits >> k & 1).sum(0) for k in range(32)])
    assert_plausible(z_test((ones - bits.shape[0] / 2) / math.sqrt(bits.shape[0] / 4)))


def test_every_lane_is_uniform(bits):
    """Chi-square of the high and of the low byte of each of the eight lanes."""
    lanes = torch.stack((bits & 0xFFFF, bits >> 16), dim=-1).flatten(1)
    p_values = []
    for lane in lanes.T:
        for byte in (lane >> 8, lane & 255):
            p_values.append(chi_square_test(torch.bincount(byte, minlength=256), lane.numel() / 256))
    assert_plausible(p_values)


def test_lanes_are_uniform_together(bits):
    """Chi-square over all 65,536 values of a lane, two million draws."""
    lanes = torch.cat((bits & 0xFFFF, bits >> 16)).flatten()
    assert_plausible(
        chi_square_test(torch.bincount(lanes, minlength=LANE_VALUES), lanes.numel() / LANE_VALUES)
    )


def test_lanes_do_not_correlate(bits):
    lanes = torch.stack((bits & 0xFFFF, bits >> 16), dim=-1).flatten().double()
    lags = [*range(1, 17), 1024, 4096]
    assert_plausible([correlation_test(lanes[lag:], lanes[:-lag]) for lag in lags])


@pytest.mark.parametrize("part", ["block", "seed", "offset"])
def test_avalanche(part):
    """Any one bit of block, seed or offset flips each of the 128 random bits half of the time."""
    samples = 2048
    generator = torch.Generator().manual_seed(1)
    block, seed, offset = torch.randint(-(2**63), 2**63 - 1, (3, samples), generator=generator)

    def drawn(block, seed, offset):
        counter = (block & 2**32 - 1, block >> 32 & 2**32 - 1, offset & 2**32 - 1, offset >> 32 & 2**32 - 1)
        return torch.stack(random.philox4x32(counter, (seed & 2**32 - 1, seed >> 32 & 2**32 - 1)))

    numbers = {"block": block, "seed": seed, "offset": offset}
    base = drawn(**numbers)
    p_values = []
    for k in range(64):
        flipped = drawn(**numbers | {part: numbers[part] ^ (random._signed(1 << k))}) ^ base
        ones = torch.stack([(flipped >> b & 1).sum(-1) for b in range(32)])
        p_values.append(z_test((ones - samples / 2) / math.sqrt(samples / 4)))
    assert_plausible(torch.stack(p_values))


# --- keep rates -------------------------------------------------------------------------------------------

PROBABILITIES = [1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.7, 0.9, 0.99, 0.999, 0.9999]


def applied(p: float) -> float:
    """The probability that a mask applies."""
    return random.threshold(p) / LANE_VALUES


@pytest.mark.parametrize("p", [0.0, 2**-18, 2**-17, 2**-16, *PROBABILITIES, 1 - 2**-16, 1 - 2**-18, 1.0])
def test_threshold_is_the_nearest(p):
    t = random.threshold(p)
    assert 0 <= t <= LANE_VALUES
    assert abs(t / LANE_VALUES - p) <= 2**-17


@settings(derandomize=True, deadline=None)
@given(p=st.floats(0, 1))
def test_threshold_is_the_nearest_anywhere(p):
    assert abs(random.threshold(p) / LANE_VALUES - p) <= 2**-17


def test_ends_of_the_probability():
    stream = Stream(1)
    assert random.keep_mask((100_000,), 0.0, stream).all()
    assert not random.keep_mask((100_000,), 1.0, stream).any()


@pytest.mark.parametrize("p", PROBABILITIES)
def test_keep_rate(p):
    """The number dropped, of two million: exact binomial test of the applied probability."""
    drop = ~random.keep_mask((1 << 21,), p, Stream(1000, 4))
    assert_plausible(binomial_test(int(drop.sum()), drop.numel(), applied(p)))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5])
def test_keep_rate_does_not_depend_on_the_position(p):
    """Over the 8 lanes of a block, over the positions of a tile of 1,024, and over tiles (dispersion)."""
    drop = (~random.keep_mask((1 << 21,), p, Stream(-1001, 8))).double()
    q = applied(p)
    variance = q * (1 - q)

    def spread(counts, trials):
        return stats.chi2.sf(((counts - trials * q) ** 2).sum() / (trials * variance), counts.numel())

    lanes = drop.view(-1, 8).sum(0)
    positions, tiles = drop.view(-1, 1024).sum(0), drop.view(-1, 1024).sum(1)
    p_values = [spread(lanes, 1 << 18), spread(positions, 2048), spread(tiles, 1024)]
    # Too even is as wrong as too uneven.
    assert_plausible([*p_values, *(1 - p for p in p_values)])


def test_patterns_of_a_block():
    """All 256 masks of the eight elements of a block are equally likely at p = 1/2."""
    keep = random.keep_mask((1 << 21,), 0.5, Stream(1002)).view(-1, 8)
    pattern = (keep.long() << torch.arange(8)).sum(-1)
    assert_plausible(chi_square_test(torch.bincount(pattern, minlength=256), keep.shape[0] / 256))


NEIGHBOURS = {
    "ranks": [Stream(seed) for seed in range(1, 9)],  # seeds that count up, as data-parallel ranks set them
    "bits of the seed": [Stream(random._signed(1 << k)) for k in range(64)],
    "consecutive calls": [Stream(0, 4 * k) for k in range(1, 9)],  # a generator advances by 4 a call
    "bits of the offset": [Stream(0, 1 << k) for k in range(63)],
    "seed and offset": [Stream(0, 4), Stream(4, 0), Stream(4, 4), Stream(1, 4), Stream(4, 1)],
}


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_masks_of_streams_are_independent(kind, p):
    """Every mask against that of stream (0, 0) and against its predecessor: positions dropped by both."""
    size = (1 << 15,)
    drops = [(~random.keep_mask(size, p, stream)).double() for stream in [Stream(0), *NEIGHBOURS[kind]]]
    p_values = [correlation_test(drops[0], other) for other in drops[1:]]
    p_values += [correlation_test(a, b) for a, b in itertools.pairwise(drops[1:])]
    assert_plausible(p_values)


def test_masks_of_tiles_are_independent():
    """Tiles of 1,024 and 4,096 elements, their neighbours, and rows of common widths."""
    drop = (~random.keep_mask((1 << 21,), 0.5, Stream(1003))).double()
    lags = [768, 1000, 1024, 2048, 4096, 8192, 1 << 16, 1 << 20]
    assert_plausible([correlation_test(drop[lag:], drop[:-lag]) for lag in lags])


def test_masks_of_consecutive_calls_are_independent(device):
    """Through the public function: layers and steps, each drawing its stream from torch's generator."""
    torch.manual_seed(5)
    x = torch.ones(4096, device=device)
    drops = [(functional.dropout(x, 0.5, generator=default_generator(device)) == 0).cpu() for _ in range(6)]
    assert_plausible(
        [correlation_test(drops[i], drops[j]) for i in range(6) for j in range(i)]
        + [binomial_test(int(drop.sum()), drop.numel(), 0.5) for drop in drops]
    )


@pytest.fixture(scope="module")
def first_lanes():
    """The lane of element 0 for a million seeds."""
    return random.lanes(torch.zeros(1 << 20, dtype=torch.int64), Stream(torch.arange(1 << 20)))


@pytest.mark.parametrize("p", [2**-16, *PROBABILITIES, 1 - 2**-16])
def test_mean_is_exact(p, first_lanes, device):
    """The scale times the probability of keeping is 1 to the last bit of fp64, so E[dropout(1)] = 1."""
    seed = int((first_lanes >= random.threshold(p)).int().argmax())  # the first that keeps the first element
    kept = functional.dropout(torch.ones(1, dtype=torch.float64, device=device), p, seed=seed)
    assert abs(kept.item() * (1 - applied(p)) - 1) <= 2**-52


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mean_of_a_sample(p, device):
    n = 1 << 13
    y = functional.dropout(torch.ones(n, device=device), p, seed=-8)
    q = applied(p)
    assert_plausible(z_test((y.mean().item() - 1) / math.sqrt(q / (1 - q) / n)))


# --- where streams come from ------------------------------------------------------------------------------


def default_generator(device):
    return torch.cuda.default_generators[torch.cuda.current_device()] if device.type == "cuda" else None

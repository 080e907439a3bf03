"""The random numbers: Philox as published, kernels equal to the definition, and statistics with an error rate.

Every statistical test computes p-values and hands them to ``assert_plausible``, which alone decides.
"""

import math
import struct

import machine_option
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_tests import assert_plausible, binomial_test, chi_square_test, correlation_test, z_test
from scipy import stats
from shared import needs_gpu

import fastreg
from fastreg import functional, random
from fastreg.kernels import philox
from fastreg.ops import backend
from fastreg.random import LANE_VALUES, Stream


def one_program(numel: int, device: torch.device) -> int:
    """A block for test kernels: all in one program for the interpreter, 1,024 on a GPU."""
    return triton.next_power_of_2(numel) if device.type == "cpu" else 1024


# Seeds and offsets whose words have all the bits that can go wrong: signs, halves, the constants 0 and 1.
STREAMS = [
    Stream(0, 0),
    Stream(1, 1),
    Stream(-1, 4),
    Stream(-(2**63), 2**32),
    Stream(2**63 - 1, 2**63 - 4),
    Stream(0x0123456789ABCDEF, 0x7EDCBA9876543210),
    Stream(-0x123456789ABCDEF, (1 << 32) - 1),
]


# --- the generator ----------------------------------------------------------------------------------------


def reference_philox(counter, key, rounds=10):
    """Philox4x32 written from the paper in Python's integers, sharing no line with the library."""
    left, right = [counter[0], counter[2]], [counter[1], counter[3]]
    for number in range(rounds):
        round_key = [(key[0] + number * 0x9E3779B9) % 2**32, (key[1] + number * 0xBB67AE85) % 2**32]
        high_0, low_0 = divmod(0xD2511F53 * left[0], 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * left[1], 2**32)
        left = [high_1 ^ right[0] ^ round_key[0], high_0 ^ right[1] ^ round_key[1]]
        right = [low_1, low_0]
    return left[0], right[0], left[1], right[1]


def reference_lane(element: int, stream: Stream) -> int:
    """Through bytes, as a C program would read the block: little-endian words, little-endian halves."""
    seed, offset = stream
    counter = struct.unpack("<4I", struct.pack("<QQ", element // 8, offset % 2**64))
    key = struct.unpack("<2I", struct.pack("<Q", seed % 2**64))
    return struct.unpack("<8H", struct.pack("<4I", *reference_philox(counter, key)))[element % 8]


PUBLISHED = [  # Random123, kat_vectors: philox4x32 10
    ((0x00000000,) * 4, (0x00000000,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED, ids=["zeros", "ones", "pi"])
def test_published_vectors(counter, key, expected):
    assert reference_philox(counter, key) == expected
    drawn = random.philox4x32([torch.tensor(word) for word in counter], key)
    assert tuple(int(word) for word in drawn) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED, ids=["zeros", "ones", "pi"])
def test_published_vectors_as_a_stream(counter, key, expected):
    """Which half of the counter is the block, which the offset, and where the seed goes."""
    block, offset, seed = (a | b << 32 for a, b in (counter[:2], counter[2:], key))
    block = torch.tensor([random._signed(block)])
    assert random.words(block, Stream(random._signed(seed), random._signed(offset)))[0].tolist() == list(
        expected
    )


word = st.integers(0, 2**32 - 1)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(counter=st.tuples(*[word] * 4), key=st.tuples(*[word] * 2), rounds=st.integers(0, 12))
@example(counter=(2**32 - 1, 2**31, 2**31, 2**32 - 1), key=(2**31, 2**32 - 1), rounds=10)
def test_definition_equals_integers(counter, key, rounds):
    expected = reference_philox(counter, key, rounds)
    drawn = random.philox4x32([torch.tensor([word]) for word in counter], key, rounds)
    assert tuple(int(word) for word in drawn) == expected
    in_tensors = random.philox4x32(counter, [torch.tensor([word]) for word in key], rounds)
    assert tuple(int(word) for word in in_tensors) == expected


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    element=st.integers(0, 2**62),
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.integers(0, 2**63 - 1),
)
@example(element=2**31 * 8 - 1, seed=-1, offset=2**32)
@example(element=2**35 + 5, seed=-(2**63), offset=2**63 - 1)
def test_definition_of_lanes(element, seed, offset):
    stream = Stream(seed, offset)
    expected = reference_lane(element, stream)
    assert int(random.lanes(torch.tensor([element]), stream)) == expected
    assert int(random.lanes(torch.tensor([element]), Stream(torch.tensor([seed]), offset))) == expected


def test_keep_mask_is_made_of_lanes():
    stream = Stream(7, 4)
    lane = random.lanes(torch.arange(3 * 5 * 7), stream)
    for p in (0.0, 0.1, 0.5, 1.0):
        keep = random.keep_mask((3, 5, 7), p, stream)
        assert keep.shape == (3, 5, 7)
        assert torch.equal(keep.flatten(), lane >= random.threshold(p))
    assert random.keep_mask((0, 3), 0.5, stream).shape == (0, 3)
    assert random.keep_mask((), 0.5, stream).shape == ()


def test_a_prefix_does_not_depend_on_the_size():
    stream = Stream(3, 8)
    assert torch.equal(random.keep_mask((1000,), 0.5, stream)[:77], random.keep_mask((77,), 0.5, stream))
    assert torch.equal(random.normal((1000,), stream)[:77], random.normal((77,), stream))


# --- the kernels equal the definition bit for bit ---------------------------------------------------------


def filled_lanes(numel, stream, vector, block, device):
    out = torch.full((numel + 8,), -1, dtype=torch.int32, device=device)
    philox.fill_lanes[(triton.cdiv(numel, block),)](out, *stream, numel, BLOCK=block, VECTOR=vector)
    assert (out[numel:] == -1).all(), "written behind the end"
    return out[:numel].cpu()


@pytest.mark.smoke
@pytest.mark.parametrize("vector", [8, 4, 2, 1])
@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_lanes_of_streams(stream, vector, device):
    expected = random.lanes(torch.arange(1021), stream)
    drawn = filled_lanes(1021, stream, vector, 1024, device)
    assert torch.equal(drawn.long(), expected)


@pytest.mark.executed
@pytest.mark.parametrize("vector", [8, 4, 2, 1])
@pytest.mark.parametrize("block", [8, 32, 256, 4096])
@pytest.mark.parametrize("numel", [1, 7, 67])
def test_lanes_of_blocks(numel, block, vector, device):
    stream = Stream(-12345678901234567, 2**40 + 4)
    expected = random.lanes(torch.arange(numel), stream)
    assert torch.equal(filled_lanes(numel, stream, vector, block, device).long(), expected)


@triton.jit
def lanes_from(
    out_ptr,  # int32 [BLOCK]
    first_ptr,  # int64 or int32 [1]: the first vector
    seed: tl.int64,
    offset: tl.int64,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    vector = tl.load(first_ptr) + tl.arange(0, BLOCK // VECTOR)
    values = tl.reshape(philox.lanes(vector, seed, offset, VECTOR), [BLOCK]) >> 16
    tl.store(out_ptr + tl.arange(0, BLOCK), values.to(tl.int32))


def lanes_at(first_element, stream, vector, dtype, device):
    out = torch.empty(64, dtype=torch.int32, device=device)
    first = torch.tensor([first_element // vector], dtype=dtype, device=device)
    lanes_from[(1,)](out, first, *stream, VECTOR=vector, BLOCK=64)
    return out.cpu().long()


@pytest.mark.parametrize("vector", [8, 4, 2, 1])
@pytest.mark.parametrize(
    "first_element",
    [2**31 - 32, 2**31, 2**32 - 32, 2**34 - 32, 2**35 - 32, 2**36, 2**48 + 8],
    ids=["2^31-", "2^31", "2^32-", "2^34-", "2^35-", "2^36", "2^48"],
)
def test_lanes_of_large_tensors(first_element, vector, device):
    """Across the element 2^31, the vector 2^31 and the block 2^32, where narrower indices or counters wrap."""
    stream = Stream(-99, 2**33)
    expected = random.lanes(first_element + torch.arange(64), stream)
    assert torch.equal(lanes_at(first_element, stream, vector, torch.int64, device), expected)


@pytest.mark.parametrize("vector", [8, 4, 2, 1])
@pytest.mark.parametrize("first_element", [0, 1 << 20, 2**31 - 64])
def test_narrow_indices_draw_the_same(first_element, vector, device):
    """32-bit vector indices, which skip the upper half of the counter, up to the last element they serve."""
    stream = Stream(-99, 2**33)
    expected = random.lanes(first_element + torch.arange(64), stream)
    assert torch.equal(lanes_at(first_element, stream, vector, torch.int32, device), expected)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(), (1,), (7,), (1031,), (8, 128), (3, 5, 67), (4, 1, 9)]


def assert_masked(shape, dtype, p, stream, device, **fused):
    """The zeros of dropout of ones, and of the gradient of it, are those of the definition's mask."""
    x = torch.ones(shape, dtype=dtype, device=device, requires_grad=True)
    y = functional.dropout(x, p, seed=stream.seed, **fused)
    y.backward(torch.ones_like(y))
    expected = random.keep_mask(shape, p, stream)
    assert torch.equal((y.detach() != 0).cpu(), expected)
    assert torch.equal((x.grad != 0).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_of_dropout(shape, dtype, device):
    assert_masked(shape, dtype, 0.3, Stream(-4711), device)


@triton.jit
def count_up(out_ptr, stop):
    total = tl.program_id(0)
    for _ in range(tl.program_id(0), stop):
        total += 1
    tl.store(out_ptr, total)


@pytest.fixture(scope="module")
def kernels_can_loop():
    """The interpreter of Triton 3.6 takes the start of a loop with int() of an array, which NumPy 2.5 refuses."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        count_up[(1,)](out, 3)
    except Exception as error:
        if "only 0-dimensional arrays" in str(error):
            pytest.skip("this interpreter cannot run loops with this NumPy")
        raise
    assert out.item() == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 20, 6, 7, 1])
def test_mask_of_dropout_with_bias(columns, dtype, device):
    """Rows of columns divisible by 8, 4, 2 and 1: vectors of all widths, the mask counts on across rows."""
    bias = torch.zeros(columns, dtype=dtype, device=device)
    assert_masked((11, columns), dtype, 0.3, Stream(2**62 + 1), device, bias=bias)


@pytest.mark.usefixtures("kernels_can_loop")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 20, 6, 7])
def test_mask_of_dropout_with_learned_bias(columns, dtype, device):
    """The backward kernel is another one: it walks down the rows."""
    bias = torch.zeros(columns, dtype=dtype, device=device, requires_grad=True)
    assert_masked((11, columns), dtype, 0.3, Stream(2**62 + 1), device, bias=bias)
    kept = random.keep_mask((11, columns), 0.3, Stream(2**62 + 1)).sum(0)
    assert torch.equal(bias.grad.cpu() == 0, kept == 0)


@pytest.mark.parametrize("positions", [16, 9, 2])
def test_mask_of_dropout_with_channel_bias(positions, device):
    bias = torch.zeros(3, 1, device=device, requires_grad=True)
    assert_masked((4, 3, positions), torch.float32, 0.3, Stream(-1), device, bias=bias)


@pytest.mark.parametrize("seed", [0, 1, 16, -1, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63)])
def test_mask_of_seeds(seed, device):
    """As a number and as a tensor; numbers that Triton could treat as constants or as 32 bits wide."""
    x = torch.ones(1000, device=device)
    expected = random.keep_mask((1000,), 0.5, Stream(seed))
    assert torch.equal((functional.dropout(x, seed=seed) != 0).cpu(), expected)
    in_tensor = functional.dropout(x, seed=torch.tensor([seed], device=device))
    assert torch.equal((in_tensor != 0).cpu(), expected)


def test_unsigned_seed_is_its_signed_pattern(device):
    x = torch.ones(1000, device=device)
    assert torch.equal(functional.dropout(x, seed=2**64 - 3), functional.dropout(x, seed=-3))


@pytest.mark.parametrize("rank", [0, 1, 500, 1022, 1023])
def test_mask_at_the_threshold(rank, device):
    """A lane equal to the threshold is kept, one below is dropped: bits below the lane in its word do not count.

    So for the smallest and the largest lanes drawn as for the middle one: no sign, no wrap.
    """
    stream = Stream(5)
    lane, order = random.lanes(torch.arange(1024), stream).sort()
    assert 0 < lane[rank] < LANE_VALUES - 1
    x = torch.ones(1024, device=device)
    for t, kept in ((int(lane[rank]), True), (int(lane[rank]) + 1, False)):
        y = functional.dropout(x, t / LANE_VALUES, seed=stream.seed).cpu()
        assert bool(y[order[rank]] != 0) == kept
        assert torch.equal(y != 0, random.keep_mask((1024,), t / LANE_VALUES, stream))


# --- normals ----------------------------------------------------------------------------------------------


def filled_normals(numel, stream, dtype, device, block=None):
    block = block or one_program(numel, device)
    out = torch.full((numel + 4,), 99.0, dtype=dtype, device=device)
    philox.fill_normals[(triton.cdiv(numel, block),)](out, *stream, numel, BLOCK=block)
    assert (out[numel:] == 99).all(), "written behind the end"
    return out[:numel].cpu()


def normal_tolerance(exact: torch.Tensor, stream: Stream) -> torch.Tensor:
    """How far an fp32 normal may lie from the exact one, an element.

    z = r sin(angle), r^2 = -2 ln u. Each error below is the sum of its sources, in units of 2^-23:
    angle          the word and the product are rounded, 3 pi / 2; the approximate sin and cos of a GPU are good
                   to 2^-20.5 absolute, which is 6; together at most 12, times r;
    r^2            u is rounded (an absolute error of at most 1 for ln u, near u = 1 where it matters), the
                   approximate log2 adds 2 near 1 (2^-22 absolute) and 2 |ln u| elsewhere, products as much
                   again: 6 + 4 r^2. The root makes of an error e in r^2 at most min(e / r, sqrt(e)).
    """
    count = exact.numel()
    bits = random.words(torch.arange((count + 3) // 4), stream)
    square = -2 * ((bits[:, 0::2].double() + 0.5) / 2**32).log()
    square = square.repeat_interleave(2, dim=-1).flatten()[:count]
    error = (6 + 4 * square) * 2**-23
    return torch.minimum(error / square.sqrt(), error.sqrt()) + 12 * 2**-23 * square.sqrt()


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_normals_equal_the_definition(stream, device):
    exact = random.normal((1 << 16,), stream, dtype=torch.float64)
    drawn = filled_normals(1 << 16, stream, torch.float32, device).double()
    assert ((drawn - exact).abs() <= normal_tolerance(exact, stream)).all()
    # A number that is off by the tolerance would pass for another number of the same stream only by chance.
    assert normal_tolerance(exact, stream).median() < 1e-5


@pytest.mark.executed
@pytest.mark.parametrize("numel", [1, 3, 5, 131])
@pytest.mark.parametrize("block", [4, 128, 2048])
def test_normals_of_blocks(numel, block, device):
    whole = filled_normals(1021, Stream(-3, 2**40), torch.float32, device, 2048)
    assert torch.equal(filled_normals(numel, Stream(-3, 2**40), torch.float32, device, block), whole[:numel])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_normals_are_rounded_to_the_dtype(dtype, device):
    """The same fp32 numbers in every dtype. The interpreter cuts bf16 off instead of rounding it: up to 1 ulp."""
    single = filled_normals(4096, Stream(8, 4), torch.float32, device)
    stored = filled_normals(4096, Stream(8, 4), dtype, device)
    if dtype == torch.bfloat16 and machine_option.TRUNCATES:
        assert ((stored.float() - single).abs() <= 2**-7 * single.abs()).all()
    else:
        assert torch.equal(stored, single.to(dtype))


@triton.jit
def transform(
    out_ptr,  # fp32 [2, BLOCK]
    words_ptr,  # int32 [2, BLOCK]: radius words, angle words, as bit patterns
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    radius_word = tl.load(words_ptr + i).to(tl.uint32, bitcast=True)
    angle_word = tl.load(words_ptr + BLOCK + i).to(tl.uint32, bitcast=True)
    first, second = philox.box_muller(radius_word, angle_word)
    tl.store(out_ptr + i, first)
    tl.store(out_ptr + BLOCK + i, second)


def test_normals_of_extreme_words(device):
    """The words that random samples never meet: uniforms that round to 1 or to the smallest, angles at +-pi."""
    near_one = [2**32 - 1 - k for k in range(448)]
    radius = [0, 1, 2, 2**31, 2**24, *near_one, *(2**k for k in range(3, 31))]
    angle = [0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 3 * 2**30]
    pairs = [(r, angle[i % len(angle)]) for i, r in enumerate(radius)]
    pairs += [(r, a) for r in (0, 2**31, 2**32 - 1) for a in angle]
    pairs += [(0, 0)] * (512 - len(pairs))
    bits = torch.tensor(pairs, device=device).T.to(torch.int32).contiguous()  # wraps to the bit pattern
    out = torch.empty(2, 512, device=device)
    transform[(1,)](out, bits, BLOCK=512)
    assert out.isfinite().all()
    largest = math.sqrt(66 * math.log(2))
    assert out.abs().max() <= largest * (1 + 1e-6)
    assert out[0, 0] == pytest.approx(largest, rel=1e-6)
    words = torch.tensor(pairs).double().T
    square = -2 * ((words[0] + 0.5) / 2**32).log()
    angles = torch.where(words[1] < 2**31, words[1], words[1] - 2**32) * (math.pi / 2**31)
    exact = square.sqrt() * torch.stack((angles.cos(), angles.sin()))
    error = (6 + 4 * square) * 2**-23  # as in normal_tolerance
    tolerance = torch.minimum(error / square.sqrt(), error.sqrt()) + 12 * 2**-23 * square.sqrt()
    assert ((out.cpu().double() - exact).abs() <= tolerance).all()


def test_definition_of_normals():
    """Against Box and Muller's transform of Python's integers and floats."""
    stream = Stream(-17, 2**35)
    for block in (0, 1, 1000):
        counter = struct.unpack("<4I", struct.pack("<QQ", block, stream.offset))
        key = struct.unpack("<2I", struct.pack("<q", stream.seed))
        words = reference_philox(counter, key)
        expected = []
        for radius_word, angle_word in (words[:2], words[2:]):
            radius = math.sqrt(-2 * math.log((radius_word + 0.5) / 2**32))
            # The whole circle, from any side: e^(i angle) does not see the sign convention of the word.
            angle = 2 * math.pi * angle_word / 2**32
            expected += [radius * math.cos(angle), radius * math.sin(angle)]
        drawn = random.normal((block * 4 + 4,), stream, dtype=torch.float64)[-4:]
        torch.testing.assert_close(drawn, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.fixture(scope="module", params=["definition", "kernel", pytest.param("many", marks=pytest.mark.slow)])
def normals(request):
    """fp64 2^20 (many: 2^24) numbers of the definition, or fp32 2^19 of the kernel."""
    if request.param != "kernel":
        size = (1 << (24 if request.param == "many" else 20),)
        return random.normal(size, Stream(20, 4), dtype=torch.float64)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return filled_normals(1 << 19, Stream(-21, 2**33), torch.float32, device).double()


def test_moments_of_normals(normals):
    """Mean, variance, skewness, kurtosis: the variances of z, z^2, z^3, z^4 are 1, 2, 15, 96."""
    n = normals.numel()
    moments = [normals.pow(k).mean() for k in (1, 2, 3, 4)]
    z = [(m - e) * math.sqrt(n / v) for m, e, v in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True)]
    assert_plausible(z_test(z))


def test_tails_of_normals(normals):
    """Beyond 1 to 5 sigma on each side, by the exact binomial test: 2^20 numbers expect 0.3 beyond 5."""
    n = normals.numel()
    p_values = []
    for sigma in (1, 2, 3, 4, 5):
        for tail in (normals > sigma, normals < -sigma):
            p_values.append(binomial_test(int(tail.sum()), n, stats.norm.sf(sigma)))
    assert_plausible(p_values)


def test_distribution_of_normals(normals):
    """Kolmogorov and Smirnov, for all and for each of the four values of a block."""
    samples = [normals, *normals.view(-1, 4).T]
    assert_plausible([stats.kstest(sample.numpy(), "norm").pvalue for sample in samples])


def test_neighbouring_normals_do_not_correlate(normals):
    """At lags 1 to 16, and a tile of the kernels apart; also their squares, which see a common radius."""
    lags = [*range(1, 17), 1024, 4096]
    p_values = [correlation_test(normals[lag:], normals[:-lag]) for lag in lags]
    squares = normals.square()
    p_values += [correlation_test(squares[lag:], squares[:-lag]) for lag in lags]
    assert_plausible(p_values)


def test_the_two_of_a_pair_are_independent(normals):
    """Values, squares, and the joint distribution over the signs and a grid of quantiles."""
    first, second = normals.view(-1, 2).T
    p_values = [
        correlation_test(first, second),
        correlation_test(first.square(), second.square()),
        correlation_test(first, second.square()),
        correlation_test(first.abs(), second.abs()),
    ]
    edges = torch.tensor(stats.norm.ppf([k / 8 for k in range(1, 8)]))
    cell = torch.bucketize(first.contiguous(), edges) * 8 + torch.bucketize(second.contiguous(), edges)
    p_values.append(chi_square_test(torch.bincount(cell, minlength=64), first.numel() / 64))
    assert_plausible(p_values)


def test_normals_of_streams_do_not_correlate():
    """Seeds and offsets a step, a bit, a word apart."""
    size = (1 << 17,)
    base = random.normal(size, Stream(50, 4))
    others = [Stream(51, 4), Stream(50, 8), Stream(50 ^ 1 << 32, 4), Stream(50, 4 + 2**32), Stream(4, 50)]
    others += [Stream(~50, 4), Stream(50 ^ -(2**63), 4)]
    p_values = []
    for other in others:
        drawn = random.normal(size, other)
        p_values += [correlation_test(base, drawn), correlation_test(base.square(), drawn.square())]
    assert_plausible(p_values)


def test_manual_seed_reproduces(device):
    torch.manual_seed(11)
    first = [random.stream(device) for _ in range(3)]
    torch.manual_seed(11)
    assert [random.stream(device) for _ in range(3)] == first
    assert len(set(first)) == 3
    torch.manual_seed(12)
    assert random.stream(device) not in first
    assert all(type(s.seed) is int and type(s.offset) is int for s in first)
    assert all(-(2**63) <= s.seed < 2**63 for s in first)


def test_explicit_generator_is_used_and_advanced(device):
    def fresh():
        return torch.Generator(device).manual_seed(3)

    generator = fresh()
    before = torch.get_rng_state()
    drawn = [random.stream(device, generator=generator) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before), "the default generator was touched"
    assert len(set(drawn)) == 3
    assert not torch.equal(generator.get_state(), fresh().get_state())
    again = fresh()
    assert [random.stream(device, generator=again) for _ in range(3)] == drawn
    # A generator that goes on from a saved state draws what followed.
    generator.set_state(fresh().get_state())
    assert random.stream(device, generator=generator) == drawn[0]


def test_explicit_seed_is_the_stream(device):
    before = torch.get_rng_state()
    assert random.stream(device, 5) == Stream(5, 0)
    assert random.stream(device, -(2**63)) == Stream(-(2**63))
    assert random.stream(device, 2**63) == Stream(-(2**63))
    assert random.stream(device, 2**64 - 1) == Stream(-1)
    seed = torch.tensor([5], device=device)
    assert random.stream(device, seed).seed is seed
    scalar = torch.tensor(5, device=device)
    assert random.stream(device, scalar).seed is scalar
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
def test_seed_of_more_than_64_bits(seed, device):
    with pytest.raises(ValueError, match=f"seed has to fit in 64 bits, but got {seed}"):
        random.stream(device, seed)


@pytest.mark.parametrize("seed", [True, 1.0, "1", (1,)], ids=repr)
def test_seed_of_another_type(seed, device):
    with pytest.raises(TypeError, match=f"int or an int64 tensor, but got {type(seed).__name__}"):
        random.stream(device, seed)


@pytest.mark.parametrize("seed", [torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32)], ids=str)
def test_seed_tensor_of_another_dtype(seed, device):
    with pytest.raises(ValueError, match=f"int64 with one element on {device}, but got {seed.dtype}"):
        random.stream(device, seed.to(device))


@pytest.mark.parametrize("count", [0, 2])
def test_seed_tensor_of_another_size(count, device):
    with pytest.raises(ValueError, match=f"with {count} elements"):
        random.stream(device, torch.zeros(count, dtype=torch.int64, device=device))


def test_seed_tensor_on_another_device(device):
    with pytest.raises(ValueError, match="on meta"):
        random.stream(device, torch.zeros(1, dtype=torch.int64, device="meta"))


def test_seed_and_generator(device):
    with pytest.raises(ValueError, match="seed and generator exclude each other"):
        random.stream(device, 1, torch.Generator(device))
    with pytest.raises(ValueError, match="seed and generator exclude each other"):
        functional.dropout(torch.ones(3, device=device), seed=1, generator=torch.Generator(device))


@pytest.mark.skipif(not backend.INTERPRETED, reason="needs kernels that run on the host")
@pytest.mark.parametrize("shape", [(300,), (6, 50)])
def test_replays_of_a_graph_draw_new_masks_and_their_backward_follows(gpu, shape):
    """On CUDA's side of the host code (``tests/gpu_host/test_streams.py``), with kernels that are interpreted."""
    x = torch.ones(shape, device="cuda", requires_grad=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = functional.dropout(x, 0.5, activation="relu")
        y = functional.dropout(h, 0.5, bias=torch.ones(shape[-1], device="cuda"))
        (dh,) = torch.autograd.grad(y, h, torch.ones_like(y), retain_graph=True)
        (dx,) = torch.autograd.grad(h, x, torch.ones_like(h))
    masks = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(dx != 0, h != 0)
        assert torch.equal(dh != 0, y != 0)
        masks += [(h != 0).cpu(), (y != 0).cpu()]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 6
    assert all(0.3 < mask.double().mean() < 0.7 for mask in masks)


def test_seed_stays_on_the_device_when_compiled(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert isinstance(random.stream(torch.device("cpu")).seed, torch.Tensor)


@pytest.mark.gpu
@needs_gpu
def test_graphs_have_numbers_and_draw_one_seed_each(device):
    """What the stand-in of a GPU takes for granted."""
    where = torch.device("cuda", torch.cuda.current_device())
    numbers, seeds, graphs = [], [], [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph, pool=graphs[0].pool() if numbers else None):
            numbers.append([backend.capture_id(where), backend.capture_id(where)])
            seeds.append([random.stream(where), random.stream(where)])
    (a, b), (c, d) = numbers
    assert a == b != c == d
    assert None not in (a, c)
    for first, second in seeds:
        assert first.seed is second.seed
        assert first.offset != second.offset
    drawn = []
    for graph in (*graphs, *graphs):
        graph.replay()
        drawn.append([int(first.seed) for first, _ in seeds])
    assert len({*(numbers[0] for numbers in drawn[::2]), *(numbers[1] for numbers in drawn[1::2])}) == 4


@pytest.mark.gpu
@needs_gpu
def test_graphed_callables_draw_new_masks(device):
    """Kernels that were launched in the warm-up alone: nothing may be loaded while a graph is recorded."""
    n = 1 << 9
    layer = torch.nn.Sequential(
        fastreg.nn.Dropout(0.5, activation="relu"), fastreg.nn.DropoutAddLayerNorm(n, p=0.5)
    ).to(device)
    x = torch.ones(n, n, device=device, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(layer, (x,))
    results = []
    for _ in range(3):
        y = graphed(torch.ones(n, n, device=device, requires_grad=True))
        results.append(y.detach().clone())
        y.sum().backward()
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@pytest.mark.gpu
@needs_gpu
def test_streams_share_the_counter_of_torch(device):
    """torch's own kernels and ours advance one generator; ours makes no CUDA call."""
    generator = torch.Generator(device).manual_seed(9)
    assert random.stream(device, generator=generator).offset == 0
    assert generator.get_offset() == 4
    torch.rand(10, device=device, generator=generator)
    assert random.stream(device, generator=generator).offset == generator.get_offset() - 4 > 4

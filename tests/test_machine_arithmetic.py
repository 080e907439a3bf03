"""What the machine that executes PTX computes: integers, floats, conversions, comparisons, moves."""

# ruff: noqa: E501 (a piece of PTX is one line)
import itertools
from fractions import Fraction

import numpy as np
import pytest
from machine_operands import RANDOM, all_is_ptx, bits_of, each_executor, integers, same, same_numbers, wrapped  # noqa: F401
from ptx import evaluate

from fastreg.bench.machine import Options
from fastreg.bench.machine.arithmetic import ERRORS, fma_f64


def floats(dtype: str, count: int = 64) -> np.ndarray:
    """Zeros, the smallest and largest, infinities, NaN, ones and their neighbours, and any bits."""
    bits = 8 * np.dtype(dtype).itemsize
    info = np.finfo(dtype)
    near = np.array(
        [
            0.0,
            1,
            1.5,
            2,
            3,
            0.1,
            255.5,
            0.5,
            2.5,
            np.inf,
            np.nan,
            info.max,
            info.tiny,
            info.smallest_subnormal,
            1 + info.eps,
            1 - info.eps / 2,
            info.tiny * (1 - info.eps),
            3 * info.smallest_subnormal,
        ],
        dtype,
    )
    anything = RANDOM.integers(0, 1 << 63, count, np.uint64) * np.uint64(3)
    anything = (anything >> np.uint64(64 - bits)).astype(f"u{bits // 8}").view(dtype)
    ordinary = RANDOM.standard_normal(count).astype(dtype)
    return RANDOM.permutation(np.concatenate([near, -near, anything, ordinary]))


def shuffled(x: np.ndarray, number: int) -> list[np.ndarray]:
    return [RANDOM.permutation(x) for _ in range(number)]


# -----------------------------------------------------------------------------------------------------------
# A rounding by exact fractions, which shares nothing with the machine

FORMATS = {"f16": (11, -14), "bf16": (8, -126), "f32": (24, -126), "f64": (53, -1022), "tf32": (11, -126)}


def nearest(x: Fraction, kind: str, mode: str = "rn") -> float:
    bits, least = FORMATS[kind]
    if x == 0:
        return 0.0
    size, exponent = abs(x), 0
    while size >= 2:
        size, exponent = size / 2, exponent + 1
    while size < 1:
        size, exponent = size * 2, exponent - 1
    unit = Fraction(2) ** (max(exponent, least) - (bits - 1))
    low = x // unit
    rest = x / unit - low
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1),
        "rna": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and x > 0),
        "rz": rest > 0 and x < 0,
        "rm": False,
        "rp": rest > 0,
    }[mode]
    result = (low + up) * unit
    largest = (2 - Fraction(2) ** (1 - bits)) * Fraction(2) ** (1 - least)
    if abs(result) > largest:
        toward_zero = mode == "rz" or (mode == "rm" and x > 0) or (mode == "rp" and x < 0)
        size = float(largest) if toward_zero else np.inf
        return size if x > 0 else -size
    return float(result) if result else (-0.0 if x < 0 else 0.0)


def exactly(function, kind: str, mode: str, *operands: np.ndarray) -> np.ndarray:
    """``function`` of fractions, rounded once; where operands or zeros are special, in fp64, which then rounds nothing."""
    result = []
    for values in zip(*(x.astype(np.float64) for x in operands), strict=True):
        if (
            all(np.isfinite(v) for v in values)
            and (exact := function(*(Fraction(float(v)) for v in values))) != 0
        ):
            result.append(nearest(exact, kind, mode))
        else:
            with np.errstate(all="ignore"):
                special = function(*(np.float64(v) for v in values))
            result.append(float(special))
    return np.array(result)


def values_of(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]).astype(np.float64)


# -----------------------------------------------------------------------------------------------------------
# Integers

INTEGERS = [(16, False), (16, True), (32, False), (32, True), (64, False), (64, True)]


@pytest.mark.parametrize(("bits", "signed"), INTEGERS)
def test_sums_products_and_quotients_of_integers(bits, signed):
    kind = f"{'s' if signed else 'u'}{bits}"
    a, b, c = shuffled(integers(bits, signed=signed), 3)
    result = a.dtype
    exact = [(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]

    def check(code, function, wide=1, operands=(a, b)):
        dtype = np.dtype(f"{result.kind}{wide * result.itemsize}")
        found = evaluate(code, *operands, result=dtype)
        same(found, wrapped([function(*x) for x in exact], 8 * dtype.itemsize, signed))

    check(f"add.{kind} %0, %1, %2;", lambda x, y, z: x + y)
    check(f"sub.{kind} %0, %1, %2;", lambda x, y, z: x - y)
    check(f"mul.lo.{kind} %0, %1, %2;", lambda x, y, z: x * y)
    check(f"mul.hi.{kind} %0, %1, %2;", lambda x, y, z: x * y >> bits)
    check(f"mad.lo.{kind} %0, %1, %2, %3;", lambda x, y, z: x * y + z, operands=(a, b, c))
    check(f"min.{kind} %0, %1, %2;", lambda x, y, z: min(x, y))
    check(f"max.{kind} %0, %1, %2;", lambda x, y, z: max(x, y))
    if bits < 64:
        check(f"mul.wide.{kind} %0, %1, %2;", lambda x, y, z: x * y, wide=2)
        d = c.astype(f"{result.kind}{2 * result.itemsize}")
        check(f"mad.wide.{kind} %0, %1, %2, %3;", lambda x, y, z: x * y + z, 2, (a, b, d))
    if bits == 32:
        check(f"mad.hi.{kind} %0, %1, %2, %3;", lambda x, y, z: (x * y >> 32) + z, operands=(a, b, c))
    if signed:
        check(f"neg.{kind} %0, %1;", lambda x, y, z: -x, operands=(a,))
        check(f"abs.{kind} %0, %1;", lambda x, y, z: abs(x), operands=(a,))

    def quotient(x, y, z):
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) if y else -1

    check(f"div.{kind} %0, %1, %2;", quotient)
    check(f"rem.{kind} %0, %1, %2;", lambda x, y, z: x - y * quotient(x, y, z) if y else x)


def test_saturated_sums():
    a, b = shuffled(integers(32, signed=True), 2)
    for name, sign in (("add", 1), ("sub", -1)):
        exact = [max(-(2**31), min(2**31 - 1, int(x) + sign * int(y))) for x, y in zip(a, b, strict=True)]
        same(evaluate(f"{name}.sat.s32 %0, %1, %2;", a, b, result="i4"), wrapped(exact, 32, True))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_counts(bits):
    a, b = shuffled(integers(bits), 2)
    kind, dtype = f"b{bits}", a.dtype
    same(evaluate(f"and.{kind} %0, %1, %2;", a, b, result=dtype), a & b)
    same(evaluate(f"or.{kind} %0, %1, %2;", a, b, result=dtype), a | b)
    same(evaluate(f"xor.{kind} %0, %1, %2;", a, b, result=dtype), a ^ b)
    same(evaluate(f"not.{kind} %0, %1;", a, result=dtype), ~a)
    same(evaluate(f"cnot.{kind} %0, %1;", a, result=dtype), a == 0)
    if bits > 16:
        digits = [f"{int(x):0{bits}b}" for x in a]
        same(evaluate(f"popc.{kind} %0, %1;", a, result="u4"), np.array([x.count("1") for x in digits]))
        same(
            evaluate(f"clz.{kind} %0, %1;", a, result="u4"),
            np.array([len(x) - len(x.lstrip("0")) for x in digits]),
        )
        same(
            evaluate(f"brev.{kind} %0, %1;", a, result=dtype),
            wrapped([int(x[::-1], 2) for x in digits], bits),
        )
        tops = [(int(x).bit_length() - 1) % (1 << 32) for x in a]
        same(evaluate(f"bfind.u{bits} %0, %1;", a, result="u4"), wrapped(tops, 32))
        tops = [
            ((~int(x) if x < 0 else int(x)).bit_length() - 1) % (1 << 32) for x in a.view(f"i{bits // 8}")
        ]
        same(evaluate(f"bfind.s{bits} %0, %1;", a, result="u4"), wrapped(tops, 32))


@pytest.mark.parametrize(("bits", "signed"), INTEGERS)
def test_shifts_also_beyond_the_width(bits, signed):
    a = integers(bits, signed=signed)
    by = np.resize(
        np.array([0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 1 << 31, 2**32 - 1], "u4"), len(a)
    )
    left = [int(x) << min(int(n), 200) for x, n in zip(a, by, strict=True)]
    right = [int(x) >> min(int(n), 200) for x, n in zip(a, by, strict=True)]
    kind = f"{'s' if signed else 'u'}{bits}"
    same(evaluate(f"shl.b{bits} %0, %1, %2;", a, by, result=a.dtype), wrapped(left, bits, signed))
    same(evaluate(f"shr.{kind} %0, %1, %2;", a, by, result=a.dtype), wrapped(right, bits, signed))
    for n in (0, 3, bits - 1, bits, bits + 5):
        expected = wrapped([int(x) >> n for x in a], bits, signed)
        same(evaluate(f"shr.{kind} %0, %1, {n};", a, result=a.dtype), expected)


def test_all_tables_of_lop3():
    a, b, c = (np.array([x], "u4").repeat(1) for x in (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA))
    for table in range(
        256
    ):  # each byte of the operands has every combination, so that a byte of the result is the table
        found = evaluate(f"lop3.b32 %0, %1, %2, %3, {table};", a, b, c, result="u4")
        assert found[0] == table * 0x01010101


@pytest.mark.parametrize(("side", "mode"), [*itertools.product("lr", ["wrap", "clamp"])])
def test_funnel_shifts(side, mode):
    low, high = shuffled(integers(32), 2)
    by = np.resize(np.array([0, 1, 7, 31, 32, 33, 40, 63, 64, 2**32 - 1], "u4"), len(low))
    expected = []
    for x, y, n in zip(low, high, by, strict=True):
        n = int(n) % 32 if mode == "wrap" else min(int(n), 32)
        both = int(y) << 32 | int(x)
        expected.append(both << n >> 32 if side == "l" else both >> n)
    found = evaluate(f"shf.{side}.{mode}.b32 %0, %1, %2, %3;", low, high, by, result="u4")
    same(found, wrapped(expected, 32))


@pytest.mark.parametrize("mode", ["", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"])
def test_all_modes_of_prmt(mode):
    a, b = (
        np.full(256, x, "u4") for x in (0x83028100, 0x07860584)
    )  # byte i is i, with its highest bit set or not
    selection = RANDOM.integers(0, 1 << 16, 256).astype("u4")
    if mode:
        selection = np.resize(np.arange(4, dtype="u4"), 256) | (selection << np.uint32(4))
    tables = {  # of the ISA, most significant byte first, for selectors 0 to 3
        "f4e": ["3210", "4321", "5432", "6543"], "b4e": ["5670", "6701", "7012", "0123"],
        "rc8": ["0000", "1111", "2222", "3333"], "ecl": ["3210", "3211", "3222", "3333"],
        "ecr": ["0000", "1110", "2210", "3210"], "rc16": ["1010", "3232", "1010", "3232"],
    }  # fmt: skip
    octets = [0x00, 0x81, 0x02, 0x83, 0x84, 0x05, 0x86, 0x07]
    expected = []
    for s in selection:
        if mode:
            picked = [octets[int(d)] for d in tables[mode][int(s) & 3]]
        else:
            nibbles = [int(s) >> 4 * k & 15 for k in (3, 2, 1, 0)]
            picked = [(0xFF if octets[n & 7] >> 7 else 0) if n & 8 else octets[n & 7] for n in nibbles]
        expected.append(int.from_bytes(bytes(picked), "big"))
    name = f"prmt.b32.{mode}" if mode else "prmt.b32"
    same(evaluate(f"{name} %0, %1, %2, %3;", a, b, selection, result="u4"), wrapped(expected, 32))


@pytest.mark.parametrize(("bits", "signed"), INTEGERS[2:])
def test_fields_of_bits(bits, signed):
    a, b = shuffled(integers(bits, 128, signed), 2)
    position, length = (
        np.resize(RANDOM.permutation(np.array([*range(0, 70, 3), 31, 32, 63, 64, 255], "u4")), len(a))
        for _ in range(2)
    )
    extracted, inserted = [], []
    for x, y, p, n in zip(a, b, position, length, strict=True):
        x, y, p, n = int(x) % (1 << bits), int(y) % (1 << bits), int(p), int(n)
        sign = x >> min(p + n - 1, bits - 1) & 1 if signed and n else 0
        field = [x >> p + i & 1 if i < n and p + i < bits else sign for i in range(bits)]
        extracted.append(sum(bit << i for i, bit in enumerate(field)))
        ones = ((1 << n) - 1 << p) % (1 << bits)
        inserted.append(y & ~ones | x << p & ones)
    kind = f"{'s' if signed else 'u'}{bits}"
    found = evaluate(f"bfe.{kind} %0, %1, %2, %3;", a, position, length, result=a.dtype)
    same(found, wrapped(extracted, bits, signed))
    if not signed:
        found = evaluate(f"bfi.b{bits} %0, %1, %2, %3, %4;", a, b, position, length, result=a.dtype)
        same(found, wrapped(inserted, bits))


# -----------------------------------------------------------------------------------------------------------
# Floats

OPERATIONS = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "fma": (3, lambda a, b, c: a * b + c),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_fp32_in_every_rounding(name, mode):
    number, function = OPERATIONS[name]
    operands = shuffled(floats("f4", 200), number)
    found = evaluate(
        f"{name}.{mode}.f32 %0, {', '.join(f'%{i + 1}' for i in range(number))};", *operands, result="f4"
    )
    expected = exactly(function, "f32", mode, *operands)
    if mode == "rm":  # a sum that is exactly zero is -0 there, which fp64 does not know
        found, expected = np.abs(found) * (found != 0) + 0 * found, np.where(expected == 0, 0, expected)
        expected = np.abs(expected) * (expected != 0) + 0 * expected
    same(found, expected)


def test_fma_is_rounded_once_where_fp64_has_a_tie():
    """a b + c lies a little off the middle of two fp32, which the sum in fp64 does not see."""
    one = np.float32(1) + np.float32(2**-12)
    a, b = np.array([one, one, -one], "f4"), np.array([one, one, one], "f4")
    c = np.array([2.0**-60, -(2.0**-60), 2.0**-60], "f4")
    same(
        evaluate("fma.rn.f32 %0, %1, %2, %3;", a, b, c, result="f4"),
        exactly(OPERATIONS["fma"][1], "f32", "rn", a, b, c),
    )
    a = np.array([2.0**-70, 2.0**-70 * 1.5, 1.0], "f4")
    b = np.array([2.0**-80, 2.0**-79, 2.0**-149], "f4")  # below the least subnormal, and at its half
    c = np.array([2.0**-149, -(2.0**-149), 2.0**-126], "f4")
    same(
        evaluate("fma.rn.f32 %0, %1, %2, %3;", a, b, c, result="f4"),
        exactly(OPERATIONS["fma"][1], "f32", "rn", a, b, c),
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_fp64(name):
    number, function = OPERATIONS[name]
    operands = shuffled(floats("f8", 300), number)
    code = f"{name}.rn.f64 %0, {', '.join(f'%{i + 1}' for i in range(number))};"
    same(evaluate(code, *operands, result="f8"), exactly(function, "f64", "rn", *operands))


def test_fma_of_fp64_over_all_of_its_range():
    count = 4000
    operands = [
        np.ldexp(RANDOM.standard_normal(count), RANDOM.integers(-1074, 1000, count)) for _ in range(3)
    ]
    operands[2][: count // 2] = -(operands[0] * operands[1])[: count // 2] * (
        1 + 2.0 ** -RANDOM.integers(20, 60, count // 2)
    )
    with np.errstate(all="ignore"):
        same(fma_f64(*operands), exactly(OPERATIONS["fma"][1], "f64", "rn", *operands))


@pytest.mark.parametrize("name", [*OPERATIONS, "min", "max"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_16_bits_and_their_pairs(name, kind):
    number, function = OPERATIONS.get(name, (2, None))
    code = f"{name}.rn.{kind}" if function else f"{name}.{kind}"
    operands = shuffled(integers(16, 300), number)
    values = [values_of(x, kind) for x in operands]
    if function is None:
        x, y = values
        expected = np.where(
            np.isnan(x), y, np.where(np.isnan(y), x, (np.minimum if name == "min" else np.maximum)(x, y))
        )
        zeros = (values[0] == 0) & (values[1] == 0)
        signs = np.signbit(values[0]), np.signbit(values[1])
        negative = signs[0] | signs[1] if name == "min" else signs[0] & signs[1]
        expected = np.where(zeros, np.where(negative, -0.0, 0.0), expected)
    else:
        expected = exactly(function, kind, "rn", *values)
    expected = bits_of(expected, kind)
    arguments = ", ".join(f"%{i + 1}" for i in range(number))
    found = evaluate(f"{code} %0, {arguments};", *operands, result="u2")
    same(found, expected)
    pairs = [x[: len(x) // 2 * 2].view("u4") for x in operands]
    found = evaluate(f"{code}x2 %0, {arguments};", *pairs, result="u4")
    same(found.view("u2"), expected[: 2 * len(found)])


@pytest.mark.parametrize("name", OPERATIONS)
def test_pairs_of_fp32(name):
    number, function = OPERATIONS[name]
    operands = shuffled(floats("f4", 200), number)
    count = len(operands[0]) // 2 * 2
    pairs = [x[:count].view("u8") for x in operands]
    found = evaluate(
        f"{name}.rn.f32x2 %0, {', '.join(f'%{i + 1}' for i in range(number))};", *pairs, result="u8"
    )
    same(found.view("f4"), exactly(function, "f32", "rn", *(x[:count] for x in operands)))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_fp32_mixed_with_16_bits(kind):
    a, b = shuffled(integers(16, 200), 2)
    c = RANDOM.permutation(floats("f4", 300))[: len(a)]
    a, b = a[: len(c)], b[: len(c)]
    x, y = values_of(a, kind), values_of(b, kind)
    same(
        evaluate(f"add.rn.f32.{kind} %0, %1, %2;", a, c, result="f4"),
        exactly(OPERATIONS["add"][1], "f32", "rn", x, c),
    )
    same(
        evaluate(f"sub.rn.f32.{kind} %0, %1, %2;", a, c, result="f4"),
        exactly(OPERATIONS["sub"][1], "f32", "rn", x, c),
    )
    found = evaluate(f"fma.rn.f32.{kind} %0, %1, %2, %3;", a, b, c, result="f4")
    same(found, exactly(OPERATIONS["fma"][1], "f32", "rn", x, y, c))


def test_flushing_and_saturation():
    a, b, c = shuffled(floats("f4", 200), 3)

    def flushed(x):
        return np.where(np.abs(x) < np.finfo("f4").tiny, np.copysign(np.float32(0), x), x)

    for name, (number, function) in OPERATIONS.items():
        operands = [flushed(x) for x in (a, b, c)[:number]]
        expected = flushed(exactly(function, "f32", "rn", *operands).astype("f4"))
        arguments = ", ".join(f"%{i + 1}" for i in range(number))
        same(
            evaluate(
                f"{name}.ftz.f32 %0, {arguments};".replace("fma", "fma.rn"), *(a, b, c)[:number], result="f4"
            ),
            expected,
        )
    with np.errstate(all="ignore"):
        total = a + b
    clamped = np.where(np.isnan(total), np.float32(0), np.clip(total, np.float32(0), np.float32(1)))
    same(np.abs(evaluate("add.sat.f32 %0, %1, %2;", a, b, result="f4")), clamped)


def test_extremes_of_fp32():
    a, b, c = shuffled(floats("f4"), 3)
    for name, extreme in (("min", np.minimum), ("max", np.maximum)):

        def numbers(x, y, extreme=extreme):
            return np.where(np.isnan(x), y, np.where(np.isnan(y), x, extreme(x, y)))

        same(
            evaluate(f"{name}.f32 %0, %1, %2;", a, b, result="f4") + np.float32(0),
            numbers(a, b) + np.float32(0),
        )
        same(
            evaluate(f"{name}.NaN.f32 %0, %1, %2;", a, b, result="f4") + np.float32(0),
            extreme(a, b) + np.float32(0),
        )
        found = evaluate(f"{name}.f32 %0, %1, %2, %3;", a, b, c, result="f4")
        same(found + np.float32(0), numbers(numbers(a, b), c) + np.float32(0))
    zeros = np.array([0.0, -0.0, 0.0, -0.0], "f4"), np.array([-0.0, 0.0, 0.0, -0.0], "f4")
    same(evaluate("min.f32 %0, %1, %2;", *zeros, result="f4"), np.array([-0.0, -0.0, 0.0, -0.0], "f4"))
    same(evaluate("max.f32 %0, %1, %2;", *zeros, result="f4"), np.array([0.0, 0.0, 0.0, -0.0], "f4"))


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_signs(kind):
    dtype = {"f16": "f2", "bf16": "u2", "f32": "f4", "f64": "f8"}[kind]
    x = integers(16) if kind == "bf16" else floats(dtype)
    values = values_of(x, kind)
    same(
        bits_of(values_of(evaluate(f"neg.{kind} %0, %1;", x, result=dtype), kind), kind),
        bits_of(-values, kind),
    )
    same(
        bits_of(values_of(evaluate(f"abs.{kind} %0, %1;", x, result=dtype), kind), kind),
        bits_of(np.abs(values), kind),
    )
    if kind in ("f32", "f64"):
        y = RANDOM.permutation(x)
        same(evaluate(f"copysign.{kind} %0, %1, %2;", x, y, result=dtype), np.copysign(y, x))


def test_division_and_roots():
    for kind, dtype in (("f32", "f4"), ("f64", "f8")):
        a, b = shuffled(floats(dtype), 2)
        with np.errstate(all="ignore"):
            same(evaluate(f"div.rn.{kind} %0, %1, %2;", a, b, result=dtype), a / b)
            same(evaluate(f"rcp.rn.{kind} %0, %1;", a, result=dtype), np.ones(1, dtype) / a)
            same(evaluate(f"sqrt.rn.{kind} %0, %1;", a, result=dtype), np.sqrt(a))
    positive = np.abs(floats("f8"))
    found, exact = evaluate("rsqrt.approx.f64 %0, %1;", positive, result="f8"), 1 / np.sqrt(positive)
    np.testing.assert_allclose(found, exact, rtol=2**-50)
    x = np.array([3.0, -0.1, 7.5e200, 0.0, -0.0, np.inf, 1e-310, 1e308])
    found = evaluate("rcp.approx.ftz.f64 %0, %1;", x, result="f8")
    np.testing.assert_allclose(found, [1 / 3, -10, 1 / 7.5e200, np.inf, -np.inf, 0, np.inf, 0], rtol=2**-19)
    assert not (found.view("u8") & np.uint64(0xFFFFFFFF)).any()
    np.testing.assert_allclose(
        evaluate("rsqrt.approx.ftz.f64 %0, %1;", positive, result="f8")[positive > 1e-300],
        exact[positive > 1e-300],
        rtol=2**-18,
    )
    a, b = (np.exp(RANDOM.standard_normal(512)).astype("f4") for _ in range(2))
    for name in ("div.full.f32", "div.approx.f32", "div.full.ftz.f32"):
        found = evaluate(f"{name} %0, %1, %2;", a, b, result="f4")
        assert np.all(np.abs(found.astype("f8") * b / a - 1) < 2**-22)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", [name for name in ERRORS if name != "div"])
def test_approximate_functions_keep_the_bounds_of_the_isa(name, seed):
    x = RANDOM.uniform(-3, 3, 4096).astype("f4")
    if name in ("lg2", "rsqrt", "sqrt"):
        x = np.abs(x)
    found = evaluate(f"{name}.approx.f32 %0, %1;", x, result="f4", options=Options(errors=seed)).astype("f8")
    wide = x.astype("f8")
    exact = {"ex2": np.exp2, "lg2": np.log2, "rcp": lambda v: 1 / v, "rsqrt": lambda v: 1 / np.sqrt(v), "sqrt": np.sqrt,
             "sin": np.sin, "cos": np.cos, "tanh": np.tanh}[name](wide)  # fmt: skip
    error, unit = found - exact, np.spacing(np.abs(exact).astype("f4"))
    assert np.all(np.abs(error) <= ERRORS[name](wide, exact))
    if seed:
        assert np.quantile(np.abs(error) / ERRORS[name](wide, exact), 0.9) > 0.5
        assert 0.4 < np.mean(error > 0) < 0.6
    else:
        assert np.all(np.abs(error) <= 0.5001 * unit)
    tiny = np.array([1e-40, -1e-40, 0.0, np.inf, np.nan], "f4")
    flushed = np.array([0.0, -0.0, 0.0, np.inf, np.nan], "f4")
    huge = evaluate(
        "ex2.approx.f32 %0, %1;", np.array([200.0, 128.5], "f4"), result="f4", options=Options(errors=seed)
    )
    same(huge, np.full(2, np.inf, "f4"))
    if name != "tanh":  # which has no .ftz
        plain = evaluate(f"{name}.approx.f32 %0, %1;", flushed, result="f4")
        same(evaluate(f"{name}.approx.ftz.f32 %0, %1;", tiny, result="f4"), plain)


# -----------------------------------------------------------------------------------------------------------
# Conversions


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(
    ("source", "to"), [("f64", "f32"), ("f32", "f16"), ("f64", "f16"), ("f32", "bf16"), ("f64", "bf16")]
)
def test_floats_to_narrower_floats(source, to, mode):
    x = floats({"f64": "f8", "f32": "f4"}[source], 400)
    narrow = (RANDOM.standard_normal(600) * 2.0 ** RANDOM.integers(-30, 20, 600)).astype(x.dtype)
    middle = values_of(bits_of(narrow.astype("f8"), to if to != "f32" else "f32"), to)
    x = np.concatenate([x, narrow, middle.astype(x.dtype), (middle * (1 + 2.0**-12)).astype(x.dtype)])
    if source == "f64":  # ties, and what lies so close to them that fp32 does not see it
        unit = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}[to]
        x = np.concatenate([x, 1 + unit * np.array([1, 1 + 2**-20, 1 - 2**-20, 3, 3 + 2**-20, 3 - 2**-20])])
    if to == "bf16" and (mode in ("rm", "rp") or (source == "f64" and mode == "rz")):
        pytest.skip("the ISA has no such conversion")
    expected = bits_of(exactly(lambda v: v, to, mode, x), to)
    found = evaluate(f"cvt.{mode}.{to}.{source} %0, %1;", x, result=expected.dtype)
    same(found, expected)


@pytest.mark.parametrize(("mode", "relu"), [*itertools.product(["rn", "rz"], [False, True])])
@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_two_floats_to_a_pair(to, mode, relu):
    high, low = shuffled(floats("f4", 200), 2)
    found = evaluate(f"cvt.{mode}{'.relu' if relu else ''}.{to}x2.f32 %0, %1, %2;", high, low, result="u4")
    for half, x in ((0, low), (1, high)):
        value = exactly(lambda v: v, to, mode, x)
        value = np.where(value <= 0, 0.0, value) if relu else value
        same(found.view("u2")[half::2], bits_of(value, to))


@pytest.mark.parametrize("mode", ["rn", "rz", "rna"])
def test_tf32(mode):
    x = floats("f4", 400)
    x = x[np.isfinite(x)]
    found = evaluate(f"cvt.{mode}.tf32.f32 %0, %1;", x, result="u4")
    same(found.view("f4"), exactly(lambda v: v, "tf32", mode, x))


def test_wider_floats_and_whole_ones():
    for source, to in (("f16", "f32"), ("f16", "f64"), ("f32", "f64"), ("bf16", "f32")):
        x = integers(16, 300) if source == "bf16" else floats({"f16": "f2", "f32": "f4"}[source], 300)
        dtype = {"f32": "f4", "f64": "f8"}[to]
        same(evaluate(f"cvt.{to}.{source} %0, %1;", x, result=dtype), values_of(x, source))
    for kind, dtype in (("f32", "f4"), ("f64", "f8"), ("f16", "f2")):
        x = np.concatenate([floats(dtype), np.arange(-6, 6, 0.5, dtype)])
        for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            same(evaluate(f"cvt.{mode}.{kind}.{kind} %0, %1;", x, result=dtype), function(x))
    x = floats("f4")
    same(
        evaluate("cvt.sat.f32.f32 %0, %1;", x, result="f4") + np.float32(0),
        np.where(x > 0, np.minimum(x, 1), 0),
    )
    tiny = np.array([1e-40, -1e-40, 1.0], "f4")
    same(evaluate("cvt.ftz.f64.f32 %0, %1;", tiny, result="f8"), np.array([0.0, -0.0, 1.0]))
    same(evaluate("cvt.rn.ftz.f32.f64 %0, %1;", tiny.astype("f8"), result="f4"), np.array([0.0, -0.0, 1.0]))


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize(
    ("source", "bits", "signed"), [(f, *i) for f in ("f16", "f32", "f64") for i in INTEGERS]
)
def test_floats_to_integers(source, bits, signed, mode):
    dtype = {"f16": "f2", "f32": "f4", "f64": "f8"}[source]
    with np.errstate(over="ignore"):
        x = np.concatenate(
            [
                floats(dtype),
                (RANDOM.standard_normal(300) * 2.0 ** RANDOM.integers(-2, 70, 300)).astype(dtype),
                np.arange(-6, 6, 0.5, dtype),
            ]
        )
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    function = {"rni": round, "rzi": int, "rmi": lambda v: v.__floor__(), "rpi": lambda v: v.__ceil__()}[mode]
    expected = []
    for value in x.astype("f8"):
        if np.isnan(value):
            expected.append(1 << bits - 1 if bits == 64 or source == "f64" else 0)
        elif np.isinf(value):
            expected.append(most if value > 0 else least)
        else:
            expected.append(max(least, min(most, function(Fraction(float(value))))))
    found = evaluate(
        f"cvt.{mode}.{'s' if signed else 'u'}{bits}.{source} %0, %1;",
        x,
        result=f"{'i' if signed else 'u'}{bits // 8}",
    )
    same(found, wrapped(expected, bits, signed))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("bits", "signed"), INTEGERS)
def test_integers_to_floats(bits, signed, mode):
    x = integers(bits, 200, signed)
    if bits == 64:  # beside the middle of two fp32
        x = np.concatenate(
            [
                x,
                np.array(
                    [(1 << 40) + (1 << 16) + d for d in (-1, 0, 1)]
                    + [(1 << 62) + (1 << 38) + d for d in (-1, 0, 1)],
                    x.dtype,
                ),
            ]
        )
    for to, dtype in (("f16", "f2"), ("f32", "f4"), ("f64", "f8")):
        if to == "f64" and mode != "rn":
            continue
        expected = np.array([nearest(Fraction(int(v)), to, mode) for v in x])
        same(evaluate(f"cvt.{mode}.{to}.{'s' if signed else 'u'}{bits} %0, %1;", x, result=dtype), expected)


@pytest.mark.parametrize(("source", "to"), [*itertools.product(INTEGERS, INTEGERS)])
def test_integers_to_integers(source, to):
    x = integers(source[0], signed=source[1])
    names = ["su"[not signed] + str(bits) for bits, signed in (to, source)]
    dtype = f"{'i' if to[1] else 'u'}{to[0] // 8}"
    same(evaluate(f"cvt.{'.'.join(names)} %0, %1;", x, result=dtype), wrapped(x, *to))
    least, most = (-(1 << to[0] - 1), (1 << to[0] - 1) - 1) if to[1] else (0, (1 << to[0]) - 1)
    fits = (source[0] < to[0] and source[1] <= to[1]) or source == to
    if not fits:  # else the ISA has no .sat
        clamped = [max(least, min(most, int(v))) for v in x]
        same(evaluate(f"cvt.sat.{'.'.join(names)} %0, %1;", x, result=dtype), wrapped(clamped, *to))


# -----------------------------------------------------------------------------------------------------------
# Comparisons, selections, moves


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64", "f16", "bf16", "f32", "f64"])
def test_comparisons(kind):
    bits = {"f64": 64, "f32": 32}.get(kind, 16 if "16" in kind else int(kind[1:]))
    floating = kind[0] in "fb"
    x = integers(bits, 100) if not floating or kind == "bf16" else floats(f"f{bits // 8}", 100)
    a, b = shuffled(x, 2)
    b[::3] = a[::3]
    x, y = (
        values_of(v, kind) if floating else v.view(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
        for v in (a, b)
    )
    nan = np.isnan(x) | np.isnan(y) if floating else np.zeros(len(x), bool)
    plain = {"eq": x == y, "ne": (x != y) & ~nan, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}
    tests = dict(plain)
    if floating:
        tests |= {f"{name}u": found | nan for name, found in plain.items()} | {"num": ~nan, "nan": nan}
    elif kind[0] == "u":
        tests |= {"lo": x < y, "ls": x <= y, "hi": x > y, "hs": x >= y}
    for name, expected in tests.items():
        code = f"setp.{name}.{kind} %p1, %1, %2; selp.u32 %0, 1, 0, %p1;"
        same(evaluate(code, a, b, result="u4"), expected)


def test_comparisons_with_a_second_predicate():
    a, b, c = shuffled(integers(32), 3)
    for name, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        code = f"setp.ne.u32 %p3, %3, 0; setp.lt.{name}.u32 %p1|%p2, %1, %2, {{}}%p3; selp.u32 %r20, 1, 0, %p1; selp.u32 %r21, 2, 0, %p2; or.b32 %0, %r20, %r21;"
        for sign, other in (("", c != 0), ("!", c == 0)):
            found = evaluate(code.format(sign), a, b, c, result="u4")
            same(found, function(a < b, other) + 2 * function(a >= b, other))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_comparisons_of_pairs(kind):
    a, b = shuffled(integers(16, 100), 2)
    count = len(a) // 2 * 2
    x, y = values_of(a[:count], kind), values_of(b[:count], kind)
    code = f"setp.lt.{kind}x2 %p1|%p2, %1, %2; selp.u32 %r20, 1, 0, %p1; selp.u32 %r21, 2, 0, %p2; or.b32 %0, %r20, %r21;"
    found = evaluate(code, a[:count].view("u4"), b[:count].view("u4"), result="u4")
    same(found, (x < y)[::2] + 2 * (x < y)[1::2])


def test_tests_of_floats():
    x = floats("f4")
    tests = {
        "finite": np.isfinite(x),
        "infinite": np.isinf(x),
        "notanumber": np.isnan(x),
        "number": ~np.isnan(x),
    }
    for name, expected in tests.items():
        same(evaluate(f"testp.{name}.f32 %p1, %1; selp.u32 %0, 1, 0, %p1;", x, result="u4"), expected)


def test_moves():
    x = integers(64)
    same(
        evaluate("mov.b64 {%r20, %r21}, %1; mov.b64 %0, {%r21, %r20};", x, result="u8"),
        (x << np.uint64(32)) | (x >> np.uint64(32)),
    )
    same(evaluate("mov.b64 {_, %r21}, %1; cvt.u64.u32 %0, %r21;", x, result="u8"), x >> np.uint64(32))
    found = evaluate(
        "mov.b64 {%h16, %h17, %h18, %h19}, %1; mov.b64 %0, {%h19, %h18, %h17, %h16};", x, result="u8"
    )
    same(found.view("u2").reshape(-1, 4), x.view("u2").reshape(-1, 4)[:, ::-1])
    y = integers(32)
    same(
        evaluate("mov.b32 {%h16, %h17}, %1; mov.b32 %0, {%h17, %h16};", y, result="u4"),
        (y << np.uint32(16)) | (y >> np.uint32(16)),
    )
    same(evaluate("mov.b32 %0, 0f3F800000;", y, result="f4"), np.ones(len(y)))
    same(evaluate("mov.f64 %0, 0d3FF8000000000000;", y, result="f8"), np.full(len(y), 1.5))
    same(
        evaluate(
            "mov.u32 %r20, 5; @%p1 mov.u32 %r20, 7; mov.b32 %0, %r20;".replace(
                "@%p1", "setp.gt.u32 %p1, %1, 9; @!%p1"
            ),
            y,
            result="u4",
        ),
        np.where(y > 9, 5, 7),
    )
    same(evaluate("mov.pred %p1, -1; selp.b32 %0, %1, 0, %p1;", y, result="u4"), y)


def test_scopes_have_registers_and_labels_of_their_own():
    code = "{{ .reg .b32 t; mov.b32 t, {}; loop: add.s32 t, t, 1; setp.lt.s32 %p1, t, 9; @%p1 bra loop; mov.b32 {}, t; }}"
    code = code.format("3", "%r20") + code.format("20", "%r21") + " add.s32 %0, %r20, %r21;"
    assert set(evaluate(code, integers(32), result="u4")) == {9 + 21}

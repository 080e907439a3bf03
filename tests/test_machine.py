"""The machine that executes PTX (``bench/machine``): known answers for each form of an instruction.

What an instruction should give is computed with Python's integers and exact fractions, or numpy where it computes the
same, after the words of the PTX ISA. In the end all pieces of PTX go to Triton's assembler: they are the real language.
Where there is a GPU, each test runs once more with its results.
"""

# ruff: noqa: E501 (a piece of PTX is one line)

import ctypes
import itertools
import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import ptx
from ptx import assemble, assembled, evaluate, run

from fastreg.bench.machine import Fault, Launch, Options, Program, Region, Unknown
from fastreg.bench.machine.arithmetic import ERRORS, fma_f64
from fastreg.bench.machine.parse import parse

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def _all_is_ptx():
    """Triton's assembler takes every kernel of this file that ran."""
    yield
    assemble(assembled)


GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True, **({"params": ["machine", "gpu"]} if GPU else {}))
def _executor(request, monkeypatch):
    """Where there is a GPU, every test of this file also asks it."""
    monkeypatch.setattr(ptx, "executor", getattr(request, "param", "machine"))


def test_what_runs_natively_is_what_the_test_sees(monkeypatch):
    """CUDA's driver, played by the machine: arguments, grid and results take their way."""
    driver = PlayedDriver()
    monkeypatch.setattr(ptx, "executor", "gpu")
    monkeypatch.setattr(ptx.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *kind: x.clone() if kind == ("cuda",) else to(x, *kind))
    monkeypatch.setattr(ptx, "binary_of", lambda text, target: text.encode())
    x, y = np.arange(64, dtype="u4"), np.zeros(64, "u4")
    body = f"{ELEMENT} mad.lo.u64 %d21, %d39, 4, %d31; ld.global.b32 %r1, [%d20]; not.b32 %r1, %r1; st.global.b32 [%d21], %r1;"
    run(body, x, y, threads=64)
    assert driver.calls == ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuModuleUnload"]
    same(y, ~x)
    driver.wrong = True
    run(body, x, y, threads=64)
    same(y, ~x + 1)  # the results are the driver's


class PlayedDriver:
    """The four functions of CUDA's driver that are called."""

    def __init__(self):
        self.calls, self.wrong = [], False

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            getattr(self, f"_{name}")(*arguments)
            return 0

        return call

    def _cuModuleLoadData(self, module, binary):
        self.program = Program(binary.decode())

    def _cuModuleGetFunction(self, function, module, name):
        assert name == b"test" == self.program.kernel.name.encode()

    def _cuLaunchKernel(self, function, x, y, z, threads, y_, z_, shared, stream, parameters, extra):
        pointers = [ctypes.c_uint64.from_address(at).value for at in parameters]
        regions = [Region(at, at + 256, "memory") for at in pointers]
        raw = [at.to_bytes(8, "little") for at in pointers]
        Launch(self.program, (x, y, z), threads, raw, regions, shared).run()
        if self.wrong:
            found = np.ctypeslib.as_array((ctypes.c_uint32 * 64).from_address(pointers[1]))
            found += np.uint32(1)

    def _cuModuleUnload(self, module):
        pass


@pytest.fixture(autouse=True)
def _same_numbers():
    """Each test draws the same, whichever ran before."""
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state
    with np.errstate(all="ignore"):
        yield


EDGES = [0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 127, 128, 255, 256]


def integers(bits: int, count: int = 64, signed: bool = False) -> np.ndarray:
    """Small and large ones, and any."""
    near = [*EDGES, *(-x for x in EDGES), *((1 << bits - 1) + x for x in (-2, -1, 0, 1)), (1 << bits) - 1]
    some = [int(x) for x in RANDOM.integers(0, 1 << 63, count)] + [
        3 * int(x) for x in RANDOM.integers(0, 1 << 62, count)
    ]
    values = np.array([x % (1 << bits) for x in [*near, *some]], f"u{bits // 8}")
    return RANDOM.permutation(values).view(f"{'i' if signed else 'u'}{bits // 8}")


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


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, zeros by their sign; NaN is NaN."""
    expected = np.asarray(expected).astype(found.dtype)
    equal = (found.view(f"u{found.itemsize}") == expected.view(f"u{found.itemsize}")) | (
        (found != found) & (expected != expected)
    )
    wrong = np.flatnonzero(~equal)
    assert not len(wrong), (
        f"{len(wrong)} wrong, first {wrong[0]}: {found[wrong[0]]!r} for {expected[wrong[0]]!r}"
    )


def wrapped(values, bits: int, signed: bool = False) -> np.ndarray:
    unsigned = np.array([int(x) % (1 << bits) for x in values], f"u{bits // 8}")
    return unsigned.view(f"i{bits // 8}") if signed else unsigned


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


def bits_of(values: np.ndarray, kind: str) -> np.ndarray:
    """fp64 values of a format as its bits."""
    if kind == "bf16":
        bits = (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), bits)
    if kind == "f16":
        return np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))
    return values.astype({"f32": np.float32, "f64": np.float64, "tf32": np.float32}[kind])


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


# -----------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("space", ["global", "shared", "local"])
@pytest.mark.parametrize(
    ("vector", "kind"),
    [
        ("", "b8"),
        ("", "b16"),
        ("", "b32"),
        ("", "b64"),
        ("v2.", "b32"),
        ("v4.", "b32"),
        ("v2.", "b64"),
        ("v4.", "b16"),
        ("v2.", "b8"),
    ],
)
def test_loads_and_stores(space, vector, kind):
    count, size = int(vector[1] if vector else 1), int(kind[1:]) // 8
    letter = {1: "h", 2: "h", 4: "r", 8: "d"}[size]
    registers = ", ".join(f"%{letter}{i}" for i in range(count))
    registers = f"{{{registers}}}" if vector else registers
    x = RANDOM.integers(0, 256, 32 * 16).astype("u1")
    y, total = np.zeros_like(x), count * size
    places = f"mad.lo.u64 %d20, %d39, {total}, %d30; mad.lo.u64 %d21, %d39, {total}, %d31;\n"
    body = f"{places} ld.global.{vector}{kind} {registers}, [%d20];\n"
    if space != "global":
        there = f"[%r20+{total}]" if space == "shared" else "[stack+16]"
        other = registers.replace(letter, letter + "1")
        body += f"mad.lo.s32 %r20, %r39, {total}, %r38;\n" if space == "shared" else ""
        body += (
            f"st.{space}.{vector}{kind} {there}, {registers};\n ld.{space}.{vector}{kind} {other}, {there};\n"
        )
        registers = other
    body += f"st.global.{vector}{kind} [%d21], {registers};"
    if space == "local":
        body = ".local .align 16 .b8 stack[64];\n" + body
    run(body, x, y, shared=1024 if space == "shared" else 0)
    same(y[: 32 * total], x[: 32 * total])
    assert not y[32 * total :].any()


def test_narrow_loads_are_extended_and_guards_keep_the_old_value():
    x = RANDOM.integers(0, 256, 32).astype("u1")
    y = np.zeros(96, "i4")
    run(
        """add.u64 %d20, %d30, %d39; mad.lo.u64 %d21, %d39, 4, %d31;
        ld.global.s8 %r1, [%d20]; ld.global.u8 %r2, [%d20]; mov.u32 %r3, 77; setp.lt.u32 %p1, %r39, 7;
        @%p1 ld.global.u8 %r3, [%d20]; @!%p1 st.global.b32 [0], %r3; st.global.b32 [%d21], %r1; st.global.b32 [%d21+128], %r2;
        st.global.b32 [%d21+256], %r3;""".replace("@!%p1 st.global.b32 [0], %r3;", ""),
        x, y,
    )  # fmt: skip
    same(y[:32], x.view("i1"))
    same(y[32:64], x)
    same(y[64:], np.where(np.arange(32) < 7, x, 77))


def test_atomics():
    y = np.array([5, 5, 0xFFFF, 0, 100, 0, 7, 0], "u4")
    z = np.zeros(32, "u4")
    run(
        """atom.global.gpu.relaxed.add.u32 %r1, [%d30], %r39; atom.global.min.s32 %r2, [%d30+4], %r39;
        atom.global.and.b32 %r3, [%d30+8], %r39; atom.global.or.b32 %r4, [%d30+12], %r39; red.global.max.u32 [%d30+16], %r39;
        atom.global.exch.b32 %r5, [%d30+20], %r39; atom.global.cas.b32 %r6, [%d30+24], 7, 9; red.global.add.f32 [%d30+28], 0f3F000000;
        mad.lo.u64 %d20, %d39, 4, %d31; st.global.b32 [%d20], %r1;""",
        y, z,
    )  # fmt: skip
    assert y[:7].tolist() == [5 + 496, 0, 0, 31, 100, 31, 9]
    assert y[7:].view("f4") == 16
    same(z, 5 + np.cumsum(np.arange(32)) - np.arange(32))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_asynchronous_copies(seed):
    """The number of bytes is computed in a block before: the warps whose turn it is not yet have none."""
    x, y = integers(32, 400)[:256].copy(), np.zeros(256, "u4")
    run(
        """mad.lo.u64 %d20, %d39, 16, %d30; mad.lo.u64 %d21, %d39, 16, %d31; mad.lo.s32 %r20, %r39, 16, %r38;
        setp.lt.u32 %p1, %r39, 48; selp.b32 %r21, 16, 0, %p1; bra.uni next; next:
        cp.async.cg.shared.global [%r20], [%d20], 16, %r21; cp.async.commit_group; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%r20]; st.global.v4.b32 [%d21], {%r0, %r1, %r2, %r3};""",
        x, y, shared=1024, threads=64, options=Options(seed=seed),
    )  # fmt: skip
    same(y, np.where(np.arange(256) < 192, x, 0))


# -----------------------------------------------------------------------------------------------------------
# Warps


def shuffled_by_the_isa(mode: str, x: list[int], by: int, limits: int) -> list[tuple[int, bool]]:
    result = []
    for lane in range(32):
        b, clamp, segment = by & 31, limits & 31, limits >> 8 & 31
        most, least = lane & segment | clamp & ~segment, lane & segment
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | b & ~segment}[mode]
        ok = j >= most if mode == "up" else j <= most
        result.append((x[j if ok else lane], ok))
    return result


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode):
    for by, limits in itertools.product((0, 1, 3, 16, 31), (0, 31, 0x1C1F, 0x1800, 0x1807)):
        x = integers(32)[:64]
        code = f"shfl.sync.{mode}.b32 %r20|%p1, %1, {by}, {limits}, -1; selp.u32 %r21, 1, 0, %p1; mov.b64 %0, {{%r20, %r21}};"
        found = evaluate(code, x, result="u8")
        expected = [
            pair
            for start in (0, 32)
            for pair in shuffled_by_the_isa(mode, x[start : start + 32].tolist(), by, limits)
        ]
        same(found, np.array([value | int(ok) << 32 for value, ok in expected], "u8"))


def test_a_shuffle_by_an_amount_of_each_lane():
    x = integers(32)[:32]
    by = RANDOM.integers(0, 32, 32).astype("u4")
    same(evaluate("shfl.sync.idx.b32 %0, %1, %2, 31, -1;", x, by, result="u4"), x[by])


def test_votes_reductions_and_elections():
    x = integers(32)[:64]
    halves = x.reshape(2, 32)

    def spread(values):
        return np.repeat(np.array(values), 32)

    same(
        evaluate("redux.sync.add.u32 %0, %1, -1;", x, result="u4"),
        spread(wrapped(halves.astype("u8").sum(1), 32)),
    )
    same(evaluate("redux.sync.max.s32 %0, %1, -1;", x, result="i4"), spread(halves.view("i4").max(1)))
    same(evaluate("redux.sync.min.u32 %0, %1, -1;", x, result="u4"), spread(halves.min(1)))
    same(evaluate("redux.sync.xor.b32 %0, %1, -1;", x, result="u4"), spread(np.bitwise_xor.reduce(halves, 1)))
    ballots = [sum(int(bit) << i for i, bit in enumerate(row < 100)) for row in halves]
    same(
        evaluate("setp.lt.u32 %p1, %1, 100; vote.sync.ballot.b32 %0, %p1, -1;", x, result="u4"),
        spread(wrapped(ballots, 32)),
    )
    for mode, function in (("any", np.any), ("all", np.all)):
        code = f"setp.lt.u32 %p1, %1, 100; vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 %0, 1, 0, %p2;"
        same(evaluate(code, x, result="u4"), spread(function(halves < 100, 1)))
    found = evaluate("elect.sync %r20|%p1, -1; selp.u32 %0, 1, 0, %p1;", x, result="u4", target="sm_90a")
    same(found, np.arange(64) % 32 == 0)
    # half of a warp
    code = "mov.u32 %0, 0; setp.lt.u32 %p1, %r39, 16; @!%p1 bra over; activemask.b32 %r20; redux.sync.add.u32 %0, %1, 0xffff; over:"
    found = evaluate(code, x[:32], result="u4")
    same(found[:16], np.full(16, wrapped([x[:16].astype("u8").sum()], 32)[0]))
    assert not found[16:].any()
    same(evaluate("mov.u32 %0, %lanemask_lt;", x, result="u4"), (1 << np.arange(64) % 32) - 1)


def test_divergence_and_loops():
    """Each thread makes as many trips as its operand says, on one of two ways."""
    x = RANDOM.integers(0, 20, 64).astype("u4")
    code = """mov.u32 %r20, 0; mov.u32 %r21, 0;
    top: setp.ge.u32 %p1, %r20, %1; @%p1 bra done; and.b32 %r22, %r20, 1; setp.eq.u32 %p2, %r22, 0; @%p2 bra even;
    add.u32 %r21, %r21, 100; bra next; even: add.u32 %r21, %r21, 1; next: add.u32 %r20, %r20, 1; bra top; done: mov.b32 %0, %r21;"""
    same(evaluate(code, x, result="u4"), (x + 1) // 2 + 100 * (x // 2))


# -----------------------------------------------------------------------------------------------------------
# Matrices


def multiplied(shape: str, kind: str) -> None:
    """D = A B + C from registers that are filled after the tables of the ISA, for whole numbers: every sum is exact."""
    m, n, k = (int(x) for x in shape[1:].replace("n", " ").replace("k", " ").split())
    a, b = RANDOM.integers(-8, 9, (m, k)).astype("f8"), RANDOM.integers(-8, 9, (k, n)).astype("f8")
    c = RANDOM.integers(-8, 9, (m, n)).astype("f8")
    size = {"bf16": 2, "f16": 2, "tf32": 4, "f64": 8}[kind]
    packed = max(1, 4 // size)
    letter, wide, result = ("d", "f8", "f64") if kind == "f64" else ("r", "f4", "f32")
    per_thread = [m * k // 32 // packed, k * n // 32 // packed, m * n // 32]
    data = np.zeros((32, 3, 8), "u8" if kind == "f64" else "u4")

    def stored(values):
        if kind in ("bf16", "f16"):
            bits = bits_of(np.array(values), kind).astype("u4")
            return bits[0] | bits[1] << 16
        return np.array(values[0], wide).view(data.dtype)

    for lane in range(32):
        group, place = lane // 4, lane % 4
        for i in range(per_thread[0]):
            row = group + 8 * (i % 2) if m == 16 else group
            first = place * packed + 4 * packed * (i // 2 if m == 16 else i)
            data[lane, 0, i] = stored([a[row, first + j] for j in range(packed)])
        for i in range(per_thread[1]):
            first = place * packed + 4 * packed * i
            data[lane, 1, i] = stored([b[first + j, group] for j in range(packed)])
        for i in range(per_thread[2]):
            data[lane, 2, i] = np.array(c[group + 8 * (i // 2), place * 2 + i % 2], wide).view(data.dtype)
    names = [[f"%{letter}{8 * matrix + i}" for i in range(count)] for matrix, count in enumerate(per_thread)]
    out = np.zeros((32, 8), wide)
    width = data.itemsize
    lines = [f"mad.lo.u64 %d28, %d39, {24 * width}, %d30; mad.lo.u64 %d29, %d39, {8 * width}, %d31;"]
    for matrix, registers in enumerate(names):
        lines += [
            f"ld.global.b{8 * width} {x}, [%d28+{(8 * matrix + i) * width}];" for i, x in enumerate(registers)
        ]
    vectors = [f"{{{', '.join(x)}}}" for x in names]
    types = f"{result}.{kind}.{kind}.{result}"
    lines.append(
        f"mma.sync.aligned.{shape}.row.col.{types} {vectors[2]}, {vectors[0]}, {vectors[1]}, {vectors[2]};"
    )
    lines += [f"st.global.b{8 * width} [%d29+{i * width}], {x};" for i, x in enumerate(names[2])]
    run("\n".join(lines), data, out)
    expected = a @ b + c
    for lane, i in itertools.product(range(32), range(per_thread[2])):
        assert out[lane, i] == expected[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ("m16n8k16", "bf16"),
        ("m16n8k16", "f16"),
        ("m16n8k8", "bf16"),
        ("m16n8k8", "f16"),
        ("m16n8k8", "tf32"),
        ("m16n8k4", "tf32"),
        ("m8n8k4", "f64"),
    ],
)
def test_products_of_a_warp(shape, kind):
    multiplied(shape, kind)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_in_shared_memory(count, transposed):
    matrices = RANDOM.integers(0, 1 << 16, (count, 8, 8)).astype("u2")
    out, back = np.zeros((32, 4), "u4"), np.zeros((count, 8, 8), "u2")
    registers = "{" + ", ".join(f"%r{i}" for i in range(count)) + "}"
    trans = ".trans" if transposed else ""
    rows = f"setp.lt.u32 %p1, %r39, {8 * count};"
    run(
        f"""{rows} mad.lo.u64 %d20, %d39, 16, %d30; mad.lo.u64 %d21, %d39, 16, %d31; mad.lo.u64 %d22, %d39, 16, %d32;
        mad.lo.s32 %r20, %r39, 16, %r38; @%p1 ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d20];
        @%p1 st.shared.v4.b32 [%r20], {{%r10, %r11, %r12, %r13}}; bar.sync 0; mov.b32 %r0, 0; mov.b32 %r1, 0; mov.b32 %r2, 0; mov.b32 %r3, 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r20]; st.global.v4.b32 [%d21], {{%r0, %r1, %r2, %r3}};
        bar.sync 0; stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r20], {registers}; bar.sync 0;
        @%p1 ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r20]; @%p1 st.global.v4.b32 [%d22], {{%r10, %r11, %r12, %r13}};""",
        matrices, out, back, shared=1024,
    )  # fmt: skip
    for lane, k in itertools.product(range(32), range(count)):
        rows = matrices[k].T if transposed else matrices[k]
        assert (
            out[lane, k] == int(rows[lane // 4, lane % 4 * 2]) | int(rows[lane // 4, lane % 4 * 2 + 1]) << 16
        )
    same(back.ravel(), matrices.ravel())


# -----------------------------------------------------------------------------------------------------------
# What the machine refuses


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("vabsdiff.u32.u32.u32 %r1, %r2, %r3, %r4;", "this instruction is missing"),
        ("add.cc.u32 %r1, %r2, %r3;", "modifier cc"),
        ("add.rz.f64 %d1, %d2, %d3;", "directed rounding of fp64"),
        ("cvt.rn.satfinite.e4m3x2.f32 %h1, %r1, %r2;", "types"),
        ("mov.u32 %r1, %clock;", "special register %clock"),
        ("ld.u32 %r1, [%d1];", "generic addresses"),
        ("shfl.b32 %r1, %r2, 1, 31;", "operands"),
        ("bar.sync 1;", "a barrier of some threads"),
        ("bra nowhere;", "label nowhere"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r3, %r4, %r5, %r6}, {%r7, %r8}, {%r1, %r2};", "a product of these types"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_with_its_line(code, said):
    with pytest.raises(Unknown) as error:
        run(code)
    assembled.pop()
    text = str(error.value)
    assert said in text or "types" in said
    assert text.startswith("test, ")
    assert code.rstrip(";").split(" {")[0] in text
    assert "PTX line" in text


def test_source_lines_are_those_of_the_python_file():
    text = '.version 8.0\n.target sm_80\n.file 1 "/a/b/kernel.py"\n.visible .entry k()\n{\n.loc 1 42 7\nret;\n}\n'
    kernel = parse(text)
    assert kernel.where(kernel.blocks[0][0]) == "k, kernel.py:42, PTX line 7: ret"


# -----------------------------------------------------------------------------------------------------------
# The checks of a sanitizer, each with the fault planted, and with the same kernel mended

OUT, SAFE = np.zeros(64, "u4"), Options()


def planted(body: str, *arrays: np.ndarray, says: str, **more) -> Fault:
    """The kernel has this fault, whatever the order of its warps; the report names all there is to name."""
    for seed in range(3):
        with pytest.raises(Fault) as error:
            run(body, *arrays, options=Options(seed=seed), **more)
        text = str(error.value)
        assert says in text
        assert "test, " in text
        assert "PTX line" in text
        assert "program (" in text
        assert "thread " in text
    return error.value


ELEMENT = "mad.lo.u64 %d20, %d39, 4, %d30;"


def test_an_access_out_of_bounds():
    x = np.zeros(34, "u4")[:31]
    planted(f"{ELEMENT} st.global.b32 [%d20], %r39;", x, says="thread 31, address")
    planted(
        f"{ELEMENT} ld.global.b32 %r1, [%d20];",
        x,
        says="is out of bounds: array 0 is the nearest tensor, of 124 bytes; the access of 4 begins at its byte 124",
    )
    planted("ld.global.b32 %r1, [%d30+-4];", x, says="begins at its byte -4")
    run(f"setp.lt.u32 %p1, %r39, 31; {ELEMENT} @%p1 st.global.b32 [%d20], %r39;", x)
    planted("ld.shared.b32 %r1, [memory+64];", says="is outside of the 64 bytes of shared memory", shared=64)


def test_a_misaligned_access():
    x = np.zeros(64, "u4")
    planted(
        f"{ELEMENT} ld.global.v2.b32 {{%r1, %r2}}, [%d20+{x.ctypes.data % 8}];",
        x,
        says="is not aligned to 8 bytes",
    )
    planted("mov.u32 %r1, 0; st.shared.b32 [memory+2], %r1;", says="is not aligned to 4 bytes", shared=64)


def test_shared_memory_that_nothing_wrote():
    write, read = (
        "mad.lo.s32 %r20, %r39, 4, %r38; @%p1 st.shared.b32 [%r20], %r39;",
        "ld.shared.b32 %r1, [%r20];",
    )
    planted(
        f"setp.ne.u32 %p1, %r39, 5; {write} {read}",
        says="thread 5, address 0x14: is shared memory that nothing wrote",
        shared=128,
    )
    run(f"setp.lt.u32 %p1, %r39, 32; {write} {read}", shared=128)


def test_a_race_between_warps():
    """Thread t writes, thread t + 32 reads."""
    body = "mad.lo.s32 %r20, %r39, 4, %r38; st.shared.b32 [%r20], %r39; {} xor.b32 %r21, %r39, 32; mad.lo.s32 %r22, %r21, 4, %r38; ld.shared.b32 %r1, [%r22];"
    with pytest.raises(Fault):
        run(body.format(""), threads=64, shared=256)
    planted(body.format("bar.warp.sync -1;"), threads=64, shared=256, says="")
    run(body.format("bar.sync 0;"), threads=64, shared=256)
    within = body.replace("xor.b32 %r21, %r39, 32", "xor.b32 %r21, %r39, 1")
    planted(
        within.format(""), threads=64, shared=256, says="reads what another thread wrote with nothing between"
    )
    run(within.format("bar.warp.sync -1;"), threads=64, shared=256)


def test_a_write_over_what_others_still_read():
    body = """mad.lo.s32 %r20, %r39, 4, %r38; st.shared.b32 [%r20], %r39; bar.sync 0;
    xor.b32 %r21, %r39, 32; mad.lo.s32 %r22, %r21, 4, %r38; ld.shared.b32 %r1, [%r22]; {} st.shared.b32 [%r20], 7;"""
    planted(body.format(""), threads=64, shared=256, says="another thread")
    run(body.format("bar.sync 0;"), threads=64, shared=256)


def test_two_values_for_one_shared_address():
    planted("st.shared.b32 [memory], %r39;", threads=64, shared=16, says="writes what another thread write")
    says = "writes what another thread wrote"
    planted(
        "st.shared.b32 [memory], %r39; st.shared.b32 [memory], 5;", threads=64, shared=16, says="what another"
    )
    # Copies of one element, which Triton's layouts hold, are written by one instruction; two of them are a race.
    run("st.shared.b32 [memory], 5;", threads=64, shared=16)
    twice = "setp.lt.u32 %p1, %r39, 32; @%p1 st.shared.b32 [memory], 5; {} @!%p1 st.shared.b32 [memory], 5;"
    planted(twice.format(""), threads=64, shared=16, says=says)
    planted(twice.format("bar.warp.sync -1;"), threads=64, shared=16, says=says)
    run(twice.format("bar.sync 0;"), threads=64, shared=16)


def test_programs_that_write_one_address():
    body = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r39, 0; mul.wide.u32 %d20, %r1, {}; add.u64 %d20, %d20, %d30; @%p1 st.global.b32 [%d20], 5;"
    planted(body.format(0), np.zeros(8, "u4"), programs=8, says="writes what another thread write")
    run(body.format(4), np.zeros(8, "u4"), programs=8)
    run("red.global.add.u32 [%d30], 1;", x := np.zeros(1, "u4"), programs=8)
    assert x[0] == 8 * 32


def test_a_program_that_reads_what_another_writes():
    body = """mov.u32 %r1, %ctaid.x; mul.wide.u32 %d20, %r1, 4; add.u64 %d20, %d20, %d30; setp.eq.u32 %p1, %r39, 0;
    @%p1 st.global.b32 [%d20], 5; ld.global.b32 %r2, [{}];"""
    planted(body.format("%d30"), np.zeros(8, "u4"), programs=8, says="another thread")
    run(body.format("%d20"), np.zeros(8, "u4"), programs=8)


def test_a_barrier_that_not_all_reach():
    planted(
        "setp.eq.u32 %p1, %r39, 40; @%p1 bra over; bar.sync 0; over:",
        threads=64,
        says="thread 40: a barrier that not all threads reach: this one has returned",
    )
    two = "setp.lt.u32 %p1, %r39, 32; @%p1 bra other; bar.sync 0; bra over; other: bar.sync 0; over:"
    planted(two, threads=64, says="waits at another")
    planted(
        "setp.lt.u32 %p1, %r39, 9; @%p1 bra over; shfl.sync.idx.b32 %r1, %r39, 0, 31, -1; over:",
        says="the lanes that are named are not those that are here",
    )


def test_a_copy_that_nobody_waited_for():
    x = np.zeros(128, "u4")
    body = """mad.lo.u64 %d20, %d39, 16, %d30; mad.lo.s32 %r20, %r39, 16, %r38; cp.async.cg.shared.global [%r20], [%d20], 16;
    cp.async.commit_group; {} ld.shared.b32 %r1, [%r20];"""
    planted(body.format(""), x, shared=512, says="is shared memory that a copy still writes")
    planted(body.format("cp.async.commit_group; cp.async.wait_group 2;"), x, shared=512, says="still writes")
    run(body.format("cp.async.wait_group 0;"), x, shared=512)


def warpgroup(then: str, *arrays: np.ndarray, **more) -> None:
    """A product of zeros in %r2 to %r5, and what comes then."""
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r2, %r3, %r4, %r5}, %d20, %d20, %p1, 1, 1, 0, 0;"
    zeros = "st.shared.v4.b32 [%r20], {%r1, %r1, %r1, %r1};"
    start = f"""mov.u32 %r1, 0; mad.lo.s32 %r20, %r39, 16, %r38; {zeros} bar.sync 0; fence.proxy.async.shared::cta;
    cvt.u64.u32 %d20, %r38; shr.u64 %d20, %d20, 4; or.b64 %d20, %d20, {8 << 16 | 16 << 32}; setp.ne.u32 %p1, %r1, 0;
    wgmma.fence.sync.aligned;"""
    run(f"{start} {then.format(product)}", *arrays, threads=128, shared=2048, **more)


@pytest.mark.parametrize(
    "reads",
    [
        "add.f32 %r6, %r2, %r2;",
        "cvt.rn.bf16x2.f32 %r6, %r2, %r3;",
        "mov.b32 %r6, %r4; setp.lt.f32 %p2, %r6, %r1;",
        "selp.b32 %r6, %r5, %r1, %p1; xor.b32 %r6, %r6, 1;",
        "st.global.b32 [%d30], %r2;",
        "mov.b32 %r6, %r2; bra over; over: neg.f32 %r6, %r6;",
        "shfl.sync.bfly.b32 %r6, %r2, 1, 31, -1;",
    ],
)
def test_accumulators_that_nobody_waited_for(reads):
    x = np.zeros(4, "u4")
    end, wait = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned"
    for order in (f"{{}} {reads}", f"{{}} {end} {reads}", f"{{}} {end} {wait} 1; {reads} {wait} 0;"):
        with pytest.raises(Fault, match="reads what a product still writes") as error:
            warpgroup(order, x)
        assert re.sub(".*[;:] ", "", reads).rstrip(";") in str(error.value)
    warpgroup(f"{{}} {end} {wait} 0; {reads}", x)
    warpgroup(f"{{0}} {end} {{0}} {end} {wait} 0; {reads}", x)
    early = reads.replace("%r2", "%r12").replace("%r3", "%r13").replace("%r4", "%r14").replace("%r5", "%r15")
    moved = "mov.b32 %r12, %r2; mov.b32 %r13, %r3; mov.b32 %r14, %r4; mov.b32 %r15, %r5;"
    warpgroup(f"{{}} {end} {moved} {wait} 0; {early}", x)


def test_a_loop_without_end():
    with pytest.raises(Fault, match="an endless loop"):
        run("top: bra top;", options=Options(most_blocks=1000))


def test_results_that_depend_on_the_order_of_warps_differ():
    """The last of two warps to write the same address in global memory wins."""
    found = set()
    for seed in range(1, 12):
        x = np.zeros(1, "u4")
        run("shr.u32 %r1, %r39, 5; st.global.b32 [%d30], %r1;", x, threads=64, options=Options(seed=seed))
        found.add(int(x[0]))
    assert found == {0, 1}


# -----------------------------------------------------------------------------------------------------------
# Counters


def counted(body: str, *arrays: np.ndarray, **more):
    return run(body, *arrays, options=Options(counting=True), **more).counters


def test_bytes_and_sectors():
    x = np.zeros(32 * 32 + 16, "u4")
    x = x[(-x.ctypes.data % 32) // 4 :][: 32 * 32]
    found = counted(f"{ELEMENT} ld.global.b32 %r1, [%d20]; st.global.b32 [%d20], %r1;", x).loads
    assert (found.requests, found.bytes, found.distinct, found.sectors, found.fewest) == (1, 128, 128, 4, 4)
    found = counted("mad.lo.u64 %d20, %d39, 128, %d30; ld.global.b32 %r1, [%d20];", x).loads
    assert (found.bytes, found.sectors, found.fewest) == (128, 32, 4)
    found = counted("ld.global.b32 %r1, [%d30];", x, threads=64, programs=3).loads
    assert (found.requests, found.bytes, found.distinct, found.sectors, found.fewest) == (6, 768, 24, 6, 6)
    found = counted(f"{ELEMENT} setp.lt.u32 %p1, %r39, 4; @%p1 st.global.b32 [%d20+16], %r39;", x).stores
    assert (found.bytes, found.sectors, found.fewest) == (16, 1, 1)
    found = counted(
        "mad.lo.u64 %d20, %d39, 16, %d30; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d20];", x
    ).loads
    assert (found.bytes, found.sectors, found.fewest) == (512, 16, 16)


@pytest.mark.parametrize(("stride", "turns"), [(4, 1), (8, 2), (12, 1), (128, 32), (0, 1)])
def test_bank_conflicts(stride, turns):
    body = f"mad.lo.s32 %r20, %r39, {stride}, %r38; st.shared.b32 [%r20], 1;"
    found = counted(body, shared=4096)
    assert (found.shared.requests, found.conflicts) == (1, turns - 1)


@pytest.mark.parametrize(("stride", "extra"), [(16, 0), (32, 4), (48, 0), (128, 28)])
def test_bank_conflicts_of_wide_accesses(stride, extra):
    body = f"mad.lo.s32 %r20, %r39, {stride}, %r38; st.shared.v4.b32 [%r20], {{%r39, %r39, %r39, %r39}};"
    assert counted(body, shared=4096).conflicts == extra


def test_instructions_of_warps():
    body = "mov.u32 %r1, 0; top: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 5; @%p1 bra top; setp.lt.u32 %p1, %r39, 32; @%p1 bra over; not.b32 %r1, %r1; over:"
    found = counted(body, threads=64, programs=2).instructions
    assert (found["add.u32"], found["not.b32"], found["ret"]) == (20, 2, 4)

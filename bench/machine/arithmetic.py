"""What PTX computes and numpy does not: arrays in, arrays out, exact unless a docstring says otherwise.

bf16 is kept as its bits, in uint16; a pair of 16-bit numbers in uint32, its first element in the low half; a pair of
fp32 in uint64. Rounding to fewer bits is done once: what is inexact in fp64 is first rounded *to odd* (truncated, with
the last bit set), after which a rounding to half the bits gives what one rounding would have given (Boldo and
Melquiond, 2008).

NaN results have numpy's bits, except from conversions to 16 bits, whose NaN is 0x7fff as the ISA says.
"""

from fractions import Fraction

import numpy as np
from numpy import float16, float32, float64, int64, ndarray, uint8, uint16, uint32, uint64

# -----------------------------------------------------------------------------------------------------------
# Rounding


def two_sum(a: ndarray, b: ndarray) -> tuple[ndarray, ndarray]:
    """a + b rounded, and what the rounding lost (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def to_odd(rounded: ndarray, lost: ndarray) -> ndarray:
    """fp64 rounded + lost, truncated, with the last bit set if anything was cut off."""
    inexact = (lost != 0) & np.isfinite(rounded) & (rounded != 0)
    beyond = inexact & ((lost < 0) != (rounded < 0))  # rounding went away from zero
    bits = np.ascontiguousarray(rounded).view(int64) - beyond
    return (bits | inexact).view(float64)


def odd_sum(a: ndarray, b: ndarray) -> ndarray:
    total, lost = two_sum(a, b)
    return to_odd(total, lost)


FORMATS = {  # bits of the significand, the least exponent of a normal number, the largest number
    "f32": (24, -126, float(np.finfo(float32).max)),
    "tf32": (11, -126, (2 - 2.0**-10) * 2.0**127),
    "f16": (11, -14, 65504.0),
    "bf16": (8, -126, (2 - 2.0**-7) * 2.0**127),
}


def rounded(x: ndarray, kind: str, mode: str) -> ndarray:
    """fp64 ``x`` as a number of this format, still in fp64. rn: to nearest even; rna: ties away from zero; rz, rm, rp:
    toward zero, minus and plus infinity."""
    bits, least, largest = FORMATS[kind]
    _, exponent = np.frexp(x)
    unit = np.maximum(exponent - 1, least) - (bits - 1)
    result = np.ldexp(_to_integer(np.ldexp(x, -unit), mode), unit)
    over = np.isfinite(x) & (np.abs(result) > largest)
    if over.any():
        keeps = {"rn": False, "rna": False, "rz": True, "rm": x > 0, "rp": x < 0}[mode]
        result = np.where(over, np.copysign(np.where(keeps, largest, np.inf), x), result)
    return np.copysign(np.where(np.isfinite(x), result, x), x)


def _to_integer(x: ndarray, mode: str) -> ndarray:
    if mode == "rna":
        return np.copysign(np.floor(np.abs(x) + 0.5), x)
    return {"rn": np.rint, "rz": np.trunc, "rm": np.floor, "rp": np.ceil}[mode](x)


def decode(x: ndarray, kind: str) -> ndarray:
    """The value, in fp64."""
    return (bf16_to_f32(x) if kind == "bf16" else x).astype(float64)


def encode(x: ndarray, kind: str, mode: str = "rn") -> ndarray:
    """fp64 to a narrower type, rounded once. NaN of 16 bits is 0x7fff."""
    if kind == "f64":
        return x
    if mode == "rn" and kind in ("f32", "f16"):
        result = x.astype({"f32": float32, "f16": float16}[kind])
    else:
        result = rounded(x, kind, mode).astype(float16 if kind == "f16" else float32)
    if kind == "f16":
        return np.where(np.isnan(x), uint16(0x7FFF), np.ascontiguousarray(result).view(uint16)).view(float16)
    if kind == "bf16":
        bits = (np.ascontiguousarray(result).view(uint32) >> uint32(16)).astype(uint16)
        return np.where(np.isnan(x), uint16(0x7FFF), bits)
    if kind == "tf32":
        bits = np.ascontiguousarray(result).view(uint32)
        return np.where(np.isnan(x), uint32(0x7FFFFFFF), bits)
    return result


def f32_to_bf16(x: ndarray) -> ndarray:
    """To nearest even, as ``encode``, in fewer operations."""
    bits = np.ascontiguousarray(x).view(uint32)
    nearest = (bits + (uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1)))) >> uint32(16)
    return np.where(np.isnan(x), uint32(0x7FFF), nearest).astype(uint16)


def bf16_to_f32(x: ndarray) -> ndarray:
    return (x.astype(uint32) << uint32(16)).view(float32)


_TINY = float32(2.0**-126)


def flush(x: ndarray) -> ndarray:
    """.ftz: subnormal fp32 are zero, with their sign."""
    small = np.abs(x) < _TINY
    return np.where(small, np.copysign(float32(0), x), x) if small.any() else x


def saturate(x: ndarray) -> ndarray:
    """.sat: to [0, 1]; NaN is +0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


# -----------------------------------------------------------------------------------------------------------
# fma, and the arithmetic of narrow types and pairs


def fma_f32(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    """The product is exact in fp64. Only a sum that lies there halfway between two fp32 needs the rounding to odd."""
    product = np.multiply(a, b, dtype=float64)
    total = product + c
    result = total.astype(float32)
    halfway = (total.view(int64) & 0x1FFFFFFF) == 0x10000000
    doubtful = halfway | (np.abs(result) <= _TINY)
    if doubtful.any():
        result = np.where(doubtful, odd_sum(product, c.astype(float64)).astype(float32), result)
    return result


def fma_f64(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    """Boldo and Melquiond's fma; numbers near the ends of the range by exact fractions, one by one."""
    a, b, c = np.broadcast_arrays(a, b, c)
    high, low = _two_product(a, b)
    c_high, c_low = two_sum(c, low)
    top, rest = two_sum(high, c_high)
    result = top + odd_sum(c_low, rest)
    plain = a * b + c
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    sizes = np.abs(a), np.abs(b), np.abs(high), np.abs(result)
    normal = (sizes[0] < 2.0**990) & (sizes[1] < 2.0**990) & (sizes[2] > 2.0**-900) & (sizes[3] > 2.0**-900)
    easy = (normal & (sizes[2] < 2.0**1020) & (np.abs(c) < 2.0**1020)) | (high == 0) & ((a == 0) | (b == 0))
    result = np.where(finite & normal & easy, result, plain)
    for place in zip(*np.nonzero(finite & ~easy), strict=True):
        result[place] = _exact_fma(a[place], b[place], c[place])
    return result


def _two_product(a: ndarray, b: ndarray) -> tuple[ndarray, ndarray]:
    """a b rounded, and what the rounding lost (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves_f64(a), _halves_f64(b)
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _halves_f64(x: ndarray) -> tuple[ndarray, ndarray]:
    large = x * 134217729.0
    high = large - (large - x)
    return high, x - high


def _exact_fma(a: float64, b: float64, c: float64) -> float:
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return float(a * b + c)  # for the sign of zero
    try:
        return exact.numerator / exact.denominator  # Python rounds this once
    except OverflowError:
        return float(np.copysign(np.inf, float(exact > 0) - 0.5))


def halves(x: ndarray) -> tuple[ndarray, ndarray]:
    """The two elements of a 32-bit pair."""
    return (x & uint32(0xFFFF)).astype(uint16), (x >> uint32(16)).astype(uint16)


def pack(low: ndarray, high: ndarray) -> ndarray:
    """Two elements of 16 or 32 bits, in one of twice the bits."""
    bits = 8 * low.dtype.itemsize
    wide = {16: uint32, 32: uint64}[bits]
    low, high = (np.ascontiguousarray(x).view(f"u{bits // 8}").astype(wide) for x in (low, high))
    return low | (high << wide(bits))


def unpack(x: ndarray, kind: str) -> list[ndarray]:
    """The elements of ``x`` of a type with or without x2, in the element's own type."""
    if kind == "f32x2":
        return [
            (x & uint64(0xFFFFFFFF)).astype(uint32).view(float32),
            (x >> uint64(32)).astype(uint32).view(float32),
        ]
    if kind == "f16x2":
        return [half.view(float16) for half in halves(x)]
    return list(halves(x)) if kind == "bf16x2" else [x]


_EXACT = {  # on fp64, whose results are rounded to odd
    "add": odd_sum,
    "sub": lambda a, b: odd_sum(a, -b),
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: odd_sum(a * b, c),
}


def narrow(name: str, kind: str, *operands: ndarray, mode: str = "rn", relu: bool = False) -> ndarray:
    """add, sub, mul, fma, min and max of f16, bf16, f32 and their pairs, each element rounded once."""
    element = kind.removesuffix("x2")
    results = []
    for parts in zip(*(unpack(x, kind) for x in operands), strict=True):
        values = [decode(x, element) for x in parts]
        exact = (_EXACT[name] if name in _EXACT else EXTREMES[name])(*values)
        if name in _EXACT:
            exact = np.where(np.isfinite(exact), exact, _plain(name, values))
        if relu:
            exact = positive(exact)
        results.append(encode(exact, element, mode))
    return results[0] if len(results) == 1 else pack(*results)


def of_pairs(name: str, *operands: ndarray) -> ndarray:
    """The same of f32x2, in fewer operations."""
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma_f32}[name]
    parts = zip(*(unpack(x, "f32x2") for x in operands), strict=True)
    return pack(*(function(*elements) for elements in parts))


def positive(x: ndarray) -> ndarray:
    """.relu: negative numbers are 0; NaN stays."""
    return np.where(x <= 0, x.dtype.type(0), x)


def _plain(name: str, values: list[ndarray]) -> ndarray:
    """With infinities and NaN, where there is nothing to round."""
    a, b, *c = values
    return {"add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "fma": lambda: a * b + c[0]}[
        name
    ]()


def _number(a: ndarray, b: ndarray, extreme: ndarray) -> ndarray:
    """The extreme of two numbers; of a number and NaN the number. (numpy's fmin returns some signaling NaN.)"""
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, extreme))


def _minimum(a: ndarray, b: ndarray) -> ndarray:
    """-0 is below +0."""
    least = np.minimum(a, b)
    zero = (a == 0) & (b == 0)
    return _number(a, b, np.where(zero & (np.signbit(a) | np.signbit(b)), -np.abs(least), least))


def _maximum(a: ndarray, b: ndarray) -> ndarray:
    most = np.maximum(a, b)
    zero = (a == 0) & (b == 0)
    return _number(a, b, np.where(zero & ~(np.signbit(a) & np.signbit(b)), np.abs(most), most))


def _or_nan(function):
    def extreme(a: ndarray, b: ndarray) -> ndarray:
        nan = np.isnan(a) | np.isnan(b)
        return np.where(nan, a.dtype.type(np.nan), function(a, b))

    return extreme


EXTREMES = {"min": _minimum, "max": _maximum, "min.NaN": _or_nan(_minimum), "max.NaN": _or_nan(_maximum)}


# -----------------------------------------------------------------------------------------------------------
# Approximate functions: rounded correctly here, or as wrong as the ISA allows


def _last_place(y: ndarray) -> ndarray:
    return np.spacing(np.abs(y).astype(float32)).astype(float64)


ERRORS = {  # what the ISA allows: of an argument x, whose exact result is y
    "ex2": lambda x, y: 2 * _last_place(y),
    "lg2": lambda x, y: np.where((x > 0.5) & (x < 2), 2.0**-22, 2 * _last_place(y)),
    "rcp": lambda x, y: _last_place(y),
    "rsqrt": lambda x, y: 2.0**-22.9 * np.abs(y),
    "sqrt": lambda x, y: 2.0**-23 * np.abs(y),
    "sin": lambda x, y: np.full_like(y, 2.0**-20.5),  # in [-pi, pi]
    "cos": lambda x, y: np.full_like(y, 2.0**-20.5),
    "tanh": lambda x, y: 2.0**-11 * np.abs(y),
    "div": lambda x, y: 2 * _last_place(y),  # .full
}
_FUNCTIONS = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1.0 / x, "rsqrt": lambda x: 1.0 / np.sqrt(x), "sqrt": np.sqrt,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


def approximate(name: str, x: ndarray, ftz: bool, seed: int) -> ndarray:
    x = flush(x) if ftz else x
    result = inexact(name, x, _FUNCTIONS[name](x.astype(float64)), seed)
    return flush(result) if ftz else result


def inexact(name: str, x: ndarray, exact: ndarray, seed: int) -> ndarray:
    """fp64 to fp32, with a seed as far off as ERRORS allow: above or below, as a hash of the argument says."""
    if seed:
        mixed = (np.ascontiguousarray(x).view(uint32) ^ uint32(seed)) * uint32(2654435761)
        sign = 1.0 - 2.0 * ((mixed ^ mixed >> uint32(15)) >> uint32(9) & uint32(1))
        off = np.maximum(ERRORS[name](x, exact) - 0.5 * _last_place(exact), 0.0)  # before the rounding
        exact = np.where(np.isfinite(off) & (exact != 0), exact + sign * off, exact)
    return exact.astype(float32)


def gross(name: str, x: ndarray) -> ndarray:
    """rcp and rsqrt .approx.ftz.f64: of the upper 32 bits of a number the upper 32 bits of the result. Subnormal
    numbers are zero."""
    upper = np.ascontiguousarray(x).view(uint64) & uint64(0xFFFFFFFF00000000)
    value = np.where(np.abs(x) < 2.0**-1022, np.copysign(0.0, x), upper.view(float64))
    result = _FUNCTIONS[name](value)
    kept = (np.ascontiguousarray(result).view(uint64) & uint64(0xFFFFFFFF00000000)).view(float64)
    return np.where(np.isnan(x), x, np.where(np.abs(kept) < 2.0**-1022, np.copysign(0.0, kept), kept))


# -----------------------------------------------------------------------------------------------------------
# Conversions with integers


def to_integer(x: ndarray, to: type, mode: str) -> ndarray:
    """fp to an integer, clamped to its range. NaN is 0; in 64 bits, and from fp64, the highest bit alone."""
    limits = np.iinfo(to)
    value = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(float64))
    nan, low, high = np.isnan(value), value <= float(limits.min), value >= float(limits.max)
    result = np.where(nan | low | high, 0.0, value).astype(to)
    result = np.where(low, to(limits.min), np.where(high, to(limits.max), result))
    of_nan = 1 << (limits.bits - 1) if limits.bits == 64 or x.dtype == float64 else 0
    return np.where(nan, np.array(of_nan, f"u{limits.bits // 8}").view(to), result)


def from_integer(x: ndarray, kind: str, mode: str) -> ndarray:
    """An integer to fp, rounded once: 64 bits are truncated to fp64 with the last bit set first."""
    if kind == "f64" and mode == "rn":
        return x.astype(float64)
    value = x.astype(float64)
    if x.dtype.itemsize == 8:
        back = np.where(np.abs(value) < 2.0**63, value, 0.0).astype(int64).astype(x.dtype)
        top = np.abs(value) >= 2.0**63  # rounded up to 2^63 or 2^64, or of the upper half of uint64
        lost = np.where(top, _lost_at_the_top(x, value), (x - back).view(int64).astype(float64))
        value = to_odd(value, lost)
    return encode(value, kind, mode)


def _lost_at_the_top(x: ndarray, value: ndarray) -> ndarray:
    lost = [int(i) - int(v) for i, v in zip(x.ravel(), value.ravel(), strict=True)]
    return np.array(lost, float64).reshape(x.shape)


# -----------------------------------------------------------------------------------------------------------
# Integers


def divide(a: ndarray, b: ndarray) -> ndarray:
    """Truncated toward zero. Division by zero is undefined in the ISA; GPUs give all ones."""
    by_zero = b == 0
    safe = np.where(by_zero, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != a))
    return np.where(by_zero, _ones(a.dtype), quotient).astype(a.dtype)


def remainder(a: ndarray, b: ndarray) -> ndarray:
    by_zero = b == 0
    return np.where(by_zero, a, np.fmod(a, np.where(by_zero, b.dtype.type(1), b)))


def _ones(dtype: np.dtype) -> ndarray:
    return np.array(-1, f"i{dtype.itemsize}").view(dtype)


def high_product(a: ndarray, b: ndarray) -> ndarray:
    """The upper half of the whole product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)
    a, b = np.broadcast_arrays(a, b)
    unsigned_a, unsigned_b = a.view(uint64), b.view(uint64)
    low, half = uint64(0xFFFFFFFF), uint64(32)
    a0, a1, b0, b1 = unsigned_a & low, unsigned_a >> half, unsigned_b & low, unsigned_b >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    other = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, unsigned_b, uint64(0)) - np.where(b < 0, unsigned_a, uint64(0))
    return high.view(a.dtype)


def shift_left(a: ndarray, by: ndarray) -> ndarray:
    return np.where(by < a.dtype.itemsize * 8, a << _amount(by, a), a.dtype.type(0))


def shift_right(a: ndarray, by: ndarray) -> ndarray:
    """The sign of a signed type comes in."""
    bits = a.dtype.itemsize * 8
    beyond = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" else a.dtype.type(0)
    return np.where(by < bits, a >> _amount(by, a), beyond)


def _amount(by: ndarray, like: ndarray) -> ndarray:
    return np.minimum(by, uint32(like.dtype.itemsize * 8 - 1)).astype(like.dtype)


def funnel(low: ndarray, high: ndarray, by: ndarray, left: bool, wrap: bool) -> ndarray:
    """shf: 32 bits out of 64. wrap: by modulo 32; else at most 32."""
    by = (by & uint32(31) if wrap else np.minimum(by, uint32(32))).astype(uint64)
    both = pack(*np.broadcast_arrays(low, high))
    return ((both << by) >> uint64(32) if left else both >> by).astype(uint32)


def logic(a: ndarray, b: ndarray, c: ndarray, table: int) -> ndarray:
    """lop3: the bit of ``table`` whose number the three bits make."""
    result = a & uint32(0)
    for number in range(8):
        if table >> number & 1:
            terms = (x if number & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
            result = result | np.bitwise_and.reduce(np.broadcast_arrays(*terms))
    return result


def permute(a: ndarray, b: ndarray, selection: ndarray, mode: str = "") -> ndarray:
    """prmt: four of the eight bytes of b:a; a selector's bit 3 spreads the byte's sign instead."""
    a, b, selection = np.broadcast_arrays(a, b, selection)
    both = pack(a, b)
    result = np.zeros(a.shape, uint32)
    for place in range(4):
        chosen = _selector(selection, place, mode)
        byte = ((both >> (uint64(8) * (chosen & uint32(7)))) & uint64(0xFF)).astype(uint32)
        sign = (chosen & uint32(8)) != 0
        byte = np.where(sign, (byte >> uint32(7)) * uint32(0xFF), byte)
        result |= byte << uint32(8 * place)
    return result


def _selector(selection: ndarray, place: int, mode: str) -> ndarray:
    if not mode:
        return (selection >> uint32(4 * place)) & uint32(15)
    n = selection & uint32(3)
    at = uint32(place)
    return {
        "f4e": lambda: n + at,
        "b4e": lambda: (n - at) & uint32(7),
        "rc8": lambda: n,
        "ecl": lambda: np.maximum(n, at),
        "ecr": lambda: np.minimum(n, at),
        "rc16": lambda: (n & uint32(1)) * uint32(2) + uint32(place & 1),
    }[mode]()


def extract(a: ndarray, position: ndarray, length: ndarray) -> ndarray:
    """bfe: a field of bits; of a signed type its sign is spread, and lies at the top where the field goes beyond."""
    bits = 8 * a.dtype.itemsize
    position, length = position & uint32(0xFF), length & uint32(0xFF)
    field = shift_right(a, position)
    if a.dtype.kind == "u":
        return field & _low_bits(length, a.dtype)
    whole = length >= bits
    up = np.where(whole, uint32(0), uint32(bits) - length)
    spread = shift_right(shift_left(field, up), up)
    return np.where(length == 0, a.dtype.type(0), spread)


def insert(a: ndarray, into: ndarray, position: ndarray, length: ndarray) -> ndarray:
    """bfi"""
    position, length = position & uint32(0xFF), length & uint32(0xFF)
    field = shift_left(_low_bits(length, a.dtype), position)
    return (into & ~field) | (shift_left(a, position) & field)


def _low_bits(count: ndarray, dtype: np.dtype) -> ndarray:
    one = dtype.type(1)
    return shift_left(np.broadcast_to(one, count.shape), count) - one


def leading_zeros(x: ndarray) -> ndarray:
    result = np.full(x.shape, 8 * x.dtype.itemsize, uint32)
    for bit in range(8 * x.dtype.itemsize):
        result = np.where(
            (x >> x.dtype.type(bit)) & x.dtype.type(1), uint32(8 * x.dtype.itemsize - 1 - bit), result
        )
    return result


def top_bit(x: ndarray) -> ndarray:
    """bfind: the number of the highest bit that differs from the sign; none: all ones."""
    unsigned = np.where(x < 0, ~x, x).view(f"u{x.dtype.itemsize}")
    return uint32(8 * x.dtype.itemsize - 1) - leading_zeros(unsigned)


def reverse(x: ndarray) -> ndarray:
    octets = np.ascontiguousarray(x).view(uint8).reshape(*x.shape, x.dtype.itemsize)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")
    return np.packbits(bits[..., ::-1], axis=-1, bitorder="little").view(x.dtype).reshape(x.shape)


def clamp(x: ndarray, to: type) -> ndarray:
    """.sat of an integer: to the range of a type."""
    limits = np.iinfo(to)
    own = np.iinfo(x.dtype)
    return np.clip(x, max(limits.min, own.min), min(limits.max, own.max)).astype(to)

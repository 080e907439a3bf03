"""The instructions: for each name a function that translates its forms.

It takes what it knows from the :class:`Form` and writes lines to the block. Modifiers that it leaves are an error.
"""

import re
from collections.abc import Callable

from .parse import Pair, Unknown, Vector
from .translate import Form, Translator, kept, size_of

FORMS: dict[str, Callable[[Translator, Form], None]] = {}

FLOATS = ("f16", "bf16", "f32", "f64")
PAIRS = ("f16x2", "bf16x2")
DIRECTED = ("rz", "rm", "rp")
ROUNDINGS = ("rn", *DIRECTED)
TO_INTEGERS = ("rni", "rzi", "rmi", "rpi")
CACHES = (
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "volatile", "relaxed", "weak", "cta", "gpu", "sys",
    "L1::evict_first", "L1::evict_last", "L1::evict_normal", "L1::evict_unchanged", "L1::no_allocate",
    "L2::evict_first", "L2::evict_last", "L2::evict_normal", "L2::64B", "L2::128B", "L2::256B",
)  # fmt: skip


def form(*names: str):
    def register(function):
        FORMS.update(dict.fromkeys(names, function))
        return function

    return register


def _is_integer(kind: str) -> bool:
    return kind[0] in "usb" and "x2" not in kind and kind != "bf16"


# --- arithmetic


@form("add", "sub", "mul", "fma", "mad")
def _arithmetic(t: Translator, f: Form) -> None:
    if _is_integer(f.types[0]):
        _integer(t, f)
        return
    name = {"mad": "fma"}.get(f.name, f.name)
    target, *operands = f.take(4 if name == "fma" else 3)
    kind = f.types[0]
    mode, ftz, sat = f.one_of(*ROUNDINGS) or "rn", f.flag("ftz"), f.flag("sat")
    if len(f.types) == 2 and kind == "f32" and f.types[1] in ("f16", "bf16"):
        narrow = f.types[1]  # all operands but the last one
        values = [f"A.decode({t.read(x, narrow)}, {narrow!r}).astype(f32)" for x in operands[:-1]]
        values.append(t.read(operands[-1], "f32"))
    else:
        kind = f.type
        values = [t.read(x, kind) for x in operands]
    if kind in ("f16", "bf16", *PAIRS) or (kind == "f32" and mode != "rn"):
        if ftz or sat or (mode != "rn" and kind != "f32"):
            raise Unknown("flushing, saturation or directed rounding of this type")
        more = f", relu={f.flag('relu')}" if name == "fma" else ""
        t.write(target, f"A.narrow({name!r}, {kind!r}, {', '.join(values)}, mode={mode!r}{more})", kind)
        return
    if kind == "f32x2":
        if ftz or sat or mode != "rn":
            raise Unknown("flushing, saturation or directed rounding of this type")
        t.write(target, f"A.of_pairs({name!r}, {', '.join(values)})", kind)
        return
    if kind == "f64" and (mode != "rn" or ftz or sat):
        raise Unknown("directed rounding of fp64")
    if ftz:
        values = [f"A.flush({x})" for x in values]
    sign = {"add": " + ", "sub": " - ", "mul": " * "}.get(name)
    result = sign.join(values) if sign else f"A.fma_{kind}({', '.join(values)})"
    if ftz:
        result = f"A.flush({result})"
    t.write(target, f"A.saturate({result})" if sat else result, kind)


def _integer(t: Translator, f: Form) -> None:
    target, *operands = f.take(4 if f.name == "mad" else 3)
    kind = f.type.replace("b", "u")
    size = size_of(kind)
    if f.name in ("add", "sub"):
        a, b = (t.read(x, kind) for x in operands)
        sign = "+" if f.name == "add" else "-"
        if f.flag("sat"):
            if kind != "s32":
                raise Unknown("saturation of this type")
            t.write(target, f"A.clamp({a}.astype(s64) {sign} {b}, s32)", "s32")
        else:
            t.write(target, f"{a} {sign} {b}", kind)
        return
    part = f.one_of("lo", "hi", "wide")
    a, b = (t.read(x, kind) for x in operands[:2])
    wide = f"{kind[0]}{16 * size}"
    if part is None:
        raise Unknown("neither lo, hi nor wide")
    product = {
        "lo": f"{a} * {b}",
        "hi": f"A.high_product({a}, {b})",
        "wide": f"{a}.astype({wide}) * {b}.astype({wide})",
    }[part]
    result = wide if part == "wide" else kind
    if f.name == "mad":
        product += f" + {t.read(operands[2], result)}"
    t.write(target, product, result)


@form("div", "rem")
def _division(t: Translator, f: Form) -> None:
    target, a, b = f.take(3)
    kind = f.type
    a, b = t.read(a, kind), t.read(b, kind)
    if _is_integer(kind):
        t.write(target, f"A.{'divide' if f.name == 'div' else 'remainder'}({a}, {b})", kind)
        return
    ftz = f.flag("ftz")
    mode = f.one_of("rn", "full", "approx")
    if mode is None or f.name == "rem" or kind not in ("f32", "f64"):
        raise Unknown("division of this kind")
    if ftz:
        a, b = (t.let(f"A.flush({x})") for x in (a, b))
    quotient = f"{a} / {b}"
    if mode != "rn":
        quotient = f"A.inexact('div', {a}, {a}.astype(f64) / {b}, m.options.errors)"
    t.write(target, f"A.flush({quotient})" if ftz else quotient, kind)


@form("neg", "abs")
def _sign(t: Translator, f: Form) -> None:
    target, x = f.take(2)
    kind = f.type
    if kind in ("bf16", *PAIRS):
        bits = {"bf16": 0x8000}.get(kind, 0x80008000)
        change = (
            f"^ {kept(kind)}({bits})"
            if f.name == "neg"
            else f"& {kept(kind)}({bits ^ (0xFFFF if kind == 'bf16' else 0xFFFFFFFF)})"
        )
        t.write(target, f"{t.read(x, kind)} {change}", kind)
        return
    x = t.read(x, kind)
    x = f"A.flush({x})" if f.flag("ftz") else x
    t.write(target, f"-{x}" if f.name == "neg" else f"np.abs({x})", kind)


@form("min", "max")
def _extreme(t: Translator, f: Form) -> None:
    target, *operands = f.operands
    kind = f.type
    values = [t.read(x, kind) for x in operands]
    if _is_integer(kind):
        name = f"np.{f.name}imum"
    else:
        name = f"{f.name}.NaN" if f.flag("NaN") else f.name
        if kind in ("f16", "bf16", *PAIRS):
            t.write(target, f"A.narrow({name!r}, {kind!r}, {', '.join(values)})", kind)
            return
        name = f"A.EXTREMES[{name!r}]"
        if f.flag("ftz"):
            values = [f"A.flush({x})" for x in values]
    result = values[0]
    for value in values[1:]:
        result = f"{name}({result}, {value})"
    t.write(target, result, kind)


@form("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh")
def _function(t: Translator, f: Form) -> None:
    target, x = f.take(2)
    kind = f.type
    x, ftz, mode = t.read(x, kind), f.flag("ftz"), f.one_of("approx", "rn")
    if mode == "approx" and kind == "f32":
        t.write(target, f"A.approximate({f.name!r}, {x}, {ftz}, m.options.errors)", kind)
    elif mode == "approx" and kind == "f64" and f.name == "rsqrt" and not ftz:
        t.write(target, f"1.0 / np.sqrt({x})", kind)
    elif mode == "approx" and kind == "f64" and f.name in ("rcp", "rsqrt"):
        t.write(target, f"A.gross({f.name!r}, {x})", kind)
    elif mode == "rn" and f.name in ("rcp", "sqrt") and kind in ("f32", "f64"):
        x = f"A.flush({x})" if ftz else x
        result = f"np.sqrt({x})" if f.name == "sqrt" else f"{kind}(1) / {x}"
        t.write(target, f"A.flush({result})" if ftz else result, kind)
    else:
        raise Unknown("this function of this type")


@form("copysign")
def _copysign(t: Translator, f: Form) -> None:
    target, a, b = f.take(3)
    t.write(target, f"np.copysign({t.read(b, f.type)}, {t.read(a, f.type)})", f.type)


@form("testp")
def _test(t: Translator, f: Form) -> None:
    target, x = f.take(2)
    x = t.read(x, f.type)
    tests = {
        "finite": "np.isfinite({})",
        "infinite": "np.isinf({})",
        "notanumber": "np.isnan({})",
        "number": "~np.isnan({})",
    }
    t.write(target, tests[f.one_of(*tests) or "?"].format(x), "pred")


# --- bits


@form("and", "or", "xor", "not")
def _logic(t: Translator, f: Form) -> None:
    target, *operands = f.take(2 if f.name == "not" else 3)
    values = [t.read(x, f.type) for x in operands]
    sign = {"and": " & ", "or": " | ", "xor": " ^ "}.get(f.name)
    t.write(target, sign.join(values) if sign else f"~{values[0]}", f.type)


@form("cnot")
def _is_zero(t: Translator, f: Form) -> None:
    target, x = f.take(2)
    t.write(target, f"({t.read(x, f.type)} == 0).astype({kept(f.type)})", f.type)


@form("lop3")
def _any_logic(t: Translator, f: Form) -> None:
    target, a, b, c, table = f.take(5)
    a, b, c = (t.read(x, f.type) for x in (a, b, c))
    t.write(target, f"A.logic({a}, {b}, {c}, {int(table, 0)})", f.type)


@form("shl", "shr")
def _shift(t: Translator, f: Form) -> None:
    target, x, by = f.take(3)
    x = t.read(x, f.type)
    if re.fullmatch(r"\d+", by) and int(by) < 8 * size_of(f.type):
        amount = t.read(by, f"u{8 * size_of(f.type)}")
        amount = f"{amount}.view({kept(f.type)})"
        t.write(target, f"{x} {'<<' if f.name == 'shl' else '>>'} {amount}", f.type)
        return
    t.write(target, f"A.shift_{'left' if f.name == 'shl' else 'right'}({x}, {t.read(by, 'u32')})", f.type)


@form("shf")
def _funnel(t: Translator, f: Form) -> None:
    target, *operands = f.take(4)
    low, high, by = (t.read(x, "u32") for x in operands)
    side, mode = f.one_of("l", "r"), f.one_of("wrap", "clamp")
    if side is None or mode is None or f.type != "b32":
        raise Unknown("this funnel shift")
    t.write(target, f"A.funnel({low}, {high}, {by}, {side == 'l'}, {mode == 'wrap'})", "b32")


@form("prmt")
def _permute(t: Translator, f: Form) -> None:
    target, *operands = f.take(4)
    mode = f.one_of("f4e", "b4e", "rc8", "ecl", "ecr", "rc16") or ""
    values = ", ".join(t.read(x, "u32") for x in operands)
    t.write(target, f"A.permute({values}, {mode!r})", f.type)


@form("bfe")
def _extract(t: Translator, f: Form) -> None:
    target, x, position, length = f.take(4)
    values = f"{t.read(x, f.type)}, {t.read(position, 'u32')}, {t.read(length, 'u32')}"
    t.write(target, f"A.extract({values})", f.type)


@form("bfi")
def _insert(t: Translator, f: Form) -> None:
    target, a, b, position, length = f.take(5)
    values = [t.read(a, f.type), t.read(b, f.type), t.read(position, "u32"), t.read(length, "u32")]
    t.write(target, f"A.insert({', '.join(values)})", f.type)


@form("popc", "clz", "bfind")
def _count(t: Translator, f: Form) -> None:
    target, x = f.take(2)
    call = {
        "popc": "np.bitwise_count({}).astype(u32)",
        "clz": "A.leading_zeros({})",
        "bfind": "A.top_bit({})",
    }
    t.write(target, call[f.name].format(t.read(x, f.type)), "u32")


@form("brev")
def _reverse(t: Translator, f: Form) -> None:
    target, x = f.take(2)
    t.write(target, f"A.reverse({t.read(x, f.type)})", f.type)


# --- conversions


@form("cvt")
def _convert(t: Translator, f: Form) -> None:
    mode = f.one_of(*ROUNDINGS, *TO_INTEGERS, "rna")
    ftz, sat, relu = f.flag("ftz"), f.flag("sat"), f.flag("relu")
    to, source = f.types
    if to in PAIRS:
        target, high, low = f.take(3)
        if source != "f32" or mode not in ("rn", "rz") or ftz or sat:
            raise Unknown("conversion to a pair")
        parts = [_encoded(t.read(x, "f32"), "f32", to.removesuffix("x2"), mode, relu) for x in (low, high)]
        t.write(target, f"A.pack({', '.join(parts)})", to)
        return
    target, x = f.take(2)
    x = t.read(x, source)
    x = f"A.flush({x})" if ftz and source == "f32" else x
    if _is_integer(source) and _is_integer(to):
        result = f"A.clamp({x}, {kept(to)})" if sat else f"{x}.astype({kept(to)})"
    elif _is_integer(to):
        if mode not in TO_INTEGERS:
            raise Unknown("no rounding to an integer")
        value = f"A.bf16_to_f32({x})" if source == "bf16" else x
        result = f"A.to_integer({value}, {kept(to)}, {mode!r})"
    elif _is_integer(source):
        if mode not in ROUNDINGS or relu or (to == "f64" and mode != "rn"):
            raise Unknown("this rounding to a float")
        result = f"A.from_integer({x}, {to!r}, {mode!r})"
    else:
        result = _float(x, source, to, mode, relu)
        result = f"A.flush({result})" if ftz and to == "f32" else result
    if sat and not _is_integer(to):
        if to == "bf16":
            raise Unknown("saturation of bf16")
        result = f"A.saturate({result})"
    t.write(target, result, to)


def _float(x: str, source: str, to: str, mode: str | None, relu: bool) -> str:
    """The expression of a conversion from float to float."""
    if mode in TO_INTEGERS:
        if source != to:
            raise Unknown("rounding to an integer of another type")
        function = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[mode]
        return f"A.encode(np.{function}(A.decode({x}, {source!r})), {to!r})"
    widens = size_of(to) > size_of(source) and to != "tf32"
    if widens or (to == source and mode is None):
        if relu:
            raise Unknown("relu of this conversion")
        if to == source:
            return x
        return f"A.bf16_to_f32({x}).astype({to})" if source == "bf16" else f"{x}.astype({to})"
    if mode is None:
        raise Unknown("no rounding")
    return _encoded(x, source, to, mode, relu)


def _encoded(x: str, source: str, to: str, mode: str, relu: bool) -> str:
    if mode == "rn" and source == "f32" and to == "bf16" and not relu:
        return f"A.f32_to_bf16({x})"
    if mode == "rna" and to != "tf32":
        raise Unknown("this rounding of this type")
    value = f"A.decode({x}, {source!r})"
    return f"A.encode({f'A.positive({value})' if relu else value}, {to!r}, {mode!r})"


@form("cvta")
def _generic(t: Translator, f: Form) -> None:
    """Global addresses are the same in generic form; of other spaces the machine has no generic form."""
    target, x = f.take(2)
    if not f.flag("global"):
        raise Unknown("generic addresses")
    f.ignore("to")
    t.write(target, t.read(x, f.type), f.type)


# --- comparison, selection, moves

_SIGNS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_UNORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}


@form("setp")
def _compare(t: Translator, f: Form) -> None:
    kind = f.type
    target, a, b, *rest = f.operands
    comparison = f.one_of(*_SIGNS, *_UNORDERED, "num", "nan")
    boolean, ftz = f.one_of("and", "or", "xor"), f.flag("ftz")
    if comparison is None or len(rest) != (boolean is not None):
        raise Unknown("this comparison")
    a, b = t.read(a, kind), t.read(b, kind)
    if kind in PAIRS:
        if boolean or not isinstance(target, Pair):
            raise Unknown("this comparison of pairs")
        for k, one in enumerate(target):
            x, y = (f"A.decode(A.unpack({v}, {kind!r})[{k}], {kind[:-2]!r})" for v in (a, b))
            t.write(one, _compared(t.let(x), t.let(y), comparison), "pred")
        return
    if kind == "bf16":
        a, b = (t.let(f"A.bf16_to_f32({x})") for x in (a, b))
    if ftz:
        a, b = (t.let(f"A.flush({x})") for x in (a, b))
    result = f"({a} {_SIGNS[comparison]} {b})" if _is_integer(kind) else _compared(a, b, comparison)
    result = t.let(result)
    opposite = f"~{result}"
    if boolean:
        sign = {"and": "&", "or": "|", "xor": "^"}[boolean]
        other = t.read(rest[0], "pred")
        result, opposite = f"{result} {sign} {other}", f"~{result} {sign} {other}"
    if isinstance(target, Pair):
        t.write(target.second, opposite, "pred")
        target = target.first
    t.write(target, result, "pred")


def _compared(a: str, b: str, comparison: str) -> str:
    """NaN makes ordered comparisons of floats false, ne among them, and unordered ones true."""
    if comparison in ("num", "nan"):
        return f"{'~' if comparison == 'num' else ''}(np.isnan({a}) | np.isnan({b}))"
    if comparison == "ne":
        return f"(({a} < {b}) | ({a} > {b}))"
    if comparison in ("eq", "lt", "le", "gt", "ge"):
        return f"({a} {_SIGNS[comparison]} {b})"
    if comparison == "neu":
        return f"({a} != {b})"
    if comparison in _UNORDERED:
        return f"(({a} {_UNORDERED[comparison]} {b}) | np.isnan({a}) | np.isnan({b}))"
    raise Unknown("this comparison of floats")


@form("selp")
def _select(t: Translator, f: Form) -> None:
    target, a, b, p = f.take(4)
    values = f"{t.read(p, 'pred')}, {t.read(a, f.type)}, {t.read(b, f.type)}"
    t.write(target, f"np.where({values})", f.type)


@form("mov")
def _move(t: Translator, f: Form) -> None:
    target, source = f.take(2)
    kind = f.type
    if isinstance(target, Vector):
        part = f"u{8 * size_of(kind) // len(target.parts)}"
        x = t.read(source, f"u{8 * size_of(kind)}")
        for k, one in enumerate(target.parts):
            t.write(
                one, f"({x} >> {kept(f'u{8 * size_of(kind)}')}({8 * size_of(part) * k})).astype({part})", part
            )
    elif isinstance(source, Vector):
        part, whole = f"u{8 * size_of(kind) // len(source.parts)}", f"u{8 * size_of(kind)}"
        terms = [
            f"({t.read(x, part)}.astype({whole}) << {whole}({8 * size_of(part) * k}))"
            for k, x in enumerate(source.parts)
            if x != "_"
        ]
        t.write(target, " | ".join(terms), whole)
    elif not t.copy(target, source):
        t.write(target, t.read(source, kind), kind)


# --- memory


def _space(f: Form) -> str:
    space = f.one_of("global", "shared", "shared::cta", "local", "param")
    if space is None:
        raise Unknown("generic addresses")
    return space.removesuffix("::cta")


def _count_of(f: Form) -> int:
    return int((f.one_of("v2", "v4", "v8") or "v1")[1:])


@form("ld")
def _load(t: Translator, f: Form) -> None:
    space, count, kind = _space(f), _count_of(f), f.type
    f.ignore(*CACHES)
    if f.flag("L2::cache_hint"):
        f.operands.pop()
    target, address = f.take(2)
    parts = t.parts(target)
    if len(parts) != count:
        raise Unknown(f"{len(parts)} results")
    if space == "param":
        for k, one in enumerate(parts):
            t.write(
                one,
                f"m.parameter({address.base!r}, {address.offset + k * size_of(kind)}, {kept(kind)})",
                kind,
            )
        return
    unsigned = f"u{8 * size_of(kind)}"
    found = t.let(f"m.load({space!r}, {t.address(address)}, {t.mask}, {size_of(kind)}, {count}, {t.site})")
    for k, one in enumerate(parts):
        t.write(one, f"{found}[{k}].view({kept(kind)})" if kept(kind) != unsigned else f"{found}[{k}]", kind)


@form("st")
def _store(t: Translator, f: Form) -> None:
    space, count, kind = _space(f), _count_of(f), f.type
    f.ignore(*CACHES)
    if f.flag("L2::cache_hint"):
        f.operands.pop()
    address, source = f.take(2)
    values = [t.read(x, f"u{8 * size_of(kind)}") for x in t.parts(source)]
    if len(values) != count:
        raise Unknown(f"{len(values)} values")
    t.line(
        f"m.store({space!r}, {t.address(address)}, ({', '.join(values)},), {t.mask}, {size_of(kind)}, {t.site})"
    )


@form("createpolicy")
def _policy(t: Translator, f: Form) -> None:
    """What a cache should keep: nothing here."""
    f.ignore("fractional", *CACHES)
    t.write(f.operands[0], t.constant(bytes(8), "u64"), f.type)


@form("atom", "red")
def _atomic(t: Translator, f: Form) -> None:
    space, kind = _space(f), f.type
    f.ignore("relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "noftz")
    name = f.one_of("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    if name in (None, "inc", "dec") or (kind in ("bf16", "f16", *PAIRS) and name != "add"):
        raise Unknown("this atomic operation")
    target, address, *operands = f.operands if f.name == "atom" else ("_", *f.operands)
    values = ", ".join(t.read(x, kind) for x in operands)
    call = f"m.atomic({space!r}, {name!r}, {t.address(address)}, ({values},), {t.mask}, {kind!r}, {t.site})"
    if f.name == "atom":
        t.write(target, call, kind)
    else:
        t.line(call)


@form("fence", "membar")
def _fence(t: Translator, f: Form) -> None:
    """Accesses happen in the order of the program here; whether others may rely on it, races say."""
    f.ignore("proxy", "async", "shared::cta", "global", "acq_rel", "sc", "cta", "gpu", "sys", "gl", "cluster")


@form("cp")
def _copy(t: Translator, f: Form) -> None:
    if not f.flag("async") or f.flag("bulk"):
        raise Unknown("this copy")
    if f.flag("commit_group"):
        t.line(f"m.commit_copies({t.mask})")
    elif f.flag("wait_group"):
        t.line(f"m.wait_copies({int(f.take(1)[0], 0)}, {t.mask}, {t.site})")
    elif f.flag("wait_all"):
        t.line(f"m.commit_copies({t.mask})")
        t.line(f"m.wait_copies(0, {t.mask}, {t.site})")
    else:
        f.ignore("ca", "cg", "L2::64B", "L2::128B", "L2::256B")
        if f.flag("L2::cache_hint"):
            f.operands.pop()
        if not (f.flag("shared", "shared::cta") and f.flag("global")):
            raise Unknown("copy between these spaces")
        to, source, size, *rest = f.operands
        read = t.read(rest[0], "u32") if rest else "None"
        if len(rest) > 1:
            raise Unknown("operand of a copy")
        t.line(f"m.copy({t.address(to)}, {t.address(source)}, {int(size, 0)}, {read}, {t.mask}, {t.site})")


# --- warps and programs


@form("bar", "barrier")
def _barrier(t: Translator, f: Form) -> None:
    if f.flag("warp"):
        if not f.flag("sync"):
            raise Unknown("this barrier of a warp")
        t.line(f"m.warp_barrier({t.read(f.take(1)[0], 'u32')}, {t.mask}, {t.site})")
        return
    f.ignore("cta", "aligned")
    number, *count = f.operands
    if not f.flag("sync") or number != "0" or any(int(x) != t.kernel.threads for x in count) or t.guard:
        raise Unknown("a barrier of some threads")
    t.block.ends_with = "bar"


@form("shfl")
def _shuffle(t: Translator, f: Form) -> None:
    target, *operands = f.take(5)
    mode = f.one_of("up", "down", "bfly", "idx")
    if not f.flag("sync") or mode is None or f.type != "b32":
        raise Unknown("this shuffle")
    values = ", ".join(t.read(x, "u32") for x in operands)
    found = t.let(f"m.shuffle({mode!r}, {values}, {t.mask}, {t.site})")
    if isinstance(target, Pair):
        t.write(target.second, f"{found}[1]", "pred")
        target = target.first
    t.write(target, f"{found}[0]", "u32")


@form("redux")
def _reduce(t: Translator, f: Form) -> None:
    target, x, members = f.take(3)
    name = f.one_of("add", "min", "max", "and", "or", "xor")
    if not f.flag("sync") or name is None:
        raise Unknown("this reduction")
    magnitude = f.flag("abs")
    name = f"{name}.NaN" if f.flag("NaN") else name
    x = t.read(x, f.type)
    x = f"np.abs({x})" if magnitude else x
    t.write(target, f"m.reduce({name!r}, {x}, {t.read(members, 'u32')}, {t.mask}, {t.site})", f.type)


@form("vote")
def _vote(t: Translator, f: Form) -> None:
    target, p, members = f.take(3)
    mode = f.one_of("all", "any", "uni", "ballot")
    if not f.flag("sync") or mode is None:
        raise Unknown("this vote")
    t.write(
        target, f"m.vote({mode!r}, {t.read(p, 'pred')}, {t.read(members, 'u32')}, {t.mask}, {t.site})", f.type
    )


@form("activemask")
def _active(t: Translator, f: Form) -> None:
    t.write(f.take(1)[0], f"m.active({t.mask})", f.type)


@form("elect")
def _elect(t: Translator, f: Form) -> None:
    target, members = f.take(2)
    if not f.flag("sync") or not isinstance(target, Pair):
        raise Unknown("this election")
    found = t.let(f"m.elect({t.read(members, 'u32')}, {t.mask}, {t.site})")
    t.write(target.first, f"{found}[0]", "u32")
    t.write(target.second, f"{found}[1]", "pred")


# --- matrices


def _shape(f: Form) -> str:
    shape = next((m for m in f.modifiers if re.fullmatch(r"m\d+n\d+(k\d+)?", m)), None)
    if shape is None:
        raise Unknown("no shape")
    f.modifiers.remove(shape)
    return shape


@form("ldmatrix", "stmatrix")
def _matrices(t: Translator, f: Form) -> None:
    shape, count = _shape(f), int((f.one_of("x1", "x2", "x4") or "x0")[1:])
    transposed, _ = f.flag("trans"), f.ignore("sync", "aligned")
    if shape != "m8n8" or f.type != "b16" or not count or not f.flag("shared", "shared::cta"):
        raise Unknown("these matrices")
    registers, address = f.take(2) if f.name == "ldmatrix" else reversed(f.take(2))
    registers = t.parts(registers)
    if f.name == "ldmatrix":
        found = t.let(f"m.load_matrices({t.address(address)}, {count}, {transposed}, {t.mask}, {t.site})")
        for k, one in enumerate(registers):
            t.write(one, f"{found}[{k}]", "u32")
    else:
        values = ", ".join(t.read(x, "u32") for x in registers)
        t.line(f"m.store_matrices({t.address(address)}, ({values},), {transposed}, {t.mask}, {t.site})")


@form("mma")
def _product(t: Translator, f: Form) -> None:
    shape = _shape(f)
    f.ignore("sync", "aligned")
    if not (f.flag("row") and f.flag("col")):
        raise Unknown("this layout")
    target, a, b, c = f.take(4)
    result, left, right, sum_ = f.types
    if left != right or result != sum_ or result not in ("f32", "f64"):
        raise Unknown("a product of these types")
    operand = "f64" if left == "f64" else "u32"
    a, b = (f"({', '.join(t.read(x, operand) for x in t.parts(v))},)" for v in (a, b))
    c = f"({', '.join(t.read(x, result) for x in t.parts(c))},)"
    found = t.let(f"m.product({shape!r}, {left!r}, {a}, {b}, {c}, {t.mask}, {t.site})")
    for k, one in enumerate(t.parts(target)):
        t.write(one, f"{found}[{k}]", result)


@form("wgmma")
def _warpgroup(t: Translator, f: Form) -> None:
    f.ignore("sync", "aligned")
    if f.flag("fence"):
        t.line(f"m.fence_products({t.mask}, {t.site})")
    elif f.flag("commit_group"):
        t.line(f"m.commit_products({t.mask}, {t.site})")
    elif f.flag("wait_group"):
        t.line(f"m.wait_products({int(f.take(1)[0], 0)}, {t.mask}, {t.site})")
    elif f.flag("mma_async"):
        _warpgroup_product(t, f)
    else:
        raise Unknown("this instruction")


def _warpgroup_product(t: Translator, f: Form) -> None:
    shape = _shape(f)
    result, left, right = f.types
    if result != "f32" or left != right:
        raise Unknown("a product of these types")
    target, a, b, accumulates, *signs = f.operands
    signs = [int(x) for x in signs]
    scales, transposed = signs[:2], signs[2:]
    registers = isinstance(a, Vector)
    expected = 0 if left == "tf32" else 1 if registers else 2
    if len(transposed) != expected:
        raise Unknown("operands of this product")
    a_expression = f"({', '.join(t.read(x, 'u32') for x in a.parts)},)" if registers else t.read(a, "u64")
    a_transposed = bool(transposed[0]) if len(transposed) == 2 else False
    b_transposed = bool(transposed[-1]) if transposed else False
    sums = ", ".join(t.read(x, "f32") for x in target.parts)
    found = t.let(
        f"m.warpgroup_product({shape!r}, {left!r}, {a_expression}, {t.read(b, 'u64')}, ({sums},), "
        f"{t.read(accumulates, 'pred')}, {scales!r}, {(a_transposed, b_transposed)!r}, {t.mask}, {t.site})"
    )
    for k, one in enumerate(target.parts):
        t.write(one, f"{found}[{k}]", "f32")


# --- control


@form("bra", "ret", "exit", "trap")
def _jump(t: Translator, f: Form) -> None:
    t.block.ends_with = "ret" if f.name == "exit" else f.name
    if f.name == "bra":
        f.ignore("uni")
        t.block.target = t.kernel.block_of(f.take(1)[0], f.instruction.scopes)
    t.block.result = t.guard or "None"


@form("griddepcontrol")
def _dependent(t: Translator, f: Form) -> None:
    """Launches run one after another."""
    f.ignore("wait", "launch_dependents")

"""Basic blocks of PTX, each translated once to a Python function over numpy arrays.

A register is an array that broadcasts to [programs, threads]: a value that all threads share stays one number. Between
blocks a register is unsigned; within one a value keeps the type it was computed in. The source of a block is

    def block(m, R, q): ...

with the machine ``m`` (:class:`.execute.Run`), the registers ``R`` and the mask ``q`` of the threads that run it, None
if all do. It returns the predicate of its last instruction. Registers of threads outside of the mask keep their values.

Each form of an instruction is a function of :mod:`.instructions`. What it does not take from the instruction is
unknown, and an error: nothing is ignored because nobody looked.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from . import arithmetic
from .parse import Address, Instruction, Kernel, Operand, Unknown, Vector

NUMPY = {
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "s8": np.int8, "s16": np.int16,
    "s32": np.int32, "s64": np.int64, "f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
_KEPT_AS = {"bf16": "u16", "f16x2": "u32", "bf16x2": "u32", "f32x2": "u64", "tf32": "u32"}
TYPES = {*NUMPY, *_KEPT_AS, "b8", "b16", "b32", "b64"}

_SPECIAL = {
    "%tid.x": "m.thread", "%ntid.x": "m.threads", "%laneid": "m.lane", "%warpid": "m.warp",
    **{f"%ctaid.{axis}": f"m.program[{i}]" for i, axis in enumerate("xyz")},
    **{f"%nctaid.{axis}": f"m.grid[{i}]" for i, axis in enumerate("xyz")},
    **{f"%tid.{axis}": "m.zero" for axis in "yz"}, **{f"%ntid.{axis}": "m.one" for axis in "yz"},
    **{f"%lanemask_{side}": f"m.lanes({side!r})" for side in ("eq", "lt", "le", "gt", "ge")},
}  # fmt: skip


def kept(kind: str) -> str:
    """The type of the array that holds values of a PTX type."""
    kind = _KEPT_AS.get(kind, kind)
    return "u" + kind[1:] if kind[0] == "b" else kind


def size_of(kind: str) -> int:
    return np.dtype(NUMPY[kept(kind)]).itemsize


class Form:
    """One instruction, of which its translation takes what it knows."""

    def __init__(self, instruction: Instruction):
        self.instruction = instruction
        self.name, *modifiers = instruction.opcode.split(".")
        self.types = [m for m in modifiers if m in TYPES]
        self.modifiers = [m for m in modifiers if m not in TYPES]
        self.operands = list(instruction.operands)

    @property
    def type(self) -> str:
        if len(self.types) != 1:
            raise Unknown(f"{len(self.types)} types")
        return self.types[0]

    def flag(self, *names: str) -> bool:
        """Whether one of these modifiers is there."""
        return self.one_of(*names) is not None

    def one_of(self, *names: str) -> str | None:
        found = next((m for m in self.modifiers if m in names), None)
        if found is not None:
            self.modifiers.remove(found)
        return found

    def ignore(self, *names: str) -> None:
        """Modifiers that change nothing here: caches, scopes of what is anyway in order."""
        self.modifiers = [m for m in self.modifiers if m not in names]

    def take(self, number: int) -> list[Operand]:
        if len(self.operands) != number:
            raise Unknown(f"{len(self.operands)} operands")
        return self.operands


@dataclass
class Block:
    """What runs, and what follows."""

    instructions: list[Instruction]
    ends_with: str = ""  # bra, ret, trap, bar; "": the next block follows
    target: int = -1
    lines: list[str] = field(default_factory=list)
    sites: list[int] = field(default_factory=list)  # the instruction of each line
    changed: dict[str, str] = field(default_factory=dict)  # register: the variable that it is in the end
    result: str = "None"
    name: str = ""
    source: str = ""
    space: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def function(self) -> Callable[..., Any]:
        """Made when it first runs, as many blocks never do."""
        found: dict[str, Any] = {}
        exec(compile(self.source, self.name, "exec"), self.space, found)
        return found["block"]

    def site_of(self, line: int) -> int:
        """The instruction that a line of the source belongs to; of the last lines the last one."""
        return self.sites[min(line - 2, len(self.sites) - 1)]

    def opcodes(self) -> Counter[str]:
        return Counter(instruction.opcode for instruction in self.instructions)


class Translator:
    """``blocks`` of a kernel. ``sites``: its instructions by the number that a block gives to the machine."""

    def __init__(self, kernel: Kernel, addresses: dict[str, int] | None = None):
        from .instructions import FORMS

        self.forms, self.kernel, self.addresses = FORMS, kernel, addresses or {}
        self.number_of = {name: i for i, name in enumerate(kernel.registers)}
        self.space: dict[str, Any] = {"np": np, "A": arithmetic, "merge": merge, "also": also, **NUMPY}
        self._constants: dict[tuple[str, int], str] = {}
        self.sites: list[Instruction] = []
        self.exposed: set[str] = set()  # registers that a block reads before it writes them
        self.blocks = [self._translate(instructions) for instructions in kernel.blocks]
        for number, block in enumerate(self.blocks):
            self._finish(block, number)

    # --- blocks

    def _translate(self, instructions: list[Instruction]) -> Block:
        self.block = Block(instructions)
        self.values: dict[str, tuple[str, str]] = {}  # register: variable, type
        self._views: dict[tuple[str, str], str] = {}
        self.variables = 0
        for instruction in instructions:
            self.sites.append(instruction)
            self.guard, self.mask = None, "q"
            try:
                self._instruction(instruction)
            except (Unknown, KeyError, ValueError, IndexError) as error:
                raise Unknown(f"{self.kernel.where(instruction)}: {error}") from error
        for name in self.block.changed:
            self.block.changed[name] = self.read(name, self._canonical(name))
        return self.block

    def _instruction(self, instruction: Instruction) -> None:
        form = Form(instruction)
        if instruction.guard:
            self.guard = self.let(self.read(instruction.guard, "pred"))
            self.mask = self.let(f"also(q, {self.guard})")
        if form.name not in self.forms:
            raise Unknown("this instruction is missing")
        self.forms[form.name](self, form)
        if form.modifiers:
            raise Unknown(f"modifier {', '.join(form.modifiers)}")

    def _finish(self, block: Block, number: int) -> None:
        lines = list(block.lines)
        for name, variable in block.changed.items():
            if name in self.exposed:
                place = f"R[{self.number_of[name]}]"
                lines.append(f"{place} = {variable} if q is None else merge(q, {variable}, {place})")
        body = "\n    ".join([*lines, f"return {block.result}"])
        block.source = f"def block(m, R, q):\n    {body}\n"
        block.name, block.space = f"<{self.kernel.name}, block {number}>", self.space

    # --- what instructions write

    @property
    def site(self) -> int:
        return len(self.sites) - 1

    def line(self, text: str) -> None:
        self.block.lines.append(text)
        self.block.sites.append(self.site)

    def let(self, expression: str) -> str:
        """A new variable of this value."""
        self.variables += 1
        name = f"v{self.variables}"
        self.line(f"{name} = {expression}")
        return name

    def read(self, operand: Operand, kind: str) -> str:
        """A variable that holds an operand, as an array of this type."""
        if not isinstance(operand, str):
            raise Unknown(f"operand {operand}")
        if operand.startswith("!"):
            return self.let(f"~{self.read(operand[1:], 'pred')}")
        kind = kept(kind)
        if operand in self.kernel.registers:
            return self._viewed(*self._value(operand), kind)
        if operand in _SPECIAL:
            return self._viewed(self.let(_SPECIAL[operand]), "u32", kind)
        if operand.startswith(("%clock", "%")):
            raise Unknown(f"special register {operand}")
        return self.constant(self._number(operand, kind), kind)

    def width(self, operand: str) -> str:
        """The unsigned type of a register, or of an address."""
        if operand in self.kernel.registers:
            return self._canonical(operand)
        return "u32" if operand in self.kernel.shared else "u64"

    def _value(self, register: str) -> tuple[str, str]:
        if register not in self.values:
            self.exposed.add(register)
            name = self.let(f"R[{self.number_of[register]}]")
            self.values[register] = name, self._canonical(register)
        return self.values[register]

    def _canonical(self, register: str) -> str:
        return kept(self.kernel.registers[register])

    def _viewed(self, name: str, has: str, wants: str) -> str:
        if has == wants:
            return name
        if (name, wants) not in self._views:
            old, new = size_of(has), size_of(wants)
            if new > old or "pred" in (has, wants):
                raise Unknown(f"{wants} in a register of {has}")
            if new == old:
                expression = f"{name}.view({wants})"
            else:  # the lower bits
                unsigned = name if has[0] == "u" else f"{name}.view(u{8 * old})"
                expression = f"{unsigned}.astype(u{8 * new})" + (f".view({wants})" if wants[0] != "u" else "")
            self._views[name, wants] = self.let(expression)
        return self._views[name, wants]

    def _number(self, text: str, kind: str) -> bytes:
        size = size_of(kind)
        if text in self.kernel.shared or text in self.kernel.local or text in self.addresses:
            spaces = self.kernel.shared if text in self.kernel.shared else self.kernel.local
            value = spaces[text].offset if text in spaces else self.addresses[text]
        elif text[:2] in ("0f", "0F", "0d", "0D"):
            bits = int(text[2:], 16)
            value = np.array(bits, "u4" if text[1] in "fF" else "u8").view("f4" if text[1] in "fF" else "f8")
            if kind[0] == "f":
                return value.astype(NUMPY[kind]).tobytes()
            value = bits
        elif "." in text:
            return np.array(float(text), NUMPY[kind]).tobytes()
        else:
            value = int(text.rstrip("U"), 0)
        if kind == "pred":
            return bytes([value != 0])
        if kind[0] == "f":
            return np.array(value, NUMPY[kind]).tobytes()
        return (value % (1 << 8 * size)).to_bytes(size, "little")

    def constant(self, raw: bytes, kind: str) -> str:
        """An array of one element."""
        key = kind, int.from_bytes(raw, "little")
        if key not in self._constants:
            name = f"K{len(self._constants)}"
            self._constants[key] = name
            self.space[name] = np.frombuffer(raw, NUMPY[kind]).reshape(1, 1)
        return self._constants[key]

    def address(self, operand: Operand) -> str:
        if not isinstance(operand, Address):
            raise Unknown(f"address {operand}")
        base = self.read(operand.base, self.width(operand.base))
        if self.width(operand.base) == "u32":
            base = f"{base}.astype(u64)"
        if operand.offset == 0:
            return self.let(base)
        offset = self.constant((operand.offset % (1 << 64)).to_bytes(8, "little"), "u64")
        sum_ = f"{base} + {offset}"
        return self.let(f"({sum_}) & u64(0xffffffff)" if self.width(operand.base) == "u32" else sum_)

    def parts(self, operand: Operand) -> tuple[str, ...]:
        return operand.parts if isinstance(operand, Vector) else (operand,)

    def write(self, register: Operand, expression: str, kind: str) -> None:
        """An instruction's result, which threads whose guard is false do not get."""
        if register == "_":
            return
        if register not in self.kernel.registers:
            raise Unknown(f"result in {register}")
        kind, wide = kept(kind), self._canonical(register)
        if "pred" not in (kind, wide) and size_of(kind) < size_of(wide):
            wide = ("s" if kind[0] == "s" else "u") + wide[1:]
            expression, kind = f"({expression}).view({kind}).astype({wide})", wide
            if kind[0] == "f":
                raise Unknown(f"{kind} in a wider register")
        elif kind != wide and (size_of(kind) != size_of(wide) or "pred" in (kind, wide)):
            raise Unknown(f"{kind} into a register of {wide}")
        name = self.let(expression)
        if self.guard is not None:
            old = self._viewed(*self._value(register), kind)
            name = self.let(f"merge({self.guard}, {name}, {old})")
        self.values[register] = name, kind
        self.block.changed[register] = name

    def copy(self, register: str, source: str) -> bool:
        """register = source, which costs nothing where both are registers of one width."""
        both = register in self.kernel.registers and source in self.kernel.registers
        if self.guard is not None or not both or self._canonical(register) != self._canonical(source):
            return False
        self.values[register] = self._value(source)
        self.block.changed[register] = ""
        return True


def merge(mask: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(mask, new, old)


def also(mask: np.ndarray | None, guard: np.ndarray) -> np.ndarray:
    return guard if mask is None else mask & guard

"""PTX text to a kernel: its parameters, registers, memory, and basic blocks of instructions.

It reads the language that Triton writes, inline assembly included, and refuses what it does not know.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Unknown(Exception):
    """Something in the PTX that this machine does not have. It never guesses."""


class Address(NamedTuple):
    """``[base + offset]``"""

    base: str
    offset: int


class Vector(NamedTuple):
    """``{a, b, c}``"""

    parts: tuple[str, ...]


class Pair(NamedTuple):
    """``a | b``: two results of one instruction."""

    first: str
    second: str


Operand = str | Address | Vector | Pair  # str: a register, a number, a symbol or a label


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: ld.global.v4.b32
    operands: tuple[Operand, ...]
    guard: str | None  # a predicate; "!%p1": its negation
    text: str
    line: int  # of the PTX
    source: str  # file:line of the Python code
    scopes: tuple[int, ...] = ()  # in which its labels are looked for

    @property
    def ends_block(self) -> bool:
        return self.opcode.split(".")[0] in _JUMPS or self.is_barrier

    @property
    def is_barrier(self) -> bool:
        name, *modifiers = self.opcode.split(".")
        return name in ("bar", "barrier") and "warp" not in modifiers


_JUMPS = ("bra", "brx", "call", "ret", "exit", "trap")


class Space(NamedTuple):
    """A declared piece of memory."""

    offset: int
    size: int


@dataclass
class Kernel:
    name: str
    parameters: dict[str, int]  # name: bytes
    target: str = ""
    threads: int = 0
    registers: dict[str, str] = field(default_factory=dict)  # name: "b32", "pred"
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)  # label: block
    shared: dict[str, Space] = field(default_factory=dict)
    local: dict[str, Space] = field(default_factory=dict)
    constants: dict[str, bytes] = field(default_factory=dict)  # global variables with their contents

    def instructions(self) -> Iterator[Instruction]:
        for block in self.blocks:
            yield from block

    def block_of(self, label: str, scopes: tuple[int, ...]) -> int:
        for scope in reversed(scopes):
            if (block := self.labels.get(f"{label}@{scope}")) is not None:
                return block
        raise Unknown(f"label {label}")

    @property
    def shared_bytes(self) -> int:
        return _end(self.shared)

    @property
    def local_bytes(self) -> int:
        return -(-_end(self.local) // 16) * 16

    def where(self, instruction: Instruction) -> str:
        return f"{self.name}, {instruction.source}, PTX line {instruction.line}: {instruction.text}"


def _end(spaces: dict[str, Space]) -> int:
    return max((space.offset + space.size for space in spaces.values()), default=0)


def parse(text: str) -> Kernel:
    """The one kernel of a module."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"', text, re.M))
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, re.S))
    if len(entries) != 1:
        raise Unknown(f"a module of {len(entries)} kernels")
    (entry,) = entries
    kernel = Kernel(entry[1], dict(_parameter(words) for words in entry[2].split(",") if words.strip()))
    if found := re.search(r"\.target\s+(\w+)", text):
        kernel.target = found[1]
    if found := re.search(r"\.reqntid\s+(\d+)", entry[3]):
        kernel.threads = int(found[1])
    for declared in re.finditer(_VARIABLE, text[: entry.start()]):
        _declare(kernel, declared)
    _Body(kernel, files).read(text, entry.end())
    return kernel


def _parameter(declaration: str) -> tuple[str, int]:
    *words, name = declaration.split()
    kind = next(word for word in words if word[1:] in _BYTES)
    name, count = re.fullmatch(r"([\w$]+)(?:\[(\d+)\])?", name).groups()
    return name, _BYTES[kind[1:]] * int(count or 1)


_BYTES = {f"{letter}{bits}": bits // 8 for letter in "busf" for bits in (8, 16, 32, 64, 128)}
_VARIABLE = re.compile(
    r"\.(?P<space>shared|global|const|local)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<kind>\w+)\s+(?P<name>[\w$]+)"
    r"(?P<array>\[(?P<count>\d*)\])?(?:\s*=\s*\{(?P<values>[^}]*)\})?"
)


def _declare(kernel: Kernel, declared: re.Match) -> None:
    if declared["kind"] not in _BYTES:
        raise Unknown(f"variable {declared[0]}")
    width = _BYTES[declared["kind"]]
    size = width * (
        int(declared["count"] or 0) if declared["array"] else 1
    )  # [] is as large as the launch says
    if declared["space"] in ("shared", "local"):
        spaces = getattr(kernel, declared["space"])
        align = int(declared["align"] or width)
        spaces[declared["name"]] = Space(-(-_end(spaces) // align) * align, size)
    else:
        values = [int(value, 0) for value in (declared["values"] or "").split(",") if value.strip()]
        values += [0] * (size // width - len(values))
        kernel.constants[declared["name"]] = b"".join(
            (value % (1 << 8 * width)).to_bytes(width, "little") for value in values
        )


_PIECES = re.compile(
    r"""(?P<space>\s+)
      | (?P<location>\.loc\s+(?P<file>\d+)\s+(?P<row>\d+)[^\n]*)
      | (?P<open>\{) | (?P<close>\})
      | (?P<label>[\w$]+):(?!:)
      | (?P<statement>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);""",
    re.X,
)


class _Body:
    """Reads what stands between the braces of a kernel. Braces inside open a scope with names of its own."""

    def __init__(self, kernel: Kernel, files: dict[str, str]):
        self.kernel, self.files = kernel, files
        self.scopes: list[tuple[int, dict[str, str]]] = [(0, {})]
        self.opened = 0
        self.source = "?"

    def read(self, text: str, position: int) -> None:
        line = text.count("\n", 0, position) + 1
        while self.scopes:
            piece = _PIECES.match(text, position)
            if piece is None:
                raise Unknown(f"PTX line {line}: {text[position : position + 80]!r}")
            self._take(piece, line)
            line += piece[0].count("\n")
            position = piece.end()
        blocks = self.kernel.blocks
        if not blocks[-1] and len(blocks) > 1 and len(blocks) - 1 not in self.kernel.labels.values():
            blocks.pop()

    def _take(self, piece: re.Match, line: int) -> None:
        match piece.lastgroup:
            case "location":
                if piece["row"] != "0":
                    self.source = f"{self.files.get(piece['file'], '?')}:{piece['row']}"
            case "open":
                self.opened += 1
                self.scopes.append((self.opened, {}))
            case "close":
                self.scopes.pop()
            case "label":
                self._start_block()
                label = f"{piece['label']}@{self.scopes[-1][0]}"
                self.kernel.labels[label] = len(self.kernel.blocks) - 1
            case "statement":
                self._statement(piece["statement"], line)

    def _start_block(self) -> None:
        if self.kernel.blocks[-1]:
            self.kernel.blocks.append([])

    def _statement(self, text: str, line: int) -> None:
        text = " ".join(text.split())
        if not text or text.startswith(".pragma"):
            return
        if text.startswith(".reg"):
            self._registers(text)
        elif declared := re.match(_VARIABLE, text):
            _declare(self.kernel, declared)
        elif text.startswith("."):
            raise Unknown(f"PTX line {line}: {text}")
        else:
            instruction = self._instruction(text, line)
            self.kernel.blocks[-1].append(instruction)
            if instruction.ends_block:
                self._start_block()

    def _registers(self, text: str) -> None:
        kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()
        scope, renamed = self.scopes[-1]
        for name in names.split(","):
            prefix, count = re.fullmatch(r"\s*([%\w$]+)(?:<(\d+)>)?\s*", name).groups()
            for one in [prefix] if count is None else [f"{prefix}{i}" for i in range(int(count))]:
                renamed[one] = f"{one}@{scope}" if scope else one
                self.kernel.registers[renamed[one]] = kind

    def _instruction(self, text: str, line: int) -> Instruction:
        guard, opcode, operands = re.fullmatch(r"(?:@(!?\S+) )?(\S+) ?(.*)", text).groups()
        return Instruction(
            opcode,
            tuple(self._operand(part) for part in _split(operands)),
            guard and self._name(guard),
            text,
            line,
            self.source,
            tuple(number for number, _ in self.scopes),
        )

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._name(part) for part in text[1:-1].split(",")))
        if text.startswith("["):
            inside = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
            if inside is None:
                raise Unknown(f"address {text}")
            return Address(self._name(inside[1]), int(inside[2] or "0", 0))
        if "|" in text:
            return Pair(*map(self._name, text.split("|")))
        return self._name(text)

    def _name(self, text: str) -> str:
        text = text.strip()
        sign, name = ("!", text[1:]) if text.startswith("!") else ("", text)
        for _, renamed in reversed(self.scopes):
            if name in renamed:
                return sign + renamed[name]
        return text


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]

"""From a declared kernel to counted machine code, with no GPU: compile, disassemble, find the loops, count.

Triton compiles for any NVIDIA target without a driver, and its wheel carries ``cuobjdump`` and ``nvdisasm``.
So registers, spills, access widths and the instruction mix are facts on any Linux machine.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any, NamedTuple

from fastreg.ops.backend import OPTIONS, leaves


class InspectError(Exception):
    """Something that stops an inspection, said in one line."""


# -----------------------------------------------------------------------------------------------------------
# Declarations: what bench/<family>.py writes


@dataclass(frozen=True)
class Budget:
    """What a kernel promises about its machine code; ``inspect`` reports every promise that is broken.

    The defaults are the promise of a good memory-bound kernel: no spills (always), 16-byte accesses, no
    shared memory, and an issue bound below the memory bound.
    """

    max_instructions: float | None = None  # per element, on sm_90
    access_bytes: int = 16  # the narrowest global access that is not named as an exception below
    narrow_loads: int = 0  # load instructions allowed below it: a seed, a scalar, a parameter of a row
    narrow_stores: int = 0  # the same for stores: the statistics of a row
    shared_bytes: int = 0
    sectors: float = (
        1.0  # that all requests ask for, over the fewest that hold what they want: with --execute
    )
    min_headroom: float | Mapping[int, float] = 1.0  # memory / issue bound; 0 where compute is the point


@dataclass(frozen=True)
class Kernel:
    """One variant of a kernel, with what a launch would tell Triton about it.

    >>> Kernel("forward bf16", dropout_forward, elements=2048, bytes_per_element=4,
    ...        arguments={"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i64"},
    ...        constants={"BLOCK": 2048}, divisible_by_16=("n",),
    ...        budget=Budget(max_instructions=16, narrow_loads=1))
    """

    name: str
    function: Any  # a @triton.jit function
    elements: float  # how many elements one program processes
    bytes_per_element: float  # read + written in device memory: what the memory bound is computed from
    # The types of runtime arguments, as Triton writes them ("*bf16", "i64"); not needed where annotated. An argument
    # that is a struct has one for each of its fields: "tensors.x".
    arguments: Mapping[str, str] = field(default_factory=dict)
    # Constexprs, and the runtime arguments that are None or 1, which Triton also makes constants.
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible_by_16: Sequence[str] = ()  # integers that are; pointers always are
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None  # registers a thread may use
    # How often the body of each loop in the machine code runs once it is entered: a number for one loop, a
    # list for several in order of address (an outer loop before those in it), or {80: ..., 90: ..., 100: ...}
    # where the assembler unrolls differently. 0 leaves a loop out of the count, if it is a rare slow path.
    trips: float | Sequence[float] | Mapping[int, Any] = ()
    budget: Budget = field(default_factory=Budget)
    headline: bool = False  # one of the few that the README shows
    launch: Any = field(default=None, repr=False, compare=False)  # with the tensors that it was declared with
    # Where tensors lie at the addresses of a table: a call that returns a launch with a table, and these tensors.
    real: Callable[[], tuple[Any, list]] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, name: str, launch: Any, elements: int, bytes_per_element: float, **rest: Any) -> "Kernel":
        """The variant that a ``fastreg.ops.backend.Launch`` runs, on tensors of the "meta" device for example.

        elements: of all programs together. What is inspected is then what runs: the same tile, and the same
        arguments divisible by 16 or fixed to 1.
        """
        parameters = _parameters(launch.kernel)
        arguments, constants, divisible = {}, {}, []
        settings = {"num_warps", "num_stages", "maxnreg"} & set(launch.arguments)
        rest |= {key: launch.arguments[key] for key in settings}
        whole = {key: v for key, v in launch.arguments.items() if key not in settings}
        constants |= {key: whole.pop(key) for key in list(whole) if parameters[key].is_constexpr}
        for key, value in leaves(whole):
            parameter = parameters[key.partition(".")[0]]
            if hasattr(value, "dtype"):
                arguments[key] = _POINTERS[str(value.dtype).removeprefix("torch.")]
            elif value is None:
                constants[key] = value
            elif not parameter.annotation_type:
                if value == 1 and not parameter.do_not_specialize:
                    constants[key] = 1
                else:
                    arguments[key] = "i32" if value < 1 << 31 else "i64"
                    divisible += [key] if value % 16 == 0 else []
        return cls(
            name,
            launch.kernel,
            elements / prod(launch.grid),
            bytes_per_element,
            arguments,
            constants,
            divisible,
            launch=launch,
            **rest,
        )


def bytes_of(launch: Any, *names: str) -> int:
    """The bytes of these tensors of a launch, where it has them: partial sums, written once."""
    found = (launch.leaves.get(name) for name in names)
    return sum(x.numel() * x.element_size() for x in found if x is not None)


_POINTERS = {
    "float64": "*fp64",
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "int64": "*i64",
    "int32": "*i32",
    "uint8": "*u8",
    "bool": "*i1",
}


def short_name(dtype: Any) -> str:
    """bf16 for torch.bfloat16: how the names of kernels have it."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def for_target(value: Any, cc: int) -> Any:
    """``value``, or its entry for ``cc`` if it is given per target."""
    return value[cc] if isinstance(value, Mapping) else value


# -----------------------------------------------------------------------------------------------------------
# Compiling


class Compiled(NamedTuple):
    sass: str
    registers: int
    stack_bytes: int
    shared_bytes: int


def binary_for(kernel: Kernel, cc: int) -> Any:
    """``kernel``, compiled by Triton for compute capability ``cc`` (90 for sm_90)."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise InspectError(f"needs Triton 3.6 or later: pip install 'triton>=3.6' ({error})") from error

    source = ASTSource(**_specialization(kernel))
    options = {
        **OPTIONS,
        "num_warps": kernel.num_warps,
        "num_stages": kernel.num_stages,
        "maxnreg": kernel.maxnreg,
    }
    try:
        return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise InspectError(f"{kernel.name} does not compile for sm_{cc}: {reason}") from error


def compile_for(kernel: Kernel, cc: int) -> Compiled:
    """Compile ``kernel`` and disassemble it."""
    binary = binary_for(kernel, cc)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return Compiled(sass, registers, stack, binary.metadata.shared)


def signature_of(kernel: Kernel) -> dict[str, str]:
    """The types of the kernel's arguments, those in structs by dotted names; "constexpr" of constants."""
    return dict(leaves(_specialization(kernel)["signature"]))


def _specialization(kernel: Kernel) -> dict[str, Any]:
    """What the launcher would pass to the compiler: types, constants, and which arguments divide by 16."""
    function = _jit_function(kernel.function, kernel.name)
    parameters = _parameters(function)
    places = dict(_places(parameters))
    named = {*kernel.arguments, *kernel.constants, *kernel.divisible_by_16}
    if unknown := sorted(named - set(places)):
        raise InspectError(f"{kernel.name}: the kernel has no argument {', '.join(unknown)}")

    def type_of(name: str) -> str:
        parameter = parameters[name.partition(".")[0]]
        if name in kernel.constants or parameter.is_constexpr:
            return "constexpr"
        return kernel.arguments.get(name) or parameter.annotation_type

    types = {name: type_of(name) for name in places}
    constexprs = [name for name, type_ in types.items() if type_ == "constexpr"]
    untyped = [name for name, type_ in types.items() if not type_]
    if missing := untyped + [name for name in constexprs if name not in kernel.constants]:
        raise InspectError(f"{kernel.name}: declare the type or value of {', '.join(missing)}")

    def divides(name: str) -> bool:
        parameter = parameters[name.partition(".")[0]]
        if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
            return False  # the launcher does not tell the compiler either
        return types[name].startswith("*") or name in kernel.divisible_by_16

    signature: dict[str, Any] = dict.fromkeys(parameters)
    for name, parameter in parameters.items():
        struct = _struct(parameter)
        signature[name] = (
            struct(*(types[f"{name}.{field}"] for field in struct._fields)) if struct else types[name]
        )
    return {
        "fn": function,
        "signature": signature,
        "constexprs": {places[name]: kernel.constants[name] for name in constexprs},
        "attrs": {place: [["tt.divisibility", 16]] for name, place in places.items() if divides(name)},
    }


def _struct(parameter: Any) -> Any:
    """The named tuple that a kernel takes there at run time, or None."""
    annotation = parameter._param.annotation
    return annotation if hasattr(annotation, "_fields") else None


def _places(parameters: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names of leaves, and where the compiler finds them."""
    for i, (name, parameter) in enumerate(parameters.items()):
        if struct := _struct(parameter):
            yield from ((f"{name}.{field}", (i, k)) for k, field in enumerate(struct._fields))
        else:
            yield name, (i,)


def _parameters(function: Any) -> dict[str, Any]:
    """The parameters by name; a kernel decorated for the interpreter can be declared, though not compiled."""
    from triton.runtime import JITFunction

    function = _unwrapped(function)
    function = function if isinstance(function, JITFunction) else JITFunction(function)
    return {parameter.name: parameter for parameter in function.params}


def _jit_function(function: Any, name: str) -> Any:
    from triton.runtime import JITFunction

    function = _unwrapped(function)
    if not isinstance(function, JITFunction):
        raise InspectError(
            f"{name} is decorated for the interpreter (or is no @triton.jit function) and cannot be "
            "compiled: unset TRITON_INTERPRET and start again"
        )
    return function


def _unwrapped(function: Any) -> Any:
    """The JITFunction under @triton.autotune or @triton.heuristics, or the Python function under another."""
    from triton.runtime import JITFunction

    while not isinstance(function, JITFunction) and hasattr(function, "fn"):
        function = function.fn
    return function


def _tool(name: str, *arguments: str) -> str:
    from triton import knobs

    try:
        path = getattr(knobs.nvidia, name).path
        return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
    except (AttributeError, RuntimeError, OSError) as error:
        raise InspectError(f"Triton has no {name}: set TRITON_{name.upper()}_PATH to one") from error
    except subprocess.CalledProcessError as error:
        raise InspectError(f"{name} failed: {error.stderr.strip()}") from error


# -----------------------------------------------------------------------------------------------------------
# Reading the disassembly: instructions, blocks, loops


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    guarded: bool  # it has a predicate, so control may fall through it

    @property
    def target(self) -> str | None:
        """The label this instruction may jump to."""
        label = re.search(r"`\((.+?)\)", self.operands)
        return label[1] if label and self.base in ("BRA", "CALL", "JMP") else None

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow. ``BRA.U !UP0, `(.L_x_0)`` has its condition as operand."""
        if self.base in ("EXIT", "RET", "BRX", "KILL"):
            return self.guarded
        if self.base in ("BRA", "JMP"):
            return self.guarded or not self.operands.lstrip().startswith("`")
        return True


_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^([.$\w]+):\s*$")


class Loop(NamedTuple):
    blocks: frozenset[int]
    instructions: int


class Program:
    """The control-flow graph of one disassembled kernel, and how often each part of it runs."""

    def __init__(self, sass: str):
        self.blocks: list[list[Instruction]] = [[]]
        self._block_of: dict[str, int] = {}
        for line in sass.splitlines():
            if label := _LABEL.match(line):
                self._start_block()
                self._block_of[label[1]] = len(self.blocks) - 1
            elif found := _LINE.match(line):
                self.blocks[-1].append(Instruction(found[2], found[3], guarded=found[1] is not None))
                if self.blocks[-1][-1].target or not self.blocks[-1][-1].falls_through:
                    self._start_block()

    def _start_block(self) -> None:
        if self.blocks[-1]:
            self.blocks.append([])

    def _successors(self, block: int) -> set[int]:
        last = self.blocks[block][-1] if self.blocks[block] else None
        found = set()
        if (last is None or last.falls_through) and block + 1 < len(self.blocks):
            found.add(block + 1)
        if last and last.target in self._block_of:
            found.add(self._block_of[last.target])
        return found

    @cached_property
    def successors(self) -> dict[int, set[int]]:
        """The successors of every block that can be reached: the trap and the padding after the last EXIT can not."""
        reached: dict[int, set[int]] = {}
        waiting = [0]
        while waiting:
            block = waiting.pop()
            if block not in reached:
                reached[block] = self._successors(block)
                waiting.extend(reached[block])
        return dict(sorted(reached.items()))

    @cached_property
    def predecessors(self) -> dict[int, set[int]]:
        edges = [(source, target) for source, targets in self.successors.items() for target in targets]
        return {block: {source for source, target in edges if target == block} for block in self.successors}

    @cached_property
    def _dominators(self) -> dict[int, set[int]]:
        """For each block the blocks that every path to it passes through."""
        everything = set(self.successors)
        dominators = {block: {0} if block == 0 else everything for block in everything}
        changed = True
        while changed:
            changed = False
            for block in everything - {0}:
                new = {block} | set.intersection(*(dominators[p] for p in self.predecessors[block]))
                changed |= new != dominators[block]
                dominators[block] = new
        return dominators

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops in order of address.

        A jump to an earlier address alone is no loop: the assembler moves slow paths behind the EXIT, and
        they jump back. It is one if its target lies on every path to it.
        """
        bodies: dict[int, set[int]] = {}
        for source, targets in self.successors.items():
            for header in targets & self._dominators[source]:
                body = bodies.setdefault(header, {header})
                waiting = [source]
                while waiting:
                    block = waiting.pop()
                    if block not in body:
                        body.add(block)
                        waiting.extend(self.predecessors[block])
        return [
            Loop(frozenset(body), sum(len(self.blocks[block]) for block in body))
            for _, body in sorted(bodies.items())
        ]

    def executed(self, trips: float | Sequence[float]) -> Counter[str]:
        """How often one thread runs each opcode, if the loops make ``trips`` trips and every predicate holds.

        Branches around rare paths are not modelled: all code that can be reached counts once per trip of the
        loops around it.
        """
        trips = [trips] if isinstance(trips, int | float) else list(trips)
        if len(trips) != len(self.loops):
            sizes = ", ".join(str(loop.instructions) for loop in self.loops)
            raise InspectError(
                f"{len(trips)} trip counts are declared, the code has {len(self.loops)} loops"
                + (f" of {sizes} instructions" if sizes else "")
            )
        counts: Counter[str] = Counter()
        for block in self.successors:
            times = prod(count for count, loop in zip(trips, self.loops, strict=True) if block in loop.blocks)
            for instruction in self.blocks[block]:
                counts[instruction.opcode] += times
        return counts

    @cached_property
    def written(self) -> Counter[str]:
        """How often each opcode stands in the reachable code."""
        return Counter(instruction.opcode for block in self.successors for instruction in self.blocks[block])

    def counted(self, trips: float | Sequence[float]) -> Counter[str]:
        """The same without the loops that ``trips`` leaves out of the count."""
        trips = [trips] if isinstance(trips, int | float) else list(trips)
        rare = [loop.blocks for count, loop in zip(trips, self.loops, strict=True) if count == 0]
        blocks = [block for block in self.successors if not any(block in left_out for left_out in rare)]
        return Counter(instruction.opcode for block in blocks for instruction in self.blocks[block])


_REGISTER = re.compile(r"\bR(\d+)\b")
_PRODUCTS = ("FFMA", "FFMA2", "DFMA")


def one_sided_sums(program: Program) -> list[str]:
    """Sums of a lane and another (SHFL.BFLY) that took in the product of one of them: fma(a, b, the other's).

    The other lane rounds the other product. So lanes that should hold one sum hold several, and the one that is stored
    last wins.
    """
    exchanged: set[int] = set()  # registers that hold what another lane has sent
    found = []
    for instruction in chain.from_iterable(program.blocks):
        registers = [int(number) for number in _REGISTER.findall(instruction.operands)]
        if instruction.base in _PRODUCTS and "RZ" not in instruction.operands:
            found += [f"{instruction.opcode} {instruction.operands}"] * bool(exchanged & {*registers[1:]})
        written = range(registers[0], registers[0] + _registers_of(instruction.opcode)) if registers else ()
        exchanged.difference_update(written)
        if instruction.opcode.startswith("SHFL.BFLY"):
            exchanged.update(written)
    return found


def _registers_of(opcode: str) -> int:
    """How many registers an instruction writes, at most."""
    base, *modifiers = opcode.split(".")
    if base.endswith("MMA"):
        return 128
    if base == "LDSM" or "128" in modifiers:
        return 4
    wide = base in ("DADD", "DMUL", "DFMA", "FADD2", "FMUL2", "FFMA2", "CS2R")
    return 2 if wide or {"64", "WIDE", "F64"} & {*modifiers} else 1


# -----------------------------------------------------------------------------------------------------------
# Classifying opcodes

KINDS = ("fma", "imad", "alu", "mufu", "conversion", "lsu", "fp64", "tensor", "uniform", "other", "control")

_BASES = {
    "control": """
        NOP BRA BRX JMP JMX EXIT KILL CALL RET BSSY BSYNC BREAK BMOV BPT YIELD NANOSLEEP WARPSYNC BAR
        DEPBAR LDGDEPBAR LDTDEPBAR MEMBAR ERRBAR CGAERRBAR CCTL FENCE SYNCS WARPGROUP WARPGROUPSET PREEXIT
        ACQBULK""",
    # HFMA2 is also how the assembler loads some constants. On sm_80 the packed 16-bit operations have a
    # faster pipe of their own, so counting them here errs on the slow side. FHADD and FHFMA (sm_100) take a 16-bit
    # operand beside fp32.
    "fma": """
        FADD FMUL FFMA FADD32I FMUL32I FFMA32I FADD2 FMUL2 FFMA2 FHADD FHFMA FSWZADD
        HADD2 HMUL2 HFMA2 HADD2_32I HMUL2_32I HFMA2_32I""",
    "imad": "IMAD IMUL IDP IDP4A",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "mufu": "MUFU POPC FLO BREV",  # bit counts are no functions, but run on the same unit
    "conversion": "F2F F2I I2F FRND",  # F2FP and I2FP, the packing and the fast forms, run on the ALU
    "lsu": """
        LD LDG LDS LDL LDSM LDGSTS LDTM ST STG STS STL STSM STTM SHFL MATCH
        ATOM ATOMG ATOMS RED REDG REDAS""",
    "uniform": "S2UR R2UR LDCU CREDUX",
    "other": "S2R CS2R LDC B2R R2B",  # special registers and constants: served elsewhere, never many
}
_KIND_OF = {base: kind for kind, bases in _BASES.items() for base in bases.split()}


def kind(opcode: str) -> str:
    """The kind of an instruction: which pipe it occupies, or that it controls the flow."""
    base = opcode.split(".")[0]
    if base in _KIND_OF:
        return _KIND_OF[base]
    if base.endswith("MMA"):
        return "tensor"
    if base.startswith("U"):
        return "uniform"
    return "alu"  # the pipe of the rest: logic, shifts, compares, selects, min, max, moves, integer adds


def turns_of(opcode: str) -> int:
    """How many turns on its pipe one instruction takes."""
    base, *modifiers = opcode.split(".")
    if base in ("IMAD", "IMUL") and {"WIDE", "HI"} & set(modifiers):
        return 2  # assumption, on the slow side: no source gives the rate of the 64-bit product
    if base in ("FADD2", "FMUL2", "FFMA2"):
        return 2  # assumption: two packed fp32 operations take the lanes of two
    return 1


_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
_LOADS = ("LDG", "LD", "LDGSTS")
_STORES = ("STG", "ST")


def access_bytes(opcode: str) -> int:
    """Bytes one thread moves: LDG.E.LTC128B.64 moves 8 (LTC128B is a cache hint)."""
    return next((_WIDTHS[modifier] for modifier in opcode.split(".") if modifier in _WIDTHS), 4)


def accesses(counts: Mapping[str, float], direction: str) -> dict[int, float]:
    """``{bytes: count}`` of the global loads or stores in ``counts``, widest first."""
    bases = _LOADS if direction == "loads" else _STORES
    widths: Counter[int] = Counter()
    for opcode, count in counts.items():
        if opcode.split(".")[0] in bases:
            widths[access_bytes(opcode)] += count
    return dict(sorted(widths.items(), reverse=True))


def count_of(counts: Mapping[str, float], *bases: str) -> float:
    """How many instructions in ``counts`` have one of these base opcodes."""
    return sum(count for opcode, count in counts.items() if opcode.split(".")[0] in bases)

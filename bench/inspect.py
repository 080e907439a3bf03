"""``fastreg inspect``: the proof, without a GPU, that kernels are compiled well.

For every variant that a family's ``kernels()`` declares it compiles the kernel for sm_80, sm_90 and sm_100,
counts the machine code (:mod:`.sass`), predicts the time per element on known GPUs (:mod:`.gpus`) and
compares both with the budget of the declaration. A broken budget makes the command exit with 1.

The counts are facts. The times are predictions: the larger of the bytes over an assumed copy rate and the
instructions over the assumed rate of the pipe that executes them, with nothing for latency or launch.
"""

import importlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from . import FAMILIES
from .executed import Executed, execute
from .gpus import GPUS, JUDGED, RESOURCES, TARGETS, Gpu, picoseconds
from .provenance import source_hash
from .sass import (
    KINDS,
    Budget,
    InspectError,
    Kernel,
    Program,
    accesses,
    compile_for,
    count_of,
    for_target,
    kind,
    one_sided_sums,
    turns_of,
)

TOLERATED = 1.01  # what is counted, over what is declared
PREDICTED = "Counts are facts of the compiled code; times are predictions from assumed rates, not measured."


# -----------------------------------------------------------------------------------------------------------
# The report of one kernel on one target


@dataclass(frozen=True)
class Prediction:
    """What the counts predict on one GPU. Times are per element, all SMs together; none of it is measured."""

    gpu: str
    memory_ps: float
    issue_ps: float
    busiest: str  # the resource that sets issue_ps: "issue" (all slots), or one pipe

    @property
    def headroom(self) -> float:
        """How many times the instructions could grow before they, not memory, set the time."""
        return self.memory_ps / self.issue_ps

    @property
    def bound(self) -> str:
        return "memory" if self.headroom >= 1 else self.busiest

    @property
    def copy_rate_percent(self) -> float:
        return 100 * min(1.0, self.headroom)


@dataclass(frozen=True)
class Report:
    """Everything ``inspect`` knows about one kernel compiled for one target.

    Counts per element are of executed instructions, with the trips of loops; the others are of written ones.
    """

    kernel: str
    cc: int
    registers: int
    stack_bytes: int
    spill_instructions: int  # LDL and STL
    shared_bytes: int
    loads: dict[
        int, int
    ]  # {bytes of one access: load instructions in the code that is counted}, global memory
    stores: dict[int, int]
    exchanges: dict[str, float]  # LDS, STS, SHFL: per element
    atomics: int
    loops: list[int]  # instructions in the body of each loop
    instructions: float  # per element, without control flow
    kinds: dict[str, float]  # the same by kind, and control flow
    bytes_per_element: float  # as declared
    accessed_bytes_per_element: float | None  # by loads and stores; None where a bulk copy hides it
    predictions: list[Prediction]
    budget: Budget
    headline: bool = False
    one_sided_sums: int = 0  # over lanes, which then hold different ones
    executed: Executed | None = None  # --execute: what was counted when it ran


def report_on(kernel: Kernel, cc: int) -> Report:
    """Compile ``kernel`` for ``cc``, count it, and predict its time."""
    compiled = compile_for(kernel, cc)
    program = Program(compiled.sass)
    try:
        executed = program.executed(for_target(kernel.trips, cc))
    except InspectError as error:
        raise InspectError(f"{kernel.name}, sm_{cc}: {error}") from error

    threads_per_element = 32 * kernel.num_warps / kernel.elements
    counts = {opcode: count * threads_per_element for opcode, count in executed.items()}
    kinds = dict.fromkeys(KINDS, 0.0)
    for opcode, count in counts.items():
        kinds[kind(opcode)] += count

    return Report(
        kernel=kernel.name,
        cc=cc,
        registers=compiled.registers,
        stack_bytes=compiled.stack_bytes,
        spill_instructions=count_of(program.written, "LDL", "STL"),
        shared_bytes=compiled.shared_bytes,
        loads=accesses(program.counted(for_target(kernel.trips, cc)), "loads"),
        stores=accesses(program.counted(for_target(kernel.trips, cc)), "stores"),
        exchanges={base: count_of(counts, base) for base in ("LDS", "STS", "SHFL")},
        atomics=count_of(program.written, "ATOM", "ATOMG", "RED", "REDG"),
        loops=[loop.instructions for loop in program.loops],
        instructions=sum(kinds.values()) - kinds["control"],
        kinds=kinds,
        bytes_per_element=kernel.bytes_per_element,
        accessed_bytes_per_element=_accessed_bytes(counts),
        predictions=[predict(kernel.bytes_per_element, gpu, counts) for gpu in GPUS if gpu.cc == cc],
        budget=kernel.budget,
        headline=kernel.headline,
        one_sided_sums=len(one_sided_sums(program)),
    )


def _accessed_bytes(counts: Mapping[str, float]) -> float | None:
    if count_of(counts, "UTMALDG", "UTMASTG", "UBLKCP"):
        return None  # the hardware copies a whole tile: its size is not in the instruction
    widths = [*accesses(counts, "loads").items(), *accesses(counts, "stores").items()]
    return sum(width * count for width, count in widths)


def predict(bytes_per_element: float, gpu: Gpu, counts: Mapping[str, float]) -> Prediction:
    """The bounds that bytes, and executed instructions per element by opcode, set on ``gpu``."""
    turns: Counter[str] = Counter()
    for opcode, count in counts.items():
        turns["issue"] += count  # it is issued once, however long it holds its pipe
        for resource, kinds in RESOURCES.items():
            turns[resource] += count * turns_of(opcode) if kind(opcode) in kinds else 0
    times = picoseconds(gpu, turns)
    busiest = max(times, key=times.__getitem__)
    return Prediction(gpu.name, bytes_per_element / gpu.copy_tb_per_s, times[busiest], busiest)


def violations(report: Report) -> list[str]:
    """The promises of the kernel's budget that its machine code breaks, one line each."""
    return list(_violations(report))


def _violations(report: Report) -> Iterator[str]:
    budget = report.budget
    if report.stack_bytes or report.spill_instructions:
        yield f"spills: {report.spill_instructions} local accesses, {report.stack_bytes} bytes of stack"
    if report.one_sided_sums:
        yield f"{report.one_sided_sums} sums over lanes take in the product of one side: see ptxas.terms"
    for way, allowed in (("loads", budget.narrow_loads), ("stores", budget.narrow_stores)):
        widths = getattr(report, way)
        narrow = {width: count for width, count in widths.items() if width < budget.access_bytes}
        count = sum(narrow.values())
        if count > allowed:
            yield f"{count} {way} below {budget.access_bytes} bytes ({_widths(narrow)}), {allowed} allowed"
    if report.shared_bytes > budget.shared_bytes:
        yield f"{report.shared_bytes} bytes of shared memory, {budget.shared_bytes} allowed"
    limit = budget.max_instructions if report.cc == 90 else None
    if limit is not None and report.instructions > limit:
        yield f"{report.instructions:.1f} instructions per element, {limit:g} allowed"
    accessed = report.accessed_bytes_per_element
    if accessed is not None and accessed < 0.99 * report.bytes_per_element:
        yield (
            f"{report.bytes_per_element:g} bytes per element are declared, the code accesses {accessed:.3g}: "
            "check elements, bytes and trips"
        )
    executed = report.executed
    if executed is not None and executed.bytes > TOLERATED * report.bytes_per_element:
        yield f"{report.bytes_per_element:g} bytes per element are declared, it moves {executed.bytes:.4g}"
    if executed is not None and executed.ratio > TOLERATED * budget.sectors:
        yield f"{executed.ratio:.3f} times the fewest sectors are asked for, {budget.sectors:g} allowed"
    least = for_target(budget.min_headroom, report.cc)
    for prediction in report.predictions:
        if prediction.gpu in JUDGED and prediction.headroom < least:
            yield (
                f"predicted headroom {prediction.headroom:.2f} on {prediction.gpu} ({prediction.busiest} "
                f"{prediction.issue_ps:.2f} ps, memory {prediction.memory_ps:.2f} ps), {least:g} demanded"
            )


def to_json(family: str, report: Report) -> dict:
    """The report as plain data, with what follows from it."""
    predictions = [
        asdict(p) | {"headroom": p.headroom, "bound": p.bound, "copy_rate_percent": p.copy_rate_percent}
        for p in report.predictions
    ]
    conclusions = {"predictions": predictions, "violations": violations(report)}
    return {"family": family} | asdict(report) | conclusions


# -----------------------------------------------------------------------------------------------------------
# The table


WIDE = 160  # columns of a terminal that has room for all of a table
HEADERS = (
    *("kernel", "regs", "spill", "smem", "loads\nB×n", "stores\nB×n", "LDS/STS/\nSHFL", "instr\n/elem"),
    *("fma", "imad", "alu", "xu", "lsu", "unif", "bytes\n/elem"),
    *("predicted\non", "memory\nps/elem", "issue\nps/elem", "head-\nroom"),
)
NARROW = ("kernel", "regs", "spill", "instr\n/elem", "bytes\n/elem", "predicted\non", "head-\nroom")


def table_of(title: str, reports: list[Report], wide: bool = True) -> Table:
    """One row a kernel; predicted columns have a line for each GPU of the target. Not wide: what is judged, alone."""
    shown = [name in NARROW or wide for name in HEADERS]
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
    for number, name in enumerate(compress(HEADERS, shown)):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
    for report in reports:
        table.add_row(*compress(_cells(report), shown), style="red" if violations(report) else None)
    return table


EXECUTED = ("kernel", "bytes/elem\ndeclared", "bytes/elem\nmoved", "sectors,\nbytes/elem", "of the\nfewest")
EXECUTED = (*EXECUTED, "PTX\ninstr/elem", "machine code\ninstr/elem", "bank turns\n/elem")


def executed_table(title: str, reports: list[Report]) -> Table:
    """What was counted when the kernels ran."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
    for number, name in enumerate(EXECUTED):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
    for report in reports:
        style = "red" if violations(report) else None
        table.add_row(escape(report.kernel), *executed_cells(asdict(report)), style=style)
    return table


def executed_cells(report: dict) -> list[str]:
    counted = report["executed"]
    return [
        f"{report['bytes_per_element']:.4g}",
        f"{counted['bytes']:.4g}",
        f"{counted['sectors']:.4g}",
        f"{counted['ratio']:.3f}",
        f"{counted['instructions']:.1f}",
        f"{report['instructions']:.1f}",
        f"{counted['conflicts']:.3f}",
    ]


def _cells(report: Report) -> list[str]:
    kinds = report.kinds
    per_element = [
        *(kinds[name] for name in ("fma", "imad", "alu")),
        kinds["mufu"] + kinds["conversion"],
        *(kinds[name] for name in ("lsu", "uniform")),
    ]
    lines = report.predictions
    return [
        escape(report.kernel),
        str(report.registers),
        str(report.spill_instructions or report.stack_bytes),
        str(report.shared_bytes),
        _widths(report.loads),
        _widths(report.stores),
        "/".join(f"{count:.2g}" for count in report.exchanges.values()),
        f"{report.instructions:.1f}",
        *(f"{count:.1f}" for count in per_element),
        f"{report.bytes_per_element:.3g}",
        "\n".join(line.gpu for line in lines),
        "\n".join(f"{line.memory_ps:.2f}" for line in lines),
        "\n".join(f"{line.busiest} {line.issue_ps:.2f}" for line in lines),
        "\n".join(f"{line.headroom:.2f}" for line in lines),
    ]


def _widths(accesses: dict[int, int]) -> str:
    return " ".join(f"{width}×{count}" for width, count in accesses.items()) or "-"


# -----------------------------------------------------------------------------------------------------------
# The command


def declared(families: tuple[str, ...] = FAMILIES) -> list[tuple[str, Kernel]]:
    """``(family, kernel)`` for every variant that ``kernels()`` of the families' modules declares."""
    modules = [(family, importlib.import_module(f".{family}", __package__)) for family in families]
    return [(family, kernel) for family, module in modules for kernel in module.kernels()]


def inspect(
    family: Annotated[list[str] | None, typer.Option(help=f"One of: {', '.join(FAMILIES)}.")] = None,
    kernel: Annotated[
        str, typer.Option(help="Only variants whose name contains this, or the one that has it.")
    ] = "",
    headline: Annotated[
        bool, typer.Option("--headline", help="Only the variants of the README's table.")
    ] = False,
    target: Annotated[list[int] | None, typer.Option(help="One of: 80, 90, 100 (sm_80, ...).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the reports here.")] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Also write here what `python -m bench report` reads, a line a kernel."),
    ] = None,
    sass: Annotated[bool, typer.Option("--sass", help="Print the machine code of one variant.")] = False,
    check: Annotated[bool, typer.Option(help="Exit with 1 if a kernel breaks its budget.")] = True,
    runs: Annotated[
        bool, typer.Option("--execute", help="Also run the kernels on executed PTX, and count what they do.")
    ] = False,
    wide: Annotated[
        bool, typer.Option("--wide", help=f"All figures; by itself where the terminal has {WIDE} columns.")
    ] = False,
) -> None:
    """Prove without a GPU how well the kernels are compiled: registers, spills, access widths, instructions.

    Times are predictions from assumed rates, never measurements.
    """
    console = Console()
    wide |= console.width >= WIDE
    console.width = max(console.width, WIDE if wide else 80)
    try:
        selected = _select(tuple(family or FAMILIES), kernel, headline)
        targets = _known(tuple(target or TARGETS), TARGETS, "target")
        if sass:
            console.out(_one_listing(selected, targets))
            return
        reports, errors = _reports(selected, targets, console)
        if runs:
            reports = _executed(selected, reports, console)
    except InspectError as error:
        _tell(error)
        raise typer.Exit(2) from error

    for cc in targets:
        for name in dict.fromkeys(name for name, _ in reports):
            rows = [report for its, report in reports if its == name and report.cc == cc]
            console.print(table_of(f"{name}, sm_{cc}", rows, wide))
            if ran := [report for report in rows if report.executed]:
                console.print(executed_table(f"{name}, sm_{cc}, executed", ran))
    console.print(PREDICTED, style="dim")
    if json_file:
        json_file.write_text(json.dumps(document(reports), indent=1) + "\n")
    if record:
        record.write_text(recorded(document(reports)))

    for error in errors:
        _tell(error)
    if errors:
        raise typer.Exit(2)
    broken = [(f"{n}: {r.kernel}, sm_{r.cc}", line) for n, r in reports for line in violations(r)]
    for where, line in broken:
        console.print(f"{where}: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    if broken and check:
        raise typer.Exit(1)


def _tell(error: InspectError) -> None:
    Console(stderr=True).print(
        f"fastreg inspect: {error}", style="red", markup=False, highlight=False, soft_wrap=True
    )


def _select(families: tuple[str, ...], part: str, headline: bool) -> list[tuple[str, Kernel]]:
    known = declared(_known(families, FAMILIES, "family"))
    found = [(f, k) for f, k in known if part in k.name and k.headline >= headline]
    found = [(f, k) for f, k in found if k.name == part] or found  # a whole name is that variant alone
    if not found:
        which = f" with {part!r} in its name" if part else ""
        raise InspectError(f"{', '.join(families)} declares no kernel{which}")
    return found


def _known(asked: tuple, known: tuple, what: str) -> tuple:
    if unknown := [str(value) for value in asked if value not in known]:
        raise InspectError(f"no such {what}: {', '.join(unknown)} (there is {', '.join(map(str, known))})")
    return asked


def _one_listing(selected: list[tuple[str, Kernel]], targets: tuple[int, ...]) -> str:
    cc = targets[0] if len(targets) == 1 else 90
    if len(selected) > 1:
        names = "; ".join(kernel.name for _, kernel in selected)
        raise InspectError(f"--sass prints one variant; narrow it with --kernel to one of: {names}")
    return compile_for(selected[0][1], cc).sass


def _reports(
    selected: list[tuple[str, Kernel]], targets: tuple[int, ...], console: Console
) -> tuple[list[tuple[str, Report]], list[InspectError]]:
    """Compile on all cores: the time goes to the assembler, a process of its own, and to LLVM.

    Returns the reports, and the errors of the kernels that have none.
    """
    jobs = [(family, kernel, cc) for family, kernel in selected for cc in targets]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=len(jobs))

        def run(job: tuple[str, Kernel, int]) -> tuple[str, Report] | InspectError:
            family, kernel, cc = job
            try:
                return family, report_on(kernel, cc)
            except InspectError as error:
                return error
            finally:
                progress.advance(task)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(run, jobs))
    errors = [result for result in done if isinstance(result, InspectError)]
    return [result for result in done if not isinstance(result, InspectError)], errors


def _executed(
    selected: list[tuple[str, Kernel]], reports: list[tuple[str, Report]], console: Console
) -> list[tuple[str, Report]]:
    """The reports, with what was counted. It says which kernels did not run, and why."""
    kernels = {(family, kernel.name): kernel for family, kernel in selected}
    found = []
    for family, report in reports:
        try:
            report = replace(report, executed=execute(kernels[family, report.kernel], report.cc))
        except InspectError as error:
            console.print(
                f"not executed: {error}", style="dim", markup=False, highlight=False, soft_wrap=True
            )
        found.append((family, report))
    return found


def document(reports: list[tuple[str, Report]]) -> dict:
    """All reports as plain data, with what made them."""
    import triton

    return {
        "note": PREDICTED,
        "triton": triton.__version__,
        "source": source_hash(),
        "gpus": [asdict(gpu) for gpu in GPUS],
        "reports": [to_json(family, report) for family, report in reports],
    }


RECORDED = (
    "family",
    "kernel",
    "cc",
    "headline",
    "registers",
    "spill_instructions",
    "instructions",
    "bytes_per_element",
)
RECORDED_OF_A_PREDICTION = ("gpu", "headroom", "bound", "copy_rate_percent")


def recorded(content: dict) -> str:
    """JSON of what the page of results and the README show of a document, a line for each kernel."""

    def line(report: dict) -> str:
        kept = {name: report[name] for name in RECORDED}
        predictions = [{name: p[name] for name in RECORDED_OF_A_PREDICTION} for p in report["predictions"]]
        return json.dumps(_rounded(kept | {"predictions": predictions, "executed": report["executed"]}))

    head = json.dumps({name: content[name] for name in ("note", "triton", "source")})
    lines = ",\n".join(map(line, content["reports"]))
    return f'{head[:-1]}, "reports": [\n{lines}\n]}}\n'


def _rounded(value: Any) -> Any:
    """Numbers of eight digits: more than a table shows."""
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(inspect)

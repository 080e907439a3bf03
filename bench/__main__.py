"""``python -m bench`` (in a checkout) and ``fastreg bench`` (installed)."""

import contextlib
import importlib
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastreg.training.errors import InputError
from fastreg.training.settings import resolve_device

from . import FAMILIES
from .cases import Case
from .check import TOTAL
from .check import check as check_all
from .conversion import run as compare_models
from .harness import (
    CPU_QUICK_SIZES,
    CPU_SIZES,
    DTYPES,
    QUICK_SIZES,
    SIZES,
    explain,
    prepare,
    wrong,
)
from .harness import run as sweep
from .host import ROUNDS
from .host import run as time_host
from .peers import CPU_PEERS, PEERS, select
from .pieces import run as time_pieces
from .provenance import REPOSITORY, provenance
from .report import OURS, Entry, entries, host_tables, human, ratio_cell
from .report import report as render
from .sass import InspectError
from .steps import IMPLEMENTATIONS, Step, networks_of
from .steps import run as time_steps

# Results belong to the checkout; an installed package writes none into itself.
RESULTS = REPOSITORY / "bench/results" if (REPOSITORY / "pyproject.toml").exists() else Path("bench-results")
app = typer.Typer(
    help="Benchmarks: run, steps, host, pieces, lesson, models, report, check, list.",
    no_args_is_help=True,
    add_completion=False,
)
console = Console(highlight=False, soft_wrap=True)


def cases_of(family: str, parts: list[str]) -> list[Case]:
    """The cases of a family whose name contains one of ``parts`` (all if there are none)."""
    if family not in FAMILIES:
        raise typer.BadParameter(f"no such family: {family} (there is {', '.join(FAMILIES)})")
    cases = importlib.import_module(f".{family}", __package__).CASES
    return [case for case in cases if not parts or any(part in case.name for part in parts)]


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def nbytes(text: str) -> int:
    """'64KB' → 65536."""
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if not match:
        raise typer.BadParameter(f"not a size: {text} (write 4KB, 16MB, 2GB)")
    return int(match[1]) * 1024 ** " KMG".index(match[2] or " ")


def choose_device(name: str) -> torch.device:
    try:
        return torch.device(resolve_device(name or "auto"))
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


def above_zero(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"has to be a number above 0, but got {value}")
    return value


def not_below_zero(value: float) -> float:
    if not value >= 0:
        raise typer.BadParameter(f"has to be at least 0, but got {value}")
    return value


@app.command()
def run(
    family: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(FAMILIES)}; all if not given.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of bf16, fp16, fp32, fp64, with commas.")] = "",
    sizes: Annotated[str, typer.Option(help="Bytes of the first input: 4KB,64MB,2GB.")] = "",
    cases: Annotated[str, typer.Option(help="Only cases with one of these in their name.")] = "",
    peers: Annotated[
        str, typer.Option(help="Only these implementations; all that are installed if not given.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the result files.")] = None,
    quick: Annotated[bool, typer.Option(help="Few sizes, bf16, short timings, no max-autotune.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu; cuda where there is one.")] = "",
    budget: Annotated[
        float | None, typer.Option(help="Milliseconds for one timing.", callback=above_zero)
    ] = None,
    stop_after: Annotated[
        float, typer.Option(help="Seconds after which no new case is begun.", callback=not_below_zero)
    ] = math.inf,
    without: Annotated[str, typer.Option(help="Not these implementations.")] = "",
    label: Annotated[str, typer.Option(help="A word for the result files, to keep them beside others.")] = "",
) -> None:
    """Time every case against every peer that is installed, and write a result file for each family and
    dtype."""
    where = choose_device(device)
    gpu = where.type == "cuda"
    if gpu and os.environ.get("TRITON_INTERPRET") == "1":
        raise typer.BadParameter("TRITON_INTERPRET=1 would time the interpreter; unset it")
    chosen_sizes = [nbytes(size) for size in words(sizes)]
    chosen_sizes = chosen_sizes or (
        (QUICK_SIZES if quick else SIZES) if gpu else CPU_QUICK_SIZES if quick else CPU_SIZES
    )
    # A CPU says what we cost over torch there, and no more. Max-autotune takes longer than a quick sweep has.
    names = words(peers) or (
        [p.name for p in PEERS if not quick or p.name != "compile-max"] if gpu else CPU_PEERS
    )
    names = [name for name in names if name not in words(without)]
    try:
        found, versions = select(tuple(names))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    dtypes = words(dtype) or (["fp32"] if not gpu else ["bf16"] if quick else ["bf16", "fp32"])
    if unknown := set(dtypes) - set(DTYPES):
        raise typer.BadParameter(f"no such dtype: {', '.join(sorted(unknown))}")
    if not gpu:  # what we add on the host is on one thread, and the noise of waiting for others hides it
        torch.set_num_threads(1)
    chosen = {name: cases_of(name, words(cases)) for name in family or FAMILIES}
    if not any(chosen.values()):
        raise typer.BadParameter(f"no case has {cases!r} in its name; see the command list")
    sweeps = list(product(filter(chosen.get, chosen), dtypes))
    started = time.monotonic()
    deadline = started + stop_after
    timed, total = 0, len(chosen_sizes) * sum(len(chosen[name]) for name, _ in sweeps)
    failed = False

    def tell(rows: list[dict]) -> None:
        nonlocal failed, timed
        failed |= any(row["error"] and row["implementation"] == OURS for row in rows)
        show(rows)
        timed += 1
        console.print(progress_of(timed, total, time.monotonic() - started), style="dim", markup=False)

    for done, (name, one) in enumerate(sweeps):
        now = time.monotonic()
        path = sweep(
            name,
            chosen[name],
            found,
            dtype=one,
            sizes=chosen_sizes,
            device=where,
            versions=versions,
            folder=out or RESULTS / provenance(where)["slug"],
            quick=quick,
            label=label,
            budget=(budget or (30 if quick else 100)) / 1e3,
            deadline=now + (deadline - now) / (len(sweeps) - done),  # an equal share of what is left
            tell=tell,
        )
        console.print(f"wrote {path}", markup=False)
    if failed:  # a peer that fails is a result, we are not
        raise typer.Exit(1)


def progress_of(done: int, total: int, seconds: float) -> str:
    left = seconds / done * (total - done)
    return (
        f"{done} of {total}, about {left / 60:.0f} min left"
        if left >= 60
        else f"{done} of {total}, {left:.0f} s left"
    )


def show(rows: list[dict]) -> None:
    """One line for each timing as it is done, and for each thing that went wrong."""
    for entry in entries({"rows": rows}):
        console.print(line_of(entry), markup=False)
    for row in filter(lambda row: row["error"], rows):
        text = f"{row['case']} {row['implementation']} {row['method'] or ''}: {row['error']}"
        console.print(text, style="red", markup=False)


def line_of(entry: Entry) -> str:
    ours = f"{entry.ours['median_us']:.1f} µs" if entry.ours else "not timed"
    rest = ", ".join(
        f"{ratio_cell(entry, name)} vs {name}" for name in entry.rows if name != OURS and entry.ours
    )
    copy = entry.ours and entry.ours["of_copy"]
    rate = f", {100 * copy:.0f} % of a copy" if copy else ""
    return f"{entry.case}  {human(entry.bytes)}  {entry.direction}  {entry.method}:  {ours}{rate}, {rest}"


@app.command()
def steps(
    implementations: Annotated[
        str,
        typer.Option(help="Of fastreg, torch, compile, fastreg + compile, with commas; all if not given."),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the result file.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; cuda where there is one.")] = "",
    seconds: Annotated[float, typer.Option(help="Seconds of one timing.", callback=above_zero)] = 5,
) -> None:
    """Time one training step of whole networks, with our layers and with torch's."""
    where, failed, names = choose_device(device), False, tuple(words(implementations))
    if unknown := set(names) - {implementation.name for implementation in IMPLEMENTATIONS}:
        raise typer.BadParameter(f"unknown implementations: {', '.join(sorted(unknown))}")

    def tell(row: dict) -> None:
        nonlocal failed
        failed |= row["error"] is not None and row["implementation"] == OURS
        result = row["error"] or f"{row['median_us'] / 1e3:.2f} ms, launches: {row['launches']}"
        console.print(f"{row['case']}  {row['implementation']}:  {result}", markup=False)

    folder = out or RESULTS / provenance(where)["slug"]
    path = time_steps(folder, where, names=names, budget=seconds, tell=tell)
    console.print(f"wrote {path}", markup=False)
    if failed:
        raise typer.Exit(1)


@app.command()
def host(
    out: Annotated[Path, typer.Option(help="The result file.")] = RESULTS / "host.json",
    cases: Annotated[
        list[str] | None, typer.Option(help="Only cases with this in their name, and their yardsticks.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often all are timed.")] = ROUNDS,
) -> None:
    """Time what calls and steps take on the host, beside yardsticks; without a GPU, launches do nothing."""
    document = time_host(out, rounds, cases or [])
    for header, lines in host_tables(document["rows"]):
        table = Table(*header)
        for line in lines:
            table.add_row(*line)
        console.print(table, markup=False)
    console.print(document["note"], markup=False)
    console.print(f"wrote {out}", markup=False)


@app.command()
def pieces(
    out: Annotated[Path, typer.Option(help="The result file.")] = RESULTS / "pieces.json",
) -> None:
    """Time optimizers, averages and penalties on the CPU, beside torch's functions that do the same together."""
    for row in time_pieces(out)["rows"]:
        ours, theirs = row["ours_ms"], row["torch_ms"]
        times = f"{ours:.3f} ms, torch {theirs:.3f} ms, ratio {ours / theirs:.2f}"
        console.print(f"{row['case']}, {row['tensors']}:  {times}", markup=False)
    console.print(f"wrote {out}", markup=False)


@app.command()
def models(
    out: Annotated[Path, typer.Option(help="The result file.")] = RESULTS / "conversion.json",
    only: Annotated[list[str] | None, typer.Option(help="Only models with this in their name.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 10,
) -> None:
    """Convert models of torchvision, timm, transformers, MONAI and SMP, and compare them with what they were."""
    compare_models(out, only or [], repeats, lambda line: console.print(line, markup=False))
    console.print(f"wrote {out}", markup=False)


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder with result files.")] = RESULTS,
    page: Annotated[
        Path | None, typer.Option(help="The page to write; RESULTS.md beside the folder.")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Also fill this README, between its bench markers.")
    ] = None,
) -> None:
    """Render tables and pictures from result files."""
    if not any(results.rglob("*.json")):
        console.print(f"there are no results in {results}", style="red", markup=False)
        raise typer.Exit(1)
    try:
        written = render(results, page or results.parent / "RESULTS.md", readme)
    except ValueError as error:
        console.print(f"{readme}: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    for path in written:
        console.print(f"wrote {path}", markup=False)


@app.command()
def check(
    out: Annotated[Path, typer.Option(help="Folder for results, logs and the summary.")],
    dry_run: Annotated[
        bool | None, typer.Option(help="No GPU is used; on by itself where there is none.")
    ] = None,
    tests: Annotated[
        str | None, typer.Option(help='Arguments for pytest: a path, or "tests -k name".')
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for everything.", callback=above_zero)] = TOTAL,
) -> None:
    """Tests, sanitizer, quick benchmarks and report in nine minutes: the command for a fresh GPU machine."""
    dry = not torch.cuda.is_available() if dry_run is None else dry_run
    if not dry and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU here: only a dry run is possible")
    if dry:
        console.print(
            "DRY RUN: no GPU is used. It proves that the stages work, and measures no kernel.", style="bold"
        )

    def tell(result: dict) -> None:
        reason = f" ({result['reason']})" if "reason" in result else ""
        says = f": {result['says']}" if result.get("says") else ""
        line = f"{result['stage']}: {result['status']}{reason}, {result['seconds']} s{says}"
        console.print(line, markup=False)

    results, ok = check_all(out, dry=dry, tests=tests, total=seconds, tell=tell)
    table = Table(title="dry run" if dry else "check", title_justify="left")
    for column in ("stage", "status", "seconds", "log"):
        table.add_column(column)
    for result in results:
        color = {"ok": "green", "skipped": "yellow"}.get(result["status"], "red")
        table.add_row(
            result["stage"], result["status"], str(result["seconds"]), result.get("log", ""), style=color
        )
    console.print(table)
    console.print(f"results in {out}", markup=False)
    if not ok:
        raise typer.Exit(1)


@app.command()
def lesson(
    write: Annotated[
        bool, typer.Option("--write", help="Also put the table into kernels/README.md.")
    ] = False,
) -> None:
    """Count the machine code of dropout in steps, from the plain kernel to the tuned one."""
    from . import lesson as steps  # imports Triton

    try:
        text = steps.section()
    except InspectError as error:
        console.print(f"{error}", style="red", markup=False)
        raise typer.Exit(1) from error
    console.print(text, markup=False)
    if write:
        steps.write(text)


@app.command("list")
def list_all() -> None:
    """The cases, and the peers with their versions, or why they are absent and what pip installs for them."""
    for family in FAMILIES:
        for case in cases_of(family, []):
            console.print(f"{family}: {case.name}", markup=False)
    packages = {peer.name: " ".join(peer.packages) for peer in PEERS}
    for name, version in select()[1].items():
        absent = version.startswith("absent") and packages[name]
        console.print(f"peer {name}: {version}{f' (pip install {absent})' if absent else ''}", markup=False)


def shapes(where: torch.device) -> list[tuple[torch.dtype, int]]:
    """dtypes and sizes of what is run once: even, and ragged; on a GPU, enough for a kernel."""
    least = 2**18 if where.type == "cuda" else 0  # smaller plain tensors go to ATen
    return [(torch.bfloat16, least + 2048), (torch.float32, least + 2051)]


def in_turns(names: list[str] | None) -> list[Case]:
    """The first case of each family, then the second, and so on: whenever one stops, all have had their share."""
    families = [cases_of(name, []) for name in names or FAMILIES]
    return [case for turn in zip_longest(*families) for case in turn if case is not None]


def once(case: Case, dtype: torch.dtype, numel: int, where: torch.device) -> str | None:
    """What is wrong with one forward and backward pass of a case."""
    try:
        return wrong(case, case.ours, case.inputs(numel, dtype, where))
    except Exception as error:
        if isinstance(error, NotImplementedError) and where.type == "cpu":
            return None  # torch has none there
        return explain(error)


@app.command(hidden=True)
def sanitize(
    family: Annotated[list[str] | None, typer.Argument()] = None,
    device: Annotated[str, typer.Option()] = "",
    stop_after: Annotated[float, typer.Option(callback=not_below_zero)] = math.inf,
) -> None:
    """Every case once, forward and backward, checked: what runs under compute-sanitizer. Says what it left out."""
    where, end, failed = choose_device(device), time.monotonic() + stop_after, False
    runs = [(case, *shape) for shape in shapes(where) for case in in_turns(family)]
    done = 0
    for case, dtype, numel in runs:
        if time.monotonic() > end:
            break
        problem = once(case, dtype, numel, where)
        failed |= problem is not None
        console.print(f"{case.name} {dtype} {numel}: {problem or 'ok'}", markup=False)
        done += 1
    left = ", ".join(f"{case.name} {dtype}".replace("torch.", "") for case, dtype, _ in runs[done:])
    console.print(f"checked {done} of {len(runs)} runs{f'; left out: {left}' if left else ''}", markup=False)
    if failed:
        raise typer.Exit(1)


@app.command(hidden=True)
def warm(
    part: Annotated[int | None, typer.Option(help="Of what a process of all has to do.")] = None,
    processes: Annotated[int, typer.Option()] = os.cpu_count() or 1,
    device: Annotated[str, typer.Option()] = "",
) -> None:
    """Compiles into Triton's cache what the quick sweep, the sanitizer and the networks run: on all cores."""
    where = choose_device(device)
    gpu = where.type == "cuda"

    def launch(case: Case, dtype: torch.dtype, numel: int) -> None:
        prepare("both", case.ours, case.inputs(numel, dtype, where))()

    jobs = [
        partial(lambda network: Step(network, IMPLEMENTATIONS[0], where)(), one) for one in networks_of(where)
    ]
    sizes = [(torch.bfloat16, size // 2) for size in (QUICK_SIZES if gpu else CPU_QUICK_SIZES[:1])]
    jobs += [partial(launch, case, *run) for case in in_turns(None) for run in (*shapes(where), *sizes)]
    if part is not None:
        for job in jobs[part::processes]:
            with contextlib.suppress(Exception):  # whatever is wrong, the stages behind this one say so
                job()
            if gpu:
                torch.cuda.empty_cache()
        return

    def run_part(number: int) -> int:
        command = [sys.executable, "-m", __package__, "warm", "--part", str(number)]
        command += ["--processes", str(processes), "--device", device]
        return subprocess.run(command, check=False).returncode

    with ThreadPoolExecutor(processes) as pool:
        ended = list(pool.map(run_part, range(processes)))
    console.print(f"ran {len(jobs)} jobs in {processes} processes", markup=False)
    if any(ended):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()

"""Turns result files into tables and pictures. Every figure shown is read from a file that the suite wrote.

GPU results are speed claims, with every loss first. CPU results are shown as the overhead over torch on a
CPU, nothing more. Predictions of ``fastreg inspect`` are labelled as predictions.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .cases import DIRECTIONS
from .harness import SCHEMA
from .host import PARTS
from .inspect import executed_cells


def markers(name: str) -> tuple[str, str]:
    """The lines between which a page has a section that is written by a command."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


BEGIN, END = markers("bench")
OURS = "fastreg"
STEPS = "steps"  # the family of whole training steps: bench/steps.py
HEADLINE = {"cuda": "events", "cpu": "perf_counter"}  # the method of pictures and summaries
LEGEND = """\
Written by `python -m bench report` from the JSON files under `bench/results`; never edited by hand.

- Losses come first. `vs` is the peer's time over ours: above 1 ours is faster.
- The floor is the bytes that must move, over the rate of a large copy measured in the same run; `GB/s` and
  `of floor` count these bytes. `of copy` compares with a copy of as many bytes, timed by the same method.
- Methods: `events` (device time, cold L2 cache), `wall` (eager calls with their launches), `graph` (replay of
  a CUDA graph, warm L2 cache).
- Peak memory is what forward and backward need beyond the inputs."""
RED = "🔴"  # GitHub's Markdown has no colours


# --- reading ------------------------------------------------------------------------------------------------


def load(folder: Path) -> list[dict]:
    """The result files under ``folder`` that count: for each device, family and dtype the newest, and a full
    sweep before a quick one. Runs under the interpreter are never results."""
    best: dict[tuple, dict] = {}
    for path in sorted(folder.rglob("*.json")):
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or document.get("schema") != SCHEMA or "rows" not in document:
            continue
        origin = document["provenance"]
        if origin["interpreted"] or not document["rows"]:
            continue
        document["folder"] = path.parent
        key = (origin["slug"], document["family"], document["dtype"], document.get("label", ""))
        if key not in best or rank(document) > rank(best[key]):
            best[key] = document
    return [best[key] for key in sorted(best)]


def rank(document: dict) -> tuple:
    return not document["quick"], document["provenance"]["date"]


@dataclass(frozen=True)
class Entry:
    """One line of a table: what was timed, and every implementation's row."""

    case: str
    bytes: int
    direction: str
    method: str
    rows: dict[str, dict]

    @property
    def ours(self) -> dict | None:
        return self.rows.get(OURS)

    def ratio(self, peer: str) -> float | None:
        """The peer's time over ours: above 1 ours is faster."""
        if self.ours is None or peer not in self.rows:
            return None
        return self.rows[peer]["median_us"] / self.ours["median_us"]

    @property
    def worst(self) -> float:
        """Ratio to the fastest peer, rounded as it is shown, so that a tie is not called a loss; 0 where only
        peers could be timed."""
        if self.ours is None:
            return 0.0
        return min((round(self.ratio(peer), 2) for peer in self.rows if peer != OURS), default=1.0)

    @property
    def loss(self) -> bool:
        return self.worst < 1


def entries(document: dict) -> list[Entry]:
    """The timed rows of a file in the order of the sweep, one entry a case, size, direction and method."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in document["rows"]:
        if row["error"] is None:
            key = (row["case"], row["bytes"], row["direction"], row["method"])
            groups.setdefault(key, {})[row["implementation"]] = row
    return [Entry(*key, rows) for key, rows in groups.items()]


def losses_first(chosen: list[Entry]) -> list[Entry]:
    """The worst loss on top; what is no loss keeps its order below them."""
    return sorted(chosen, key=lambda entry: entry.worst if entry.loss else 1)


def failures(document: dict) -> list[dict]:
    """Rows that are wrong or failed, ours first."""
    failed = [row for row in document["rows"] if row["error"] is not None]
    return sorted(failed, key=lambda row: row["implementation"] != OURS)


def peers(document: dict) -> list[str]:
    """Everyone else with a timed row, in the order of the peer table."""
    timed = [row["implementation"] for row in document["rows"] if row["error"] is None]
    return [name for name in dict.fromkeys([*document["peers"], *timed]) if name in timed and name != OURS]


# --- formatting ---------------------------------------------------------------------------------------------


def human(nbytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} GB"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def ratio_cell(entry: Entry, peer: str) -> str:
    ratio = entry.ratio(peer)
    if ratio is None:
        return ""
    text = f"{ratio:.2f}×"
    return f"{RED} **{text}**" if round(ratio, 2) < 1 else text


def markdown(header: list[str], lines: Iterable[list[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are text, the rest numbers."""
    rule = [":--"] * left + ["--:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def title_of(document: dict) -> str:
    return ", ".join(filter(None, (document["family"], document["dtype"], document.get("label"))))


def origin_line(document: dict) -> str:
    origin = document["provenance"]
    commit = origin["commit"] + (" (modified)" if origin["dirty"] else "")
    parts = [
        origin["gpu"] or origin["cpu"],
        f"driver {origin['driver']}" if origin.get("driver") else "",
        f"CUDA {origin['cuda']}" if origin["cuda"] else "",
        f"torch {origin['torch']}",
        f"triton {origin['triton']}",
        f"fastreg {origin['fastreg']} at {commit}",
        origin["date"][:10],
        "quick sweep" if document["quick"] else "",
        "" if document["complete"] else "stopped early",
    ]
    return ", ".join(part for part in parts if part)


def copy_rate(document: dict) -> float | None:
    """GB/s of the largest copy of the run: what 100 % of the floor means."""
    copies = [copy for copy in document["copy"] if copy["method"] == "events"]
    return max(copies, key=lambda copy: copy["bytes"])["gbps"] if copies else None


# --- tables -------------------------------------------------------------------------------------------------


def gpu_table(document: dict, chosen: list[Entry]) -> str:
    """Ours, floor, every peer and the ratio to it; one line for each entry."""
    names, rate = peers(document), copy_rate(document)

    def ours(entry: Entry) -> list[str]:
        mine = entry.ours
        if mine is None:
            return [f"{RED} **not timed**", "", "", "", "", ""]
        spread = f"{mine['median_us']:.1f} ({mine['p20_us']:.1f} to {mine['p80_us']:.1f})"
        return [
            f"**{spread}**" if entry.loss else spread,
            f"{mine['floor_bytes'] / rate / 1e3:.1f}",
            f"{mine['gbps']:.0f}",
            percent(mine["of_floor"]),
            percent(mine["of_copy"]),
            human(mine["peak_memory"]),
        ]

    def theirs(entry: Entry, name: str) -> str:
        if name not in entry.rows:
            return ""
        return f"{ratio_cell(entry, name)} ({entry.rows[name]['median_us']:.1f})".lstrip()

    def line(entry: Entry) -> list[str]:
        where = [entry.case, human(entry.bytes), entry.direction, entry.method]
        return [*where, *ours(entry), *(theirs(entry, name) for name in names)]

    header = ["case", "input", "direction", "method", "fastreg µs (p20 to p80)", "floor µs", "GB/s"]
    header += ["of floor", "of copy", "peak memory", *(f"vs {name} (µs)" for name in names)]
    return markdown(header, map(line, chosen), left=4)


def cpu_table(document: dict) -> str:
    """How much longer ours takes than torch's own on a CPU."""

    def line(entry: Entry) -> list[str]:
        ours, torch = entry.ours["median_us"], entry.rows["torch"]["median_us"]
        overhead = ours / torch - 1
        text = f"{100 * overhead:+.0f} %"
        cells = [entry.case, human(entry.bytes), entry.direction, f"{ours:.1f}", f"{torch:.1f}"]
        return [*cells, f"{RED} **{text}**" if overhead > 0.05 else text]

    both = [e for e in losses_first(entries(document)) if OURS in e.rows and "torch" in e.rows]
    header = ["case", "input", "direction", "fastreg µs", "torch µs", "overhead"]
    return markdown(header, map(line, both), left=3)


def steps_table(document: dict) -> str:
    """Whole training steps: a line for each network and implementation."""
    ours = {row["case"]: row for row in document["rows"] if row["implementation"] == OURS}

    def line(row: dict) -> list[str]:
        if row["error"] is not None:
            return [row["case"], row["implementation"], f"`{row['error']}`", "", "", ""]
        time, mine = row["median_us"], ours.get(row["case"], {}).get("median_us")
        ratio = "" if mine is None or row["implementation"] == OURS else f"{time / mine:.2f}×"
        return [
            row["case"],
            row["implementation"],
            f"{time / 1e3:.2f} ({row['p20_us'] / 1e3:.2f} to {row['p80_us'] / 1e3:.2f})",
            f"{RED} **{ratio}**" if ratio and round(time / mine, 2) < 1 else ratio,
            "" if row["peak_memory"] is None else human(row["peak_memory"]),
            "" if row["launches"] is None else str(row["launches"]),
        ]

    header = ["network", "implementation", "ms a step (p20 to p80)", "time over fastreg's"]
    return markdown([*header, "peak memory", "launches"], map(line, document["rows"]), left=2)


def host_cell(row: dict | None) -> str:
    """Microseconds of a call, and its ratio to the yardstick, beside the goal."""
    if row is None:
        return ""
    time, ratio, goal = f"{row['us']:.1f}", f"{row['ratio']:.2f}×", row["goal"]
    if goal is None:
        return f"{time}, {ratio}"
    missed = row["ratio"] > goal
    return f"{RED if missed else ''} {time}, {ratio} {'>' if missed else '≤'} {goal:g}".lstrip()


def host_tables(rows: list[dict]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and lines of what calls take on the host: of functions, and of steps."""
    calls: dict[str, dict[str, dict]] = {}
    for row in rows:
        calls.setdefault(row["case"], {})[row["part"]] = row

    def line(case: str, parts: tuple[str, ...]) -> list[str]:
        found = [calls[case].get(part) for part in parts]
        counts = [row["launches"] for row in found if row and row["launches"] is not None]
        return [case, ", ".join(map(str, counts if any(counts) else [])), *map(host_cell, found)]

    tables = (
        (
            ["call", "launches", *parts],
            [line(case, parts) for case in calls if calls[case].keys() & set(parts)],
        )
        for parts in PARTS
    )
    return [(header, lines) for header, lines in tables if lines]


def host_table(content: dict) -> str:
    """What calls take on the host, beside their yardsticks, with where it was measured."""
    origin = origin_line({"provenance": content["provenance"], "quick": False, "complete": True})
    tables = (markdown(*table) for table in host_tables(content["rows"]))
    return "\n\n".join([f"{origin}. {content['note']}", *tables])


def pieces_table(content: dict) -> str:
    """Ours on the CPU beside torch's functions, with where it was measured."""

    def line(row: dict) -> list[str]:
        ours, theirs = row["ours_ms"], row["torch_ms"]
        return [row["case"], row["tensors"], f"{ours:.3f}", f"{theirs:.3f}", f"{ours / theirs:.2f}"]

    lines = map(line, content["rows"])
    origin = origin_line({"provenance": content["provenance"], "quick": False, "complete": True})
    table = markdown(["case", "tensors", "fastreg, ms", "torch, ms", "ratio"], lines, left=2)
    return f"{origin}. {content['note']}\n\n{table}"


def conversion_table(content: dict) -> str:
    """Models of other libraries, converted: what is fused, how equal the results are, launches and bytes."""
    origin = origin_line({"provenance": content["provenance"], "quick": False, "complete": True})
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    header = ["library", "model", "layers", "seams", "of which", "classes alone", "fused", "state_dict"]
    models = markdown(header, map(_converted_model, content["rows"]), left=2)
    header = ["library", "model", "before", "classes alone", "fused"]
    counts = markdown(header, map(_counted_model, content["counts"]), left=2)
    return "\n\n".join(
        [
            f"{origin}. {versions}. Built without weights, on the CPU, small inputs. Layers: converted of those known "
            "or alike; seams: fused of those found. Then the relative difference of outputs, gradients and running "
            "statistics, where they are not equal to the bit, in fp32, under autocast to bf16, and with channels last. "
            f"{_step_times(content['rows'])}",
            models,
            "Launches and bytes of a training step with two images of 224 x 224, or two sequences of 128, counted and "
            "not timed: an operation of ATen counts as one launch, which of its norms is too few.",
            counts,
        ]
    )


def _converted_model(row: dict) -> list[str]:
    if "error" in row:
        return [row["library"], row["model"], f"🔴 {row['error']}", *[""] * 5]
    fused, found = (sum(pair[i] for pair in row["seams"].values()) for i in (0, 1))
    kinds = "; ".join(f"{kind} {a}/{b}" for kind, (a, b) in row["seams"].items())
    layers = f"{row['converted']} / {row['layers']}"
    equal = [_differences(row, form) for form in ("classes", "fused")]
    state = "yes" if row["state_dict"] else "🔴 no"
    return [row["library"], row["model"], layers, f"{fused} / {found}", kinds, *equal, state]


def _differences(row: dict, form: str) -> str:
    """The largest one of each mode that has any."""
    found = {
        mode.partition(",")[0]: max(d.values()) for mode, d in row["differences"].items() if form in mode
    }
    return ", ".join(f"{mode} {value:.1g}" for mode, value in found.items() if value) or "0"


def _counted_model(row: dict) -> list[str]:
    if "error" in row:
        return [row["library"], row["model"], f"🔴 {row['error']}", "", ""]
    before = row["before"]
    cells = [row["library"], row["model"], f"{before['launches']}, {before['bytes'] / 1e6:.0f} MB"]
    for form in ("classes", "fused"):
        launches, moved = row[form]["launches"], row[form]["bytes"]
        cells.append(f"{launches}, {moved / 1e6:.0f} MB ({moved / before['bytes']:.2f}×)")
    return cells


def _step_times(rows: list[dict]) -> str:
    times = sorted(row["time"] for row in rows if "time" in row)
    if not times:
        return ""
    middle = times[len(times) // 2]
    return f"A CPU training step takes {times[0]:.2f} to {times[-1]:.2f} times as long, {middle:.2f} in the middle."


def failure_list(document: dict) -> str:
    def line(row: dict) -> str:
        mark = f"{RED} " if row["implementation"] == OURS else ""
        where = [row["implementation"], row["case"], human(row["bytes"]), row["direction"], row["method"]]
        return f"- {mark}{', '.join(filter(None, where))}: `{row['error']}`"

    lines = map(line, failures(document))
    return "\n".join(["Not timed, or failed:", "", *lines]) if failures(document) else ""


def results_page(
    documents: list[dict],
    page: Path,
    static: Path | None = None,
    host: Path | None = None,
    pieces: Path | None = None,
    conversion: Path | None = None,
    executed: Path | None = None,
    tests: Path | None = None,
) -> str:
    """The full page: one section for each device, family and dtype, the times of ``host`` and ``pieces``, models of
    ``conversion``, the
    counts of ``executed``, the ``tests`` on executed PTX, the predictions of ``static``."""
    parts = ["# Benchmark results", LEGEND]
    for document in documents:
        origin = document["provenance"]
        title = f"## {title_of(document)}, {origin['gpu'] or 'CPU'}"
        if document["family"] == STEPS:
            note = "" if origin["gpu"] else "Tiny networks on a CPU: they show that it runs, and no more."
            parts += [title, origin_line(document) + ".", note, steps_table(document)]
            continue
        absent = [name for name, version in document["peers"].items() if version.startswith("absent")]
        parts += [title, origin_line(document) + "."]
        if origin["device"] == "cuda":
            rate = copy_rate(document)
            parts += [f"Copy rate {rate:.0f} GB/s." if rate else "No copy rate."]
            parts += [gpu_table(document, losses_first(entries(document))) if rate else ""]
        else:
            parts += [
                "Overhead over torch on a CPU; nothing here is a claim about a kernel.",
                cpu_table(document),
            ]
        parts += [failure_list(document)]
        parts += [f"Peers not installed: {', '.join(absent)}." if absent else ""]
        parts += [f"![{path.stem}]({relative(path, page)})" for path in pictures_of(document)]
    if not documents:
        parts += ["No results yet."]
    if host is not None and host.exists():
        parts += ["## Calls on the host", host_table(json.loads(host.read_text()))]
    if pieces is not None and pieces.exists():
        parts += ["## On the CPU, beside torch's functions", pieces_table(json.loads(pieces.read_text()))]
    if conversion is not None and conversion.exists():
        parts += ["## Converted models", conversion_table(json.loads(conversion.read_text()))]
    if executed is not None and executed.exists():
        parts += ["## Executed", executed_table(json.loads(executed.read_text()))]
    if tests is not None and tests.exists():
        parts += ["## Tests on executed PTX", tests_table(json.loads(tests.read_text()))]
    if static is not None and static.exists():
        parts += ["## Predictions", static_table(json.loads(static.read_text()))]
    return "\n\n".join(part for part in parts if part) + "\n"


def loss_line(losses: list[Entry], count: int) -> str:
    if not losses:
        return f"fastreg is no slower than its fastest peer in any of {count} timings."
    worst = losses[0]
    where = f"{worst.case}, {worst.direction}, {human(worst.bytes)}, {worst.method}"
    return (
        f"{RED} fastreg is slower than its fastest peer, or could not be timed, in {len(losses)} of {count} "
        f"timings; the worst is {where}: {f'{worst.worst:.2f}×' if worst.ours else 'not timed'}."
    )


def readme_section(documents: list[dict], static: Path, readme: Path, page: Path) -> str:
    """What stands between the markers: a summary for each GPU, or the static predictions as predictions."""
    gpus, parts = [document for document in documents if document["provenance"]["gpu"]], []
    for document in gpus:
        if document["family"] == STEPS:
            title = f"### One training step, {document['provenance']['gpu']}"
            parts += [title, origin_line(document) + ".", steps_table(document)]
            continue
        if not copy_rate(document):
            continue
        timings = losses_first(entries(document))
        timed = [entry for entry in timings if entry.method == HEADLINE["cuda"]]
        largest = max((entry.bytes for entry in timed), default=0)
        headline = [entry for entry in timed if entry.bytes > largest / 2]  # shapes round the size down
        losses = [entry for entry in timings if entry.loss]
        parts += [
            f"### {title_of(document)}, {document['provenance']['gpu']}",
            f"{origin_line(document)}. Copy rate {copy_rate(document):.0f} GB/s.",
            gpu_table(document, headline),
            loss_line(losses, len(timings)),
        ]
        parts += [f"![{path.stem}]({relative(path, readme)})" for path in pictures_of(document)]
    if not gpus:
        parts += ["No GPU results yet."]
        if static.exists():
            parts += [family_table(json.loads(static.read_text()))]
            parts += [f"![predictions]({relative(static.with_suffix('.png'), readme)})"]
    if documents:
        parts += [f"All timings: [{page.name}]({relative(page, readme)})."]
    return "\n\n".join(parts)


def predictions(content: dict, gpu: str) -> list[tuple[dict, dict]]:
    """(report, prediction) of every kernel for one GPU, from what ``fastreg inspect --json`` wrote."""
    return [
        (report, prediction)
        for report in content["reports"]
        for prediction in report["predictions"]
        if prediction["gpu"] == gpu
    ]


def static_title(content: dict, gpu: str) -> str:
    origin = f"`fastreg inspect`, triton {content['triton']}, sources {content['source']}"
    return f"Predictions for {gpu}, not measurements, from the compiled machine code ({origin}):"


def static_table(content: dict, gpu: str = "H100") -> str:
    """The predictions for every kernel."""
    lines = [
        [
            report["family"],
            report["kernel"],
            str(report["registers"]),
            str(report["spill_instructions"]),
            f"{report['instructions']:.1f}",
            f"{report['bytes_per_element']:.3g}",
            prediction["bound"],
            f"{prediction['copy_rate_percent']:.0f} %",
        ]
        for report, prediction in predictions(content, gpu)
    ]
    header = ["family", "kernel", "registers", "spills", "instructions / element", "bytes / element"]
    table = markdown([*header, "predicted bound", "predicted share of copy rate"], lines)
    return f"{static_title(content, gpu)}\n\n{table}"


def executed_table(content: dict) -> str:
    """What ``fastreg inspect --execute`` has counted. These are facts."""
    ran = [report for report in content["reports"] if report["executed"]]
    lines = [
        [report["family"], report["kernel"], f"sm_{report['cc']}", *executed_cells(report)] for report in ran
    ]
    header = [
        "family",
        "kernel",
        "target",
        "bytes / element declared",
        "moved",
        "sectors asked for, bytes / element",
    ]
    header += [
        "of the fewest",
        "PTX instructions / element",
        "in machine code, static",
        "bank turns / element",
    ]
    origin = f"`fastreg inspect --execute`, triton {content['triton']}, sources {content['source']}"
    return (
        f"Counted on executed PTX ({origin}). *Moved*: the different sectors of each tensor, each once. *Sectors asked "
        "for*: those of all requests, caches or not. *Bank turns*: of shared memory, beyond those that its bytes need."
        f"\n\n{markdown(header, lines, left=3)}"
    )


def tests_table(content: dict) -> str:
    """What ``pytest --machine TARGET --machine-record FILE`` has recorded, by target and Triton."""
    lines = []
    for name, files in content.items():
        runs = files.values()
        variants = {variant for run in runs for variant in run["variants"]}
        failed, tests, launches = (sum(x) for x in zip(*map(_counts, runs), strict=True))
        numbers = (
            len(files),
            tests,
            failed,
            len({v.partition(":")[0] for v in variants}),
            len(variants),
            launches,
        )
        lines.append([name, *map(str, numbers)])
    header = ["target, Triton", "files", "tests passed", "failed", "kernels", "variants", "launches"]
    return f"Tests that ran a kernel (`pytest --machine TARGET`).\n\n{markdown(header, lines)}"


def _counts(run: dict) -> tuple[int, int, int]:
    return len(run["failed"]), run["tests"], run["launches"]


def family_table(content: dict, gpu: str = "H100") -> str:
    """The predictions in a line for each family: of all its kernels, and of those that stand for it."""
    families: dict[str, list] = {}
    for report, prediction in predictions(content, gpu):
        families.setdefault(report["family"], []).append((report, prediction))
    lines = []
    for family, found in families.items():
        shown = [(report, prediction) for report, prediction in found if report["headline"]]
        instructions = [report["instructions"] for report, _ in shown]
        bounds = dict.fromkeys(prediction["bound"] for _, prediction in shown)
        lines.append(
            [
                family,
                str(len(found)),
                str(sum(report["spill_instructions"] for report, _ in found)),
                str(max(report["registers"] for report, _ in found)),
                f"{min(instructions):.1f} to {max(instructions):.1f}",
                ", ".join(bounds),
                f"{min(prediction['headroom'] for _, prediction in shown):.2g}",
            ]
        )
    header = ["family", "kernels", "spills", "most registers", "instructions / element, main forms"]
    table = markdown([*header, "predicted bound", "lowest memory time / instruction time"], lines)
    return f"{static_title(content, gpu)}\n\n{table}"


def draw_predictions(content: dict, path: Path) -> None:
    """A row for each family, a mark for each main form of its kernels on each GPU: how much longer the bytes take than
    the instructions."""
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(report["family"] for report in content["reports"]))
    gpus = list(dict.fromkeys(p["gpu"] for report in content["reports"] for p in report["predictions"]))
    figure = Figure(figsize=(8, 0.42 * len(families) + 1.6), layout="constrained")
    panel = figure.subplots()
    panel.axvspan(1e-3, 1, color="0.93", lw=0)
    looks = (("o", "#0072B2"), ("D", "#D55E00"), ("s", "#CC79A7"), ("^", "#000000"))
    for number, (gpu, (mark, colour)) in enumerate(zip(gpus, looks, strict=False)):
        shown = [
            (prediction["headroom"], families.index(report["family"]))
            for report, prediction in predictions(content, gpu)
            if report["headline"]
        ]
        places = [place + 0.18 * (number - 1.5) for _, place in shown]
        panel.plot(
            [ratio for ratio, _ in shown], places, mark, color=colour, ms=4.5, mew=0, alpha=0.7, label=gpu
        )
    panel.set_yticks(range(len(families)), families)
    panel.set_ylim(len(families) - 0.5, -0.5)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    panel.set_xlim(
        left=min(0.5, *(p["headroom"] for r in content["reports"] for p in r["predictions"])) / 1.2
    )
    panel.set_xlabel("time of the bytes / time of the instructions (below 1, in grey: bound by instructions)")
    panel.set_title("Predicted from machine code, not measured", loc="left", fontsize=11)
    panel.grid(axis="x", color="0.85", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(gpus), frameon=False)
    figure.savefig(path, dpi=130)


# --- pictures -----------------------------------------------------------------------------------------------


def pictures_of(document: dict) -> list[Path]:
    stem = title_of(document).replace(", ", "-")
    return [document["folder"] / f"{stem}-{direction}.png" for direction in DIRECTIONS]


def draw(document: dict, direction: str, path: Path) -> None:
    """One panel a case, one line an implementation, over the size of the input: GB/s on a GPU, on a CPU the
    time as a multiple of torch's."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    gpu = document["provenance"]["device"] == "cuda"
    method = HEADLINE[document["provenance"]["device"]]
    chosen = [entry for entry in entries(document) if (entry.direction, entry.method) == (direction, method)]
    names = [OURS, *peers(document)] if gpu else [OURS, "torch"]
    cases = list(dict.fromkeys(row["case"] for row in document["rows"]))
    columns = min(3, max(1, len(cases)))
    grid = (-(-max(1, len(cases)) // columns), columns)
    figure = Figure(figsize=(4.6 * grid[1], 3.0 * grid[0] + 0.8), layout="constrained")
    panels = figure.subplots(*grid, squeeze=False, sharey=True).flat
    for case, panel in zip(cases, panels, strict=False):
        lines = sorted((entry for entry in chosen if entry.case == case), key=lambda entry: entry.bytes)
        for color, name in enumerate(names):
            points = [
                (e.bytes, value(e, name, gpu)) for e in lines if name in e.rows and (gpu or "torch" in e.rows)
            ]
            if points:
                style = {"linewidth": 2.2, "zorder": 3} if name == OURS else {"linewidth": 1.2}
                panel.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=3,
                    color=f"C{color}",
                    label=name,
                    **style,
                )
        if gpu and (rate := copy_rate(document)):
            panel.axhline(rate, color="grey", linestyle="--", linewidth=1, label="large copy")
        panel.set_xscale("log", base=16)  # ticks at 4 KB, 64 KB, 1 MB, ...
        panel.minorticks_off()
        panel.xaxis.set_major_formatter(lambda x, _: human(x))
        panel.set_title(case, fontsize=9)
        panel.tick_params(labelsize=7)
    for panel in figure.axes[: len(cases)]:
        panel.set_ylim(bottom=0)
    for panel in figure.axes[len(cases) :]:
        panel.set_axis_off()
    shown = {
        label: line
        for panel in figure.axes
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize=8)
    figure.supylabel("GB/s over the byte floor" if gpu else "time / torch's time (CPU)", fontsize=9)
    figure.supxlabel("input size", fontsize=9)
    figure.suptitle(
        f"{document['family']} {direction}, {document['dtype']}\n{origin_line(document)}", fontsize=9
    )
    figure.savefig(path, dpi=110)


def value(entry: Entry, name: str, gpu: bool) -> float:
    row = entry.rows[name]
    return row["gbps"] if gpu else row["median_us"] / entry.rows["torch"]["median_us"]


# --- the command --------------------------------------------------------------------------------------------


def relative(path: Path, page: Path) -> str:
    """Link from a page to a file; pages stand above or beside the results."""
    return Path(os.path.relpath(path, page.parent)).as_posix()


def replace_section(text: str, section: str, name: str = "bench") -> str:
    """``text`` with a new section between its markers; ValueError where the markers are not there."""
    opening, closing = markers(name)
    before, begin, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end:
        raise ValueError(f"no {opening} … {closing} section")
    return f"{before}{opening}\n\n{section}\n\n{closing}{after}"


def report(results: Path, page: Path, readme: Path | None = None) -> list[Path]:
    """Draws the pictures beside the result files, writes ``page``, fills the section of ``readme``. Returns
    what it wrote."""
    documents, written = load(results), []
    for document in (document for document in documents if document["family"] != STEPS):
        for direction, path in zip(DIRECTIONS, pictures_of(document), strict=True):
            draw(document, direction, path)
            written.append(path)
    static = results / "static.json"
    if static.exists():
        draw_predictions(json.loads(static.read_text()), static.with_suffix(".png"))
        written.append(static.with_suffix(".png"))
    others = ("host.json", "pieces.json", "conversion.json", "executed.json", "machine_tests.json")
    page.write_text(results_page(documents, page, static, *(results / name for name in others)))
    written.append(page)
    if readme is not None:
        section = readme_section(documents, static, readme, page)
        readme.write_text(replace_section(readme.read_text(), section))
        written.append(readme)
    return written

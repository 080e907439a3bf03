"""The one command for a fresh GPU machine: correctness, sanitizer, benchmarks, report, within nine minutes.

Every stage is a process of its own with a time limit, its output in a log file: a stage that hangs or crashes
leaves the others, and what it had written, intact. Without a GPU the same stages make a dry run.

What later stages run is compiled in ``warm``, on all cores, into Triton's cache: some 700 variants, each of 0.2 to 1.3
seconds of a core. A stage with more to do than its time allows stops by itself, and says what it left out.
"""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .provenance import REPOSITORY, provenance

TOTAL = 540  # seconds: within ten minutes, with the start of a machine's first process
SHARES = {
    "tests": 150, "warm": 60, "memcheck": 40, "racecheck": 40,
    "bench": 120, "compiled": 60, "steps": 40, "report": 30,
}  # fmt: skip
# What runs no kernel needs no GPU and has no place in its nine minutes.
GPU_TESTS = "tests --ignore tests/gpu_host " + " ".join(
    f"--ignore tests/test_{name}.py"
    for name in (
        "training",
        "train_command",
        "inspect",
        "bench",
        "bench_report",
        "speed",
        "doctor",
        "gpu_host",
        "plans",
        "drawn_plans",
        "packaging",
        "cli",
        "compiled",
    )
)
COMPILED = ("dropout", "layer_norm", "batch_norm", "group_norm")  # families that torch's compiler is timed on
# In a dry run the interpreter runs the kernels, slowly: a part of one family stands for all tests.
DRY_TESTS = "tests/test_dropout.py -x -k 'fused or inplace or nan'"


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    environment: dict[str, str | None] = field(default_factory=dict)  # None: unset
    skip: str | None = None  # why it cannot run here
    stops: bool = False  # by itself, at the time that it is told


def bench(*arguments: str) -> list[str]:
    return [sys.executable, "-m", __package__, *arguments]


def stages(out: Path, dry: bool, tests: str | None) -> list[Stage]:
    """What is run, in order."""
    # In a dry run no stage may see a GPU, so that it does the same everywhere.
    plain = {"TRITON_INTERPRET": None, "FASTREG_CHECK": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if dry else {})
    pytest = [sys.executable, "-m", "pytest", *shlex.split(tests or (DRY_TESTS if dry else GPU_TESTS))]
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", "0" if dry else str(os.cpu_count())]  # compilation is what takes the time
    else:
        pytest += ["-o", "addopts=-m 'not slow'"]  # those of pyproject.toml ask for workers
    missing = None if (REPOSITORY / "tests").is_dir() else "no tests folder: run it from a checkout"
    variables = plain | ({"TRITON_INTERPRET": "1"} if dry else {})
    found = [Stage("tests", pytest, variables, missing, stops=True)]
    device = ["--device", "cpu"] if dry else []
    found.append(Stage("warm", bench("warm", *device), plain))

    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if dry:  # the script alone, once, so that it is known to run
            skip = None if tool == "memcheck" else "no GPU; memcheck ran the same script"
            found.append(Stage(tool, bench("sanitize"), plain, skip, stops=True))
            continue
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "99"]
        command += ["--target-processes", "application-only", "--report-api-errors", "no", *bench("sanitize")]
        # Without the caching allocator a tensor is an allocation of its own, which a stray access leaves.
        environment = plain | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        missing = None if sanitizer else "compute-sanitizer not found"
        found.append(Stage(tool, command, environment, missing, stops=True))

    results = str(out / "results")
    sweep = bench("run", "--quick", "--without", "compile", "--out", results, *device)
    # torch's compiler takes ten seconds a case: a stage of its own, for a few families at one size.
    compiled = bench("run", *COMPILED, "--quick", "--sizes", "1GB", "--label", "compiled", "--out", results)
    compiled += ["--peers", "fastreg,torch,compile"]
    if dry:
        sweep += ["--sizes", "4KB", "--budget", "2"]
    found.append(Stage("bench", sweep, plain, stops=True))
    found.append(Stage("compiled", compiled, plain, "no GPU to compile for" if dry else None, stops=True))
    steps = ["--implementations", "fastreg,torch", "--seconds", "0.5" if dry else "3", "--out", results]
    found.append(Stage("steps", bench("steps", *steps, *device), plain))
    found.append(
        Stage("report", bench("report", "--results", results, "--page", str(out / "RESULTS.md")), plain)
    )
    return found


def run_stage(stage: Stage, seconds: float, log: Path) -> dict:
    """Runs one stage with its output in ``log``; ends it and its children when the time is over."""
    if stage.skip:
        return {"stage": stage.name, "status": "skipped", "reason": stage.skip, "seconds": 0.0}
    environment = {**os.environ, **stage.environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    started = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            stage.command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "timeout"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result = {"stage": stage.name, "status": status, "seconds": round(time.monotonic() - started, 1)}
    says = log.read_text(errors="replace").strip().rpartition("\n")[2]
    return result | {"code": code, "log": log.name, "says": says, "command": shlex.join(stage.command)}


def check(
    out: Path, *, dry: bool, tests: str | None = None, total: float = TOTAL, tell=lambda result: None
) -> tuple[list[dict], bool]:
    """All stages, each with its share of the time plus what earlier ones left over. Returns their results and
    whether all is well; both are also in ``summary.json``, written anew after each stage."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + total
    plan = stages(out, dry, tests)
    summary = {
        "dry_run": dry,
        "provenance": provenance(torch.device("cpu" if dry else "cuda")),
        "stages": [],
        "ok": False,
    }
    for index, stage in enumerate(plan):
        reserved = sum(SHARES[later.name] for later in plan[index + 1 :]) * total / TOTAL
        seconds = max(1.0, end - time.monotonic() - reserved)
        if stage.stops:  # with all that it has to say, before it is ended
            stage.command.extend(["--stop-after", f"{max(1.0, 0.75 * seconds):.0f}"])
        result = run_stage(stage, seconds, out / f"{stage.name}.log")
        summary["stages"].append(result)
        summary["ok"] = len(summary["stages"]) == len(plan) and all(
            done["status"] in ("ok", "skipped") for done in summary["stages"]
        )
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        tell(result)
    return summary["stages"], summary["ok"]

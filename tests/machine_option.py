"""``pytest --machine sm_90 tests/test_x.py``: kernels are compiled for this target, and their PTX is executed on CPU
tensors (:mod:`fastreg.bench.machine`). ``--machine-seed``: in which order warps and programs come.

Whether kernels are interpreted is decided when they are imported, before pytest knows its options: so the command line
is read here, when ``conftest.py`` imports this, and handed on to processes that this one starts.
"""

import ast
import functools
import hashlib
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastreg import kernels

_VARIABLE = "PYTEST_MACHINE"


def _asked() -> str | None:
    for argument, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        if argument == "--machine":
            return following
        if argument.startswith("--machine="):
            return argument.partition("=")[2]
    return os.environ.get(_VARIABLE)


TARGET = _asked()
"""sm_80, sm_90 or sm_100; None: no machine."""

TRUNCATES = TARGET is None and not torch.cuda.is_available()
"""Triton's interpreter runs the kernels, which cuts numbers off to bf16."""


def bf16(tolerance: float) -> float:
    """Half of it on the machine, which rounds to bf16 as a GPU does: the interpreter truncates, and ATen rounds after
    every operation."""
    return tolerance if TARGET is None else tolerance / 2


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of storing a number in this dtype: half a unit in the last place. The interpreter
    truncates to bf16: a whole one."""
    unit = torch.finfo(dtype).eps
    return unit if dtype == torch.bfloat16 and TRUNCATES else unit / 2


if TARGET is not None:
    os.environ[_VARIABLE] = TARGET
    os.environ["TRITON_INTERPRET"] = "0"


MACHINE = None


def add_options(parser) -> None:
    parser.addoption("--machine", metavar="TARGET", help="Execute the PTX for sm_80, sm_90 or sm_100.")
    parser.addoption(
        "--cases", type=int, help="With --machine: of each test so many cases at most, by --seed."
    )
    parser.addoption(
        "--every-kernel",
        action="store_true",
        help="With --machine: fails unless each kernel has been executed.",
    )
    parser.addoption(
        "--machine-record", metavar="FILE", help="With --machine: what ran, added to this JSON file."
    )
    parser.addoption(
        "--machine-seed", type=int, default=0, help="The order of warps and programs; 0: all in step."
    )
    parser.addoption(
        "--machine-errors",
        type=int,
        default=0,
        help="A seed: approximate functions are as wrong as the ISA allows; 0: they are rounded correctly.",
    )


def configure(config) -> None:
    if config.getoption("--machine") not in (None, TARGET):
        raise pytest.UsageError("--machine has to stand on the command line")
    if TARGET is not None:
        attach(config.getoption("--machine-seed"), config.getoption("--machine-errors"))
        config.pluginmanager.register(sys.modules[__name__])


def attach(seed: int = 0, errors: int = 0) -> None:
    """From here on this process runs kernels on the machine."""
    global MACHINE
    from fastreg.bench import machine
    from fastreg.ops import backend

    MACHINE = machine.attach(TARGET, machine.Options(seed=seed, errors=errors))
    backend.INTERPRETED = True  # tensors of the CPU go to the kernels


@pytest.hookimpl(trylast=True)  # when slow tests are gone
def pytest_collection_modifyitems(config, items) -> None:
    """Cases that run no kernel are left out; of the others as many as --cases says."""
    most, seed = config.getoption("--cases"), config.getoption("--seed")
    parameters = {item: item.callspec.params if hasattr(item, "callspec") else {} for item in items}
    taken, number = set(), Counter()
    for item in sorted(items, key=lambda item: random.Random(f"{seed} {item.nodeid}").random()):
        if parameters[item].get("path") != "aten" and (most is None or number[item.function] < most):
            number[item.function] += 1
            taken.add(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in taken])
    items[:] = [item for item in items if item in taken]


_ran: dict[str, tuple[int, list[str]]] = {}  # by test that passed: launches, and the variants of kernels


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """On sm_100 products of matrices are missing: tests of kernels that have one are skipped."""
    from fastreg.bench.machine import Unknown

    MACHINE.ran.clear()
    before = MACHINE.launches
    try:
        result = yield
    except Unknown as error:
        if TARGET == "sm_100" and "tcgen05" in str(error):
            pytest.skip("has a product of matrices, which the machine does not have for sm_100")
        raise
    if MACHINE.ran:
        _ran[item.nodeid] = MACHINE.launches - before, sorted(map(_variant, MACHINE.ran))
    return result


@functools.cache
def _variant(program) -> str:
    """layer_norm.forward:1f2e3d4c: the kernel, and a name of its code."""
    kernel = program.kernel
    stem = kernel.blocks[0][0].source.partition(".")[0]
    stem = kernel_files().get(stem, stem)
    code = "".join(instruction.text for instruction in kernel.instructions())
    return f"{stem}.{kernel.name}:{hashlib.sha1(code.encode()).hexdigest()[:8]}"


@functools.cache
def kernel_files() -> dict[str, str]:
    """The family of each file of tuned kernels: the file itself, or the folder that it is in."""
    root = Path(kernels.__file__).parent
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    return {path.stem: Path(path.parts[0]).stem for path in paths if path.parts[0] != "plain"}


@functools.cache
def all_kernels() -> set[str]:
    """layer_norm.forward and its like: public functions of Triton's in ``kernels/`` that no other one calls."""
    defined, called = set(), set()
    root = Path(kernels.__file__).parent
    for path in [*root.glob("*.py"), *root.glob("channel_norm/*.py")]:
        tree = ast.parse(path.read_text())
        names = {}  # what is imported from where
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                names |= {alias.name: (node.module, alias.name) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                jitted = any(ast.unparse(x).startswith("triton.jit") for x in node.decorator_list)
                if jitted and node.name[0] != "_":
                    defined.add((path.stem, node.name))
            elif isinstance(node, ast.Call):
                module, _, name = ast.unparse(node.func).rpartition(".")
                called.add((module, name) if module else names.get(name, (path.stem, name)))
    return {f"{kernel_files()[module]}.{name}" for module, name in defined - called}


def pytest_sessionfinish(session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["machine"] = _ran
    elif session.config.getoption("--every-kernel") and (missing := all_kernels() - {*_kernels()}):
        print(f"\nnever executed: {', '.join(sorted(missing))}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    _ran.update(getattr(node, "workeroutput", {}).get("machine", {}))


def _kernels() -> Counter[str]:
    """The number of variants of each kernel."""
    variants = {variant for _, variants in _ran.values() for variant in variants}
    return Counter(variant.partition(":")[0] for variant in sorted(variants))


def pytest_terminal_summary(terminalreporter, config) -> None:
    found = _kernels()
    terminalreporter.write_line(
        f"{len(_ran)} tests passed on executed PTX for {TARGET}: {found.total()} variants of {len(found)} kernels "
        f"({', '.join(found)}) in {sum(launches for launches, _ in _ran.values())} launches"
    )
    if (path := config.getoption("--machine-record")) is not None:
        _record(Path(path), terminalreporter.stats, config)


def _record(path: Path, stats: dict, config) -> None:
    """Adds what ran of each file to a JSON file, in the place of an older run of the file."""
    import triton

    content = json.loads(path.read_text()) if path.exists() else {}
    files = content.setdefault(f"{TARGET}, {triton.__version__}", {})
    bad = [report.nodeid for kind in ("failed", "error") for report in stats.get(kind, [])]
    for file in sorted({test.partition("::")[0] for test in [*_ran, *bad]}):
        ran = [its for test, its in _ran.items() if test.startswith(f"{file}::")]
        files[file] = {
            "options": f"-m '{config.getoption('markexpr')}' --cases {config.getoption('--cases')}",
            "tests": len(ran),
            "failed": [test for test in bad if test.startswith(f"{file}::")],
            "launches": sum(launches for launches, _ in ran),
            "variants": sorted({variant for _, variants in ran for variant in variants}),
        }
    path.write_text(json.dumps(content, indent=1) + "\n")

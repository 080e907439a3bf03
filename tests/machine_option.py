"""``pytest --machine sm_90 tests/test_x.py``: kernels are compiled for this target, and their PTX is executed on CPU
tensors (:mod:`fastreg.bench.machine`). ``--machine-seed``: in which order warps and programs come.

Whether kernels are interpreted is decided when they are imported, before pytest knows its options: so the command line
is read here, when ``conftest.py`` imports this, and handed on to processes that this one starts.
"""

import os
import random
import sys
from collections import Counter
from typing import NamedTuple

import pytest
import torch

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
        "--machine-seed", type=int, default=0, help="The order of warps and programs; 0: all in step."
    )


def configure(config) -> None:
    if config.getoption("--machine") not in (None, TARGET):
        raise pytest.UsageError("--machine has to stand on the command line")
    if TARGET is not None:
        attach(config.getoption("--machine-seed"))
        config.pluginmanager.register(sys.modules[__name__])


def attach(seed: int = 0) -> None:
    """From here on this process runs kernels on the machine."""
    global MACHINE
    from fastreg.bench import machine
    from fastreg.ops import backend

    MACHINE = machine.attach(TARGET, machine.Options(seed=seed))
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


class Ran(NamedTuple):
    """What the machine did in the tests, of one process or of all."""

    tests: int = 0  # passed that launched a kernel
    variants: int = 0
    launches: int = 0
    kernels: tuple[str, ...] = ()

    def __add__(self, other: "Ran") -> "Ran":
        numbers = (mine + its for mine, its in zip(self[:3], other[:3], strict=True))
        return Ran(*numbers, tuple(sorted({*self.kernels, *other.kernels})))


_tests = 0
_elsewhere = Ran()


def _here() -> Ran:
    kernels = (program.kernel for program in MACHINE.programs.values())
    names = {f"{kernel.blocks[0][0].source.partition('.')[0]}.{kernel.name}" for kernel in kernels}
    return Ran(_tests, len(MACHINE.programs), MACHINE.launches, tuple(sorted(names)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """On sm_100 products of matrices are missing: tests of kernels that have one are skipped."""
    global _tests
    from fastreg.bench.machine import Unknown

    before = MACHINE.launches
    try:
        result = yield
        _tests += MACHINE.launches > before
        return result
    except Unknown as error:
        if TARGET == "sm_100" and "tcgen05" in str(error):
            pytest.skip("has a product of matrices, which the machine does not have for sm_100")
        raise


def pytest_sessionfinish(session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["machine"] = tuple(_here())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    global _elsewhere
    _elsewhere += Ran(*getattr(node, "workeroutput", {}).get("machine", ()))


def pytest_terminal_summary(terminalreporter) -> None:
    ran = _here() + _elsewhere
    terminalreporter.write_line(
        f"{ran.tests} tests passed on executed PTX for {TARGET}: {ran.variants} variants of {len(ran.kernels)} kernels "
        f"({', '.join(ran.kernels)}) in {ran.launches} launches"
    )

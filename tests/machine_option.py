"""``pytest --machine sm_90 tests/test_x.py``: kernels are compiled for this target, and their PTX is executed on CPU
tensors (:mod:`fastreg.bench.machine`). ``--machine-seed``: in which order warps and programs come.

Whether kernels are interpreted is decided when they are imported, before pytest knows its options: so the command line
is read here, when ``conftest.py`` imports this, and handed on to processes that this one starts.
"""

import os
import sys

import pytest
import torch

_VARIABLE = "FASTREG_TESTS_MACHINE"


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
        "--machine-seed", type=int, default=0, help="The order of warps and programs; 0: all in step."
    )


def attach(config) -> None:
    if config.getoption("--machine") not in (None, TARGET):
        raise pytest.UsageError("--machine has to stand on the command line")
    if TARGET is None:
        return
    from fastreg.bench import machine
    from fastreg.ops import backend

    global MACHINE
    MACHINE = machine.attach(TARGET, machine.Options(seed=config.getoption("--machine-seed")))
    backend.INTERPRETED = True  # tensors of the CPU go to the kernels


def pytest_collection_modifyitems(config, items) -> None:
    """Those cases are left out that run no kernel."""
    parameters = {item: getattr(item, "callspec", None) and item.callspec.params for item in items}
    aten = [item for item in items if (parameters[item] or {}).get("path") == "aten"]
    config.hook.pytest_deselected(items=aten)
    items[:] = [item for item in items if item not in {*aten}]


_tests = 0  # that launched a kernel


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


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(
        f"{_tests} tests passed on executed PTX for {TARGET}: {len(MACHINE.programs)} variants of kernels, "
        f"{MACHINE.launches} launches (of this process)"
    )

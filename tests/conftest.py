"""The kernels run natively where there is a GPU, and through Triton's interpreter on the CPU where there is none."""

import gc
import os
import random
import time
from collections import Counter, defaultdict

import machine_option  # first: it decides whether kernels are interpreted
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported: before fastreg is

from pretended_gpu import gpu, needs_compiler  # noqa: F401

from fastreg.ops import backend as _backend
from fastreg.ops import launch
from fastreg.ops.fused import ACTIVATIONS
from fastreg.ops.multi_tensor import bulk

if _backend.INTERPRETED:
    import interpreter

    interpreter.prepare()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # small sums would wait for a second thread, whose core another worker has


@pytest.fixture
def device() -> torch.device:
    """Where tensors live whose operations run on the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def aten(monkeypatch) -> None:
    """CPU tensors take ATen, as they do for users, and not the interpreter."""
    bulk._compiled()  # what it finds is remembered, and the tests that follow want the loops in C
    monkeypatch.setattr(_backend, "INTERPRETED", False)


@pytest.fixture(params=["kernels", "aten"])
def path(request, monkeypatch) -> str:
    """Runs a test on both backends: the kernels and the ATen definition."""
    if request.param == "aten":
        monkeypatch.setattr(_backend, "runs_kernels", lambda x: False)
    elif not _backend.HAS_TRITON:
        pytest.skip("needs Triton")
    return request.param


@pytest.fixture
def fresh_compiler():
    """torch.compile forgets its graphs before and after a test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def _started(request, tmp_path_factory):
    from processes import Processes

    started: dict[int, Processes] = {}

    def processes(world: int) -> Processes:
        if world not in started:
            started[world] = Processes(world, tmp_path_factory.mktemp("world"), request.module.__name__)
        return started[world]

    processes.stop = lambda: [started.pop(world).stop() for world in list(started)]
    yield processes
    processes.stop()


@pytest.fixture
def processes(_started, request):
    """processes(world): a callable that runs a job. A test that fails may leave them out of step: they start anew."""
    failed = request.session.testsfailed
    yield _started
    if request.session.testsfailed > failed:
        _started.stop()


class _ActivationPasses(TorchDispatchMode):
    """Collects the names of ATen's activations and their derivatives that run: each is a pass of its own."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.removesuffix("_backward") in (*ACTIVATIONS, "threshold", "hardtanh"):
            self.names.add(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def activation_passes() -> type[TorchDispatchMode]:
    return _ActivationPasses


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
    launch.forget()  # a test may change what plans are made of


def pytest_make_parametrize_id(config, val, argname) -> None:
    """Names of tests are the same in every process, or pytest-xdist ends: bytes, as of gzip, may hold the time."""
    if isinstance(val, bytes):
        raise TypeError(f"{argname} is bytes, which may differ from process to process: give the test an id")


@pytest.fixture(autouse=True)
def _kernels_of_any_size(request, monkeypatch) -> None:
    """On a GPU small plain tensors go to ATen, and tests of kernels, which are small, force them."""
    if "as_users" not in request.fixturenames:
        monkeypatch.setattr(_backend, "worth_a_launch", lambda x, operation: True)


@pytest.fixture
def as_users() -> None:
    """Dispatch as users have it."""


_began = time.monotonic()


def pytest_configure(config) -> None:
    machine_option.configure(config)


def pytest_addoption(parser) -> None:
    machine_option.add_options(parser)
    parser.addoption(
        "--stop-after",
        type=float,
        help="Seconds after which tests are left out; until then, cases of all take turns.",
    )
    parser.addoption(
        "--sample", type=float, default=1.0, help="The share of the tests that is run, drawn by --seed."
    )
    parser.addoption(
        "--seed", type=int, default=0, help="Names a sample, which is the same on every machine."
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    most = item.config.getoption("--stop-after")
    if most is not None and time.monotonic() - _began > most:
        pytest.skip("left out: no time")


def pytest_collection_finish(session) -> None:
    """What is there by now stays, thousands of tests among it: garbage is not looked for in it again and again."""
    gc.freeze()


def pytest_sessionfinish(session) -> None:
    gc.unfreeze()


# Thousands of cases, minutes on the interpreter: by default these run on ATen, and with ``-m slow`` on the kernels.
# Tests marked ``sampled`` choose themselves which of their cases run in every run.
_SWEEPS = (
    "test_norm_conformance.py",
    "test_norm_derivatives.py",
    "test_norm_errors.py",
    "test_norm_identities.py",
    "test_norm_layers.py",
)
# On each backend a fifth of the cases of a test runs by default, always the same ones, and no fewer than these; the
# others run with ``-m slow``. Files whose cases are not many of a kind run all of them.
_LEAST = 5
_SMOKE = 2  # cases of a smoke test on each backend
_ALL = (
    "test_gpu_host.py",
    "test_inspect.py",
    "test_compiled.py",
    "test_compiled_masks.py",
    "test_machine.py",
    "test_machine_arithmetic.py",
)
# Tests of some ten seconds each, which compile or start processes: first, so that none is left for the end.
_LONG = (
    "test_gpu_host.py",
    "test_inspect.py",
    "test_compiled.py",
    "test_training.py",
    "test_train_command.py",
    "test_bench.py",
)


def _cases_of_tests(items) -> list[list]:
    """Lists of cases of one test on one backend."""
    found = defaultdict(list)
    for item in items:
        apart = item.path.name in _ALL or "gpu_host" in item.path.parts
        chosen = any(map(item.get_closest_marker, ("slow", "sampled")))
        if hasattr(item, "callspec") and not apart and not chosen:
            found[item.nodeid.partition("[")[0], item.callspec.params.get("path")].append(item)
    return list(found.values())


def _smoke(items) -> None:
    """Two cases of a test marked ``smoke`` keep the mark on each backend: the first two that are not slow."""
    kept = Counter()
    for item in sorted(items, key=lambda item: random.Random(item.name).random()):
        if item.get_closest_marker("smoke"):
            backend = item.callspec.params.get("path") if hasattr(item, "callspec") else None
            kept[item.function, backend] += not item.get_closest_marker("slow")
            if item.get_closest_marker("slow") or kept[item.function, backend] > _SMOKE:
                item.own_markers = [mark for mark in item.own_markers if mark.name != "smoke"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items) -> None:
    for item in items:
        interpreted = getattr(item, "callspec", None) and item.callspec.params.get("path") == "kernels"
        swept = item.path.name in _SWEEPS and not item.get_closest_marker("sampled")
        if swept and interpreted and not torch.cuda.is_available():
            item.add_marker(pytest.mark.slow)
    for cases in _cases_of_tests(items):
        cases.sort(key=lambda item: random.Random(item.name).random())
        for item in cases[max(_LEAST, len(cases) // 5) :]:
            item.add_marker(pytest.mark.slow)
    _smoke(items)
    items.sort(key=lambda item: item.path.name not in _LONG)
    share, seed = config.getoption("--sample"), config.getoption("--seed")
    if share < 1:
        taken = [item for item in items if random.Random(f"{seed} {item.nodeid}").random() < share]
        config.hook.pytest_deselected(items=[item for item in items if item not in {*taken}])
        items[:] = taken
    if config.getoption("--stop-after") is not None:
        turns = Counter()
        turn = {item: turns.update([item.function]) or turns[item.function] for item in items}
        items.sort(key=turn.__getitem__)

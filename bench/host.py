"""What a call takes on the host: the Python and C++ above CUDA's driver, of functions and of steps of optimizers.

With small tensors that is all a call takes. On a GPU calls are launched as they are; elsewhere CPU tensors go the same
way, and a launch does nothing (``idle_gpu.py``). Yardsticks are taken in the same run: an allocation, an
``autograd.Function`` that does no more than that, torch's operations on 16 elements of the CPU, torch's fused steps.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg import functional as ours
from fastreg import optim
from fastreg.ops import backend

from .provenance import provenance

ROUNDS = 6  # over all calls, so that a slow moment of the machine meets none of them alone
BATCHES = 30  # of a call in a round,
LONGEST = 0.3  # or as many as take so many seconds
BATCH = 0.5e-3  # seconds of calls between two looks at the clock
MOST = 100  # calls in between: the queue of a GPU holds their launches
COUNTS, SIZE = (100, 10_000), 64  # tensors of an optimizer, and their elements

FORWARD, TRAINED, BACKWARD = "forward", "forward, with gradients", "backward"
SAME, NEW = "step, same gradients", "step, new gradients"
PARTS = (FORWARD, TRAINED, BACKWARD), (SAME, NEW)  # of a function, and of an optimizer
TRIVIAL = "autograd.Function that allocates"

NOTE = (
    "Process time of a call on one thread, without garbage collection, the least of many batches. A backward pass is "
    "`torch.autograd.grad` on a graph that is kept. Each time in microseconds is followed by its ratio to the forward "
    "pass of an autograd.Function that allocates (of optimizers, and of our functions without a kernel: to torch's "
    "own), and by the goal where there is one. Launches are those of Triton, of each part. What 10,000 tensors take "
    "depends on who else uses the cache of the processor."
)
IDLE = (
    "No GPU: CPU tensors, with Triton's own specialization, cache, kernels for an H100 and launcher in C, and a "
    "libcuda that does nothing. Left out are what CUDA's driver takes for a launch, the switch to the device of the "
    "tensors, torch's allocator for GPUs, and copies of tables from pinned memory. torch's fused steps "
    "compute, on the CPU."
)
REAL = "With the launches, and what CUDA's driver takes for them."


class Call(NamedTuple):
    """A part of a case, to be timed."""

    part: str
    run: Callable[[], Any]
    before: Callable[[], Any] | None = None  # what has to be done before each call, outside of the timing


class Case(NamedTuple):
    name: str
    calls: Callable[[], Iterable[Call]]  # makes tensors, and runs what they need
    yardstick: str = TRIVIAL  # a case: the forward pass of this one, the same part of any other
    goal: float | None = None  # the most that its ratio to the yardstick shall be; backward, twice that
    within: Callable[[], AbstractContextManager] = nullcontext  # where it runs


class _Trivial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return torch.empty_like(dy)


# --- functions --------------------------------------------------------------------------------------------


def _parts(function: Callable[..., Tensor], *tensors: Tensor) -> Iterator[Call]:
    """The three parts of a function of ``tensors``."""
    plain = [x.detach() for x in tensors]
    trained = [x.detach().requires_grad_() for x in tensors]
    yield Call(FORWARD, partial(function, *plain))
    yield Call(TRAINED, partial(function, *trained))
    y = function(*trained)
    yield Call(BACKWARD, partial(torch.autograd.grad, y, trained, torch.empty_like(y), retain_graph=True))


def _norms(of: Any, rows: Tensor, image: Tensor, groups: int) -> dict[str, Callable[[], Iterator[Call]]]:
    """The norms of ``of``, which are torch's functions or ours."""
    columns, channels = rows.shape[-1:], image.shape[1]
    affine = [torch.ones(columns, device=rows.device) for _ in range(2)]
    by_channel = [torch.ones(channels, device=image.device) for _ in range(2)]
    running = torch.zeros(channels, device=image.device), torch.ones(channels, device=image.device)

    def layer_norm(x, weight, bias):
        return of.layer_norm(x, columns, weight, bias)

    def group_norm(x, weight, bias):
        return of.group_norm(x, groups, weight, bias)

    def batch_norm(x, weight, bias):
        return of.batch_norm(x, *running, weight, bias, True)

    return {
        "layer_norm": partial(_parts, layer_norm, rows, *affine),
        "group_norm": partial(_parts, group_norm, image, *by_channel),
        "batch_norm": partial(_parts, batch_norm, image, *by_channel),
    }


def _small(of: Any) -> dict[str, Callable[[], Iterator[Call]]]:
    """Functions on 16 elements of the CPU."""
    x = torch.zeros(4, 4)
    found = {"dropout": partial(_parts, of.dropout, x), **_norms(of, x, torch.zeros(4, 4, 1, 1), 2)}
    return {f"{name}, CPU, 16 elements": calls for name, calls in found.items()}


def yardsticks(device: torch.device) -> Iterator[Case]:
    x, small = torch.zeros(256, 1024, device=device), torch.zeros(4, 4)
    yield Case("torch.empty_like", lambda: [Call(FORWARD, partial(torch.empty_like, x))])
    yield Case(TRIVIAL, partial(_parts, _Trivial.apply, x))
    for name, calls in _small(F).items():
        yield Case(f"torch {name}", calls)
    yield Case("torch linear, CPU, 16 elements", partial(_parts, F.linear, small, small, small[0]))


def functions(device: torch.device) -> Iterator[Case]:
    """On kernels: of tensors that are worth one on a GPU."""
    x = torch.zeros(256, 1024, device=device)
    image = torch.zeros(64, 64, 8, 8, device=device)

    def fused(x, residual):
        return ours.dropout(x, activation="gelu", residual=residual)

    yield Case("dropout", partial(_parts, ours.dropout, x), goal=3)
    yield Case("dropout, gelu, residual", partial(_parts, fused, x, x), goal=3)
    for name, calls in _norms(ours, x, image, 8).items():
        yield Case(name, calls, goal=5)
    # Too few channels for a program to take whole ones: three launches.
    yield Case("batch_norm, split", _norms(ours, x, image.view(64, 4, 32, 32), 2)["batch_norm"])
    weight, bias = torch.zeros(256, 1024, device=device), torch.zeros(256, device=device)
    yield Case("drop_connect_linear", partial(_parts, ours.drop_connect_linear, x, weight, bias))


def without_kernels() -> Iterator[Case]:
    """What ours add to the functions of ATen that they call where no kernel is worth it."""
    aten = partial(mock.patch.object, backend, "INTERPRETED", False)
    for name, calls in _small(ours).items():
        yield Case(name, calls, yardstick=f"torch {name}", within=aten)


# --- optimizers -------------------------------------------------------------------------------------------


class _Optimizer:
    """An optimizer with its tensors, and two sets of gradients."""

    def __init__(self, make: Callable, count: int, device: torch.device):
        self.params = [torch.nn.Parameter(torch.zeros(SIZE, device=device)) for _ in range(count)]
        self.gradients = [[torch.zeros(SIZE, device=device) for _ in self.params] for _ in range(2)]
        self.optimizer = make(self.params)
        self.replace()

    def replace(self) -> None:
        self.gradients.reverse()
        for p, g in zip(self.params, self.gradients[0], strict=True):
            p.grad = g


def _steps(make: Callable, count: int, device: torch.device) -> Iterator[Call]:
    """Each with an optimizer of its own, which remembers whether its gradients are replaced."""
    yield Call(SAME, _Optimizer(make, count, device).optimizer.step)
    new = _Optimizer(make, count, device)
    yield Call(NEW, new.optimizer.step, before=new.replace)


def optimizers(device: torch.device) -> Iterator[Case]:
    sgd = {"lr": 1e-3, "momentum": 0.9}
    options = {"max_grad_norm": 1.0, "max_norm": 10.0, "ema_decay": 0.999}
    for count in COUNTS:

        def case(name: str, make: Callable, count: int = count, **more) -> Case:
            calls = partial(_steps, make, count, device)
            return Case(f"{name}, {count:,} tensors of {SIZE}", calls, **more)

        theirs = case("torch SGD, momentum, fused", partial(torch.optim.SGD, fused=True, **sgd))
        yield theirs._replace(yardstick=theirs.name)
        yield case("SGD, momentum", partial(optim.SGD, **sgd), yardstick=theirs.name)
        theirs = case("torch AdamW, fused", partial(torch.optim.AdamW, fused=True))
        yield theirs._replace(yardstick=theirs.name)
        yield case("AdamW", optim.AdamW, yardstick=theirs.name, goal=1 if count == COUNTS[0] else None)
        with_options = partial(optim.AdamW, **options)
        yield case("AdamW, clip, max-norm, EMA", with_options, yardstick=theirs.name)


# --- timing -----------------------------------------------------------------------------------------------


def cases(device: torch.device) -> list[Case]:
    return [*yardsticks(device), *functions(device), *without_kernels(), *optimizers(device)]


def chosen(found: list[Case], words: Sequence[str]) -> list[Case]:
    """Cases with one of ``words`` in their names, all if there are none, and their yardsticks."""
    names = {case.name for case in found if not words or any(word in case.name for word in words)}
    names |= {case.yardstick for case in found if case.name in names} | {TRIVIAL}
    return [case for case in found if case.name in names]


def _batch(call: Call, count: int) -> float:
    """Seconds of a call, in a batch of ``count``."""
    if call.before is not None:
        call.before()
    run, calls = call.run, range(count)
    start = time.process_time_ns()
    for _ in calls:
        run()
    return (time.process_time_ns() - start) / count / 1e9


def _least(call: Call, finish: Callable[[], Any]) -> float:
    """The least time of a call in the batches of a round. finish: waits for the GPU."""
    found = [_batch(call, 1)]
    count = 1 if call.before is not None else max(1, min(MOST, int(BATCH / found[0])))
    end = time.monotonic() + LONGEST
    while len(found) <= BATCHES and time.monotonic() < end:
        finish()
        found.append(_batch(call, count))
    finish()
    return min(found)


def measure(
    found: Iterable[Case], launches: Callable[[], int | None], finish: Callable[[], Any], rounds: int
) -> list[dict]:
    """A row for each part of each case. launches: how many there were so far, None if that is not known."""
    timed: list[tuple[Case, Call]] = []
    counts: list[int | None] = []
    for case in found:
        with case.within():
            for call in case.calls():
                call.run()  # whatever the first call and the second make and compile
                call.run()
                before = launches()
                call.run()
                counts.append(None if before is None else launches() - before)
                timed.append((case, call))
    least = [float("inf")] * len(timed)
    for _ in range(rounds):
        for i, (case, call) in enumerate(timed):
            with case.within():
                least[i] = min(least[i], _least(call, finish))
    seconds = {(case.name, call.part): time for (case, call), time in zip(timed, least, strict=True)}

    def row(case: Case, call: Call, count: int | None) -> dict:
        mine = seconds[case.name, call.part]
        reference = case.yardstick, FORWARD if case.yardstick == TRIVIAL else call.part
        goal = case.goal and (2 * case.goal if call.part == BACKWARD else case.goal)
        return {
            "case": case.name,
            "part": call.part,
            "launches": count,
            "us": 1e6 * mine,
            "yardstick": reference,
            "ratio": mine / seconds[reference],
            "goal": goal,
        }

    return [row(*pair, count) for pair, count in zip(timed, counts, strict=True)]


def _write(path: Path, rounds: int, words: Sequence[str]) -> None:
    """Measures in this process, and writes the result file."""
    torch.set_num_threads(1)
    gc.disable()
    if torch.cuda.is_available():
        device, note, finish = torch.device("cuda"), REAL, torch.cuda.synchronize
        attached: AbstractContextManager = nullcontext(lambda: None)
    else:
        from . import idle_gpu

        device, note, finish = torch.device("cpu"), IDLE, lambda: None
        attached = idle_gpu.attached()
    with attached as launches:
        rows = measure(chosen(cases(device), words), launches, finish, rounds)
    command = ["python -m bench host", f"--rounds {rounds}", *(f'--cases "{word}"' for word in words)]
    document = {
        "note": f"{NOTE} {note}",
        "provenance": {**provenance(device), "command": " ".join(command)},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def run(path: Path, rounds: int = ROUNDS, words: Sequence[str] = ()) -> dict:
    """Measures, in a process of its own whose kernels are compiled, and writes the result file.

    words: only cases with one of them in their names.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", __name__, str(path), str(rounds), *words]
    subprocess.run(command, env=environment, check=True)
    return json.loads(path.read_text())


if __name__ == "__main__":
    _write(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

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
from collections.abc import Callable, Iterator, Sequence
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

ROUNDS = 8  # over all calls, so that a slow moment of the machine meets none of them alone
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
    "own), and by the goal where there is one. Launches are those of Triton, of each part."
)
IDLE = (
    "No GPU: CPU tensors, with Triton's own specialization, cache, kernels for an H100 and launcher in C, and a "
    "libcuda that does nothing. Left out are what CUDA's driver takes for a launch, its allocator, and copies of "
    "tables from pinned memory."
)
REAL = "With the launches, and what CUDA's driver takes for them."


class Call(NamedTuple):
    """What is timed."""

    case: str
    part: str
    run: Callable[[], Any]
    yardstick: str = TRIVIAL  # a case: the forward pass of this one, the same part of any other
    goal: float | None = None  # the most that its ratio to the yardstick shall be
    before: Callable[[], Any] | None = None  # what has to be done before each call, outside of the timing
    within: Callable[[], AbstractContextManager] = nullcontext

    @property
    def reference(self) -> tuple[str, str]:
        """Case and part of its yardstick."""
        return self.yardstick, FORWARD if self.yardstick == TRIVIAL else self.part


class _Trivial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return torch.empty_like(dy)


# --- functions --------------------------------------------------------------------------------------------


def parts(
    case: str, function: Callable[..., Tensor], tensors: Sequence[Tensor], goal: float | None = None, **more
) -> list[Call]:
    """The three parts of a function of ``tensors``. goal: of forward; backward may take twice that."""
    plain = [x.detach() for x in tensors]
    trained = [x.detach().requires_grad_() for x in tensors]
    with more.get("within", nullcontext)():
        y = function(*trained)
    backward = partial(torch.autograd.grad, y, trained, torch.empty_like(y), retain_graph=True)
    return [
        Call(case, FORWARD, partial(function, *plain), goal=goal, **more),
        Call(case, TRAINED, partial(function, *trained), goal=goal, **more),
        Call(case, BACKWARD, backward, goal=goal and 2 * goal, **more),
    ]


def _norms(of: Any, rows: Tensor, image: Tensor, groups: int) -> dict[str, tuple[Callable, list[Tensor]]]:
    """The norms of ``of`` (torch's functions, or ours) on these tensors: each a function of tensors, and those."""
    columns, channels = rows.shape[-1:], image.shape[1]
    parameters = [torch.ones(channels, device=image.device) for _ in range(2)]
    running = torch.zeros(channels, device=image.device), torch.ones(channels, device=image.device)
    affine = [torch.ones(columns, device=rows.device) for _ in range(2)]
    return {
        "layer_norm": (lambda x, w, b: of.layer_norm(x, columns, w, b), [rows, *affine]),
        "group_norm": (lambda x, w, b: of.group_norm(x, groups, w, b), [image, *parameters]),
        "batch_norm": (lambda x, w, b: of.batch_norm(x, *running, w, b, True), [image, *parameters]),
    }


def yardsticks(device: torch.device) -> Iterator[Call]:
    x = torch.zeros(256, 1024, device=device)
    yield Call("torch.empty_like", FORWARD, partial(torch.empty_like, x))
    yield from parts(TRIVIAL, _Trivial.apply, [x])
    x = torch.zeros(4, 4)
    for name, (function, tensors) in _small(F).items():
        yield from parts(f"torch {name}", function, tensors)
    yield from parts("torch linear, CPU, 16 elements", F.linear, [x, x, x[0]])


def _small(of: Any) -> dict[str, tuple[Callable, list[Tensor]]]:
    """Functions on 16 elements of the CPU."""
    x = torch.zeros(4, 4)
    found = {"dropout": (of.dropout, [x]), **_norms(of, x, torch.zeros(4, 4, 1, 1), 2)}
    return {f"{name}, CPU, 16 elements": value for name, value in found.items()}


def functions(device: torch.device) -> Iterator[Call]:
    """On kernels: with as many elements as they take wherever they are not plain, too."""
    x = torch.zeros(256, 1024, device=device)
    image = torch.zeros(64, 64, 8, 8, device=device)
    yield from parts("dropout", ours.dropout, [x], goal=3)
    fused = partial(ours.dropout, activation="gelu")
    yield from parts("dropout, gelu, residual", lambda x, r: fused(x, residual=r), [x, x], goal=3)
    for name, (function, tensors) in _norms(ours, x, image, 8).items():
        yield from parts(name, function, tensors, goal=5)
    few_channels = image.view(64, 4, 32, 32)
    yield from parts("batch_norm, split", *_norms(ours, x, few_channels, 2)["batch_norm"])
    weight, bias = torch.zeros(256, 1024, device=device), torch.zeros(256, device=device)
    yield from parts("drop_connect_linear", ours.drop_connect_linear, [x, weight, bias])


def without_kernels() -> Iterator[Call]:
    """What ours adds to the functions of ATen that it calls where no kernel is worth it."""
    aten = partial(mock.patch.object, backend, "INTERPRETED", False)
    for name, (function, tensors) in _small(ours).items():
        yield from parts(name, function, tensors, yardstick=f"torch {name}", within=aten)


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


def _steps(case: str, make: Callable, count: int, device: torch.device, **more) -> list[Call]:
    same, new = (_Optimizer(make, count, device) for _ in range(2))
    return [
        Call(case, SAME, same.optimizer.step, **more),
        Call(case, NEW, new.optimizer.step, before=new.replace, **more),
    ]


def optimizers(device: torch.device) -> Iterator[Call]:
    sgd = {"lr": 1e-3, "momentum": 0.9}
    for count in COUNTS:
        where = f"{count:,} tensors of {SIZE}"
        for name, theirs, mine, goal in (
            ("SGD, momentum", partial(torch.optim.SGD, fused=True, **sgd), partial(optim.SGD, **sgd), None),
            ("AdamW", partial(torch.optim.AdamW, fused=True), optim.AdamW, 1 if count == COUNTS[0] else None),
        ):
            yardstick = f"torch {name}, fused, {where}"
            yield from _steps(yardstick, theirs, count, device, yardstick=yardstick)
            yield from _steps(f"{name}, {where}", mine, count, device, yardstick=yardstick, goal=goal)
        options = {"max_grad_norm": 1.0, "max_norm": 10.0, "ema_decay": 0.999}
        case = f"AdamW, clip, max-norm, EMA, {where}"
        yield from _steps(case, partial(optim.AdamW, **options), count, device, yardstick=yardstick)


# --- timing -----------------------------------------------------------------------------------------------


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
    with call.within():
        found = [_batch(call, 1)]
        count = 1 if call.before is not None else max(1, min(MOST, int(BATCH / found[0])))
        end = time.monotonic() + LONGEST
        while len(found) <= BATCHES and time.monotonic() < end:
            finish()
            found.append(_batch(call, count))
        finish()
    return min(found)


def _launches(call: Call, launched: Callable[[], int] | None) -> int | None:
    if launched is None:
        return None
    with call.within():
        before = launched()
        call.run()
        return launched() - before


def measure(
    calls: Sequence[Call], launched: Callable[[], int] | None, finish: Callable[[], Any]
) -> list[dict]:
    """A row for each call. launched: how many launches there were so far."""
    for call in calls:  # whatever the first call and the second make and compile
        for _ in range(2):
            with call.within():
                call.run()
    counts = [_launches(call, launched) for call in calls]
    rounds = [[_least(call, finish) for call in calls] for _ in range(ROUNDS)]
    times = [min(found) for found in zip(*rounds, strict=True)]
    named = {(call.case, call.part): seconds for call, seconds in zip(calls, times, strict=True)}
    return [
        {
            "case": call.case,
            "part": call.part,
            "launches": count,
            "us": 1e6 * seconds,
            "yardstick": call.reference,
            "ratio": seconds / named[call.reference],
            "goal": call.goal,
        }
        for call, count, seconds in zip(calls, counts, times, strict=True)
    ]


def _calls(device: torch.device) -> list[Call]:
    groups = yardsticks(device), functions(device), without_kernels(), optimizers(device)
    return [call for group in groups for call in group]


def _time(path: Path) -> None:
    """Measures in this process, and writes the result file."""
    torch.set_num_threads(1)
    gc.disable()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if gpu:
        launched, finish = None, torch.cuda.synchronize
    else:
        from . import idle_gpu

        launched, finish = idle_gpu.attach().launches, lambda: None
    document = {
        "note": f"{NOTE} {REAL if gpu else IDLE}",
        "provenance": {**provenance(device), "command": "python -m bench host"},
        "rows": measure(_calls(device), launched, finish),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def run(path: Path) -> dict:
    """Measures, in a process of its own, whose kernels are compiled, and writes the result file."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-m", __name__, str(path)], env=environment, check=True)
    return json.loads(path.read_text())


if __name__ == "__main__":
    _time(Path(sys.argv[1]))

"""What our options cost on a CPU, beside the functions of torch that do the same together.

Each case has two sides, ours and torch's, with tensors of their own. They take steps in turns, with new gradients for
each, which are not timed. The time is that of this process on one thread, and the least of all turns counts: other
processes only ever add.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from fastreg import averages, optim, penalties
from fastreg.ops import backend

from .provenance import provenance

SHAPES = {"100 of 64 x 64": ((64, 64),) * 100, "8 of 1,024 x 1,024": ((1024, 1024),) * 8}
REPEATS = 60
NOTE = "Process time of a call on one thread, in turns, the least of all; gradients are new each time."
LR, DECAY, L1, RADIUS, FOLLOW, SCALE = 1e-2, 0.1, 1e-2, 3.0, 1e-3, 1024.0


class Side(NamedTuple):
    call: Callable[[], object]
    results: Callable[[], list[Tensor]]  # what the calls have changed or returned


Make = Callable[[list[nn.Parameter]], Side]


class Case(NamedTuple):
    ours: Make
    torch: Make


def stepped(cls: type, **options) -> Make:
    """Our optimizer with these options."""

    def make(params: list[nn.Parameter]) -> Side:
        optimizer = cls(params, lr=LR, **options)

        def results() -> list[Tensor]:
            return params + [state["ema"] for state in optimizer.state.values() if "ema" in state]

        return Side(optimizer.step, results)

    return make


def around(cls: type, before: Callable = list, after: Callable = list, **options) -> Make:
    """Torch's fused optimizer, and what is done before and after its step. Both take the parameters."""

    def make(params: list[nn.Parameter]) -> Side:
        optimizer = cls(params, lr=LR, fused=True, **options)

        def call() -> None:
            with torch.no_grad():
                before(params)
                optimizer.step()
                after(params)

        return Side(call, lambda: params)

    return make


def gradients(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params]


def decay(params: list[nn.Parameter]) -> None:
    torch._foreach_mul_(params, 1 - LR * DECAY)


def clip(params: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(params, 1.0)


def clip_far(params: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(params, 1e9)


def add_signs(params: list[nn.Parameter]) -> None:
    torch._foreach_add_(gradients(params), torch._foreach_sign(params), alpha=L1)


def shrink(params: list[nn.Parameter]) -> None:
    for p in params:
        nn.functional.softshrink(p, LR * L1, out=p)


def project_rows(params: list[nn.Parameter], radius: float = RADIUS) -> None:
    for p in params:
        torch.renorm(p, 2, 0, radius, out=p)


def project_far(params: list[nn.Parameter]) -> None:
    project_rows(params, 1e9)


def project(params: list[nn.Parameter]) -> None:
    norms = torch.stack(torch._foreach_norm(params))
    torch._foreach_mul_(params, list((RADIUS / norms).clamp(max=1).unbind()))


def cautious(params: list[nn.Parameter]) -> Side:
    """The decay follows the step, which has to keep the old weights for it."""
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=True)

    def call() -> None:
        with torch.no_grad():
            old = [p.detach().clone() for p in params]
            optimizer.step()
            mask = torch._foreach_mul([optimizer.state[p]["exp_avg"] for p in params], old)
            torch._foreach_sign_(mask)
            torch._foreach_add_(mask, 1)
            torch._foreach_clamp_max_(mask, 1)
            torch._foreach_mul_(mask, old)
            torch._foreach_add_(params, mask, alpha=-LR * DECAY)

    return Side(call, lambda: params)


def averaged(make: Make) -> Make:
    """Beside what ``make`` does, an average of the parameters as torch's functions take it."""

    def build(params: list[nn.Parameter]) -> Side:
        side, kept = make(params), [p.detach().clone() for p in params]

        def call() -> None:
            side.call()
            with torch.no_grad():
                torch._foreach_lerp_(kept, params, FOLLOW)

        return Side(call, lambda: params + kept)

    return build


def scaled(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Make:
    """A step by ``torch.amp.GradScaler``."""

    def build(params: list[nn.Parameter]) -> Side:
        optimizer, scaler = make(params), torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(()))

        def call() -> None:
            scaler.step(optimizer)
            scaler.update()

        return Side(call, lambda: params)

    return build


def model_of(params: list[nn.Parameter]) -> nn.Module:
    layers = [nn.Linear(p.shape[1], p.shape[0], bias=False, device="meta") for p in params]
    for layer, p in zip(layers, params, strict=True):
        layer.weight = p
    return nn.Sequential(*layers)


def ema(params: list[nn.Parameter]) -> Side:
    kept = averages.ExponentialMovingAverage(model_of(params), 1 - FOLLOW)
    return Side(kept.update, lambda: list(kept.tensors.values()))


def best(params: list[nn.Parameter]) -> Side:
    kept, improved = averages.BestWeights(model_of(params)), torch.tensor(True)
    return Side(lambda: kept.update(improved), lambda: list(kept.tensors.values()))


def over_model(function: Callable) -> Make:
    """A function of the tensors that are kept and of those that the model has now."""

    def make(params: list[nn.Parameter]) -> Side:
        model, kept = model_of(params), [p.detach().clone() for p in params]

        def call() -> None:
            with torch.no_grad():
                function(kept, list(model.parameters()))

        return Side(call, lambda: kept)

    return make


def averaged_model(function: Callable) -> Make:
    def make(params: list[nn.Parameter]) -> Side:
        model = model_of(params)
        kept = swa_utils.AveragedModel(model, multi_avg_fn=function(1 - FOLLOW))
        kept.update_parameters(model)
        return Side(lambda: kept.update_parameters(model), lambda: list(kept.parameters()))

    return make


def penalized(value: Callable[[list[nn.Parameter]], Tensor]) -> Make:
    """Value and gradient of a penalty, which is added to what the gradients are."""

    def make(params: list[nn.Parameter]) -> Side:
        return Side(lambda: value(params).backward(), lambda: gradients(params))

    return make


def accumulated(add: Callable[[list[nn.Parameter]], Tensor]) -> Make:
    def make(params: list[nn.Parameter]) -> Side:
        return Side(lambda: add(params), lambda: gradients(params))

    return make


@torch.no_grad()
def add_l2(params: list[nn.Parameter]) -> Tensor:
    torch._foreach_add_(gradients(params), params, alpha=DECAY)
    return 0.5 * DECAY * torch.stack(torch._foreach_norm(params)).square().sum()


@torch.no_grad()
def add_l1(params: list[nn.Parameter]) -> Tensor:
    torch._foreach_add_(gradients(params), torch._foreach_sign(params), alpha=L1)
    return L1 * torch.stack(torch._foreach_norm(params, 1)).sum()


def projected(function: Callable) -> Make:
    """A projection of weights that the gradients have moved in between."""

    def make(params: list[nn.Parameter]) -> Side:
        def call() -> None:
            with torch.no_grad():
                torch._foreach_sub_(params, gradients(params))
                function(params)

        return Side(call, lambda: params)

    return make


AdamW, SGD = torch.optim.AdamW, torch.optim.SGD
DECAYED = {"weight_decay": DECAY}

CASES = {
    "AdamW": Case(stepped(optim.AdamW, **DECAYED), around(AdamW, **DECAYED)),
    "Adam": Case(stepped(optim.Adam, **DECAYED), around(torch.optim.Adam, **DECAYED)),
    "SGD": Case(stepped(optim.SGD), around(SGD)),
    "SGD, momentum": Case(stepped(optim.SGD, momentum=0.9), around(SGD, momentum=0.9)),
    "SGDW": Case(
        stepped(optim.SGDW, momentum=0.9, **DECAYED), around(SGD, before=decay, momentum=0.9)
    ),
    "max_grad_norm, clips": Case(
        stepped(optim.AdamW, max_grad_norm=1.0, **DECAYED), around(AdamW, before=clip, **DECAYED)
    ),
    "max_grad_norm, does not": Case(
        stepped(optim.AdamW, max_grad_norm=1e9, **DECAYED), around(AdamW, before=clip_far, **DECAYED)
    ),
    "SGD, max_grad_norm": Case(
        stepped(optim.SGD, momentum=0.9, max_grad_norm=1.0), around(SGD, before=clip, momentum=0.9)
    ),
    "GradScaler": Case(
        scaled(lambda params: optim.AdamW(params, lr=LR)),
        scaled(lambda params: AdamW(params, lr=LR, fused=True)),
    ),
    "decouple_lr": Case(
        stepped(optim.AdamW, decouple_lr=True, weight_decay=LR * DECAY), around(AdamW, **DECAYED)
    ),
    "cautious": Case(stepped(optim.AdamW, cautious=True, **DECAYED), cautious),
    "l1, proximal": Case(stepped(optim.AdamW, l1=L1, **DECAYED), around(AdamW, after=shrink, **DECAYED)),
    "l1, subgradient": Case(
        stepped(optim.AdamW, l1=L1, l1_mode="subgradient", **DECAYED),
        around(AdamW, before=add_signs, **DECAYED),
    ),
    "max_norm": Case(stepped(optim.AdamW, max_norm=RADIUS, **DECAYED), around(AdamW, after=project, **DECAYED)),
    "max_norm of rows": Case(
        stepped(optim.AdamW, max_norm=RADIUS, max_norm_dim=0, **DECAYED),
        around(AdamW, after=project_rows, **DECAYED),
    ),
    "max_norm of rows, all inside": Case(
        stepped(optim.AdamW, max_norm=1e9, max_norm_dim=0, **DECAYED),
        around(AdamW, after=project_far, **DECAYED),
    ),
    "ema_decay": Case(
        stepped(optim.AdamW, ema_decay=1 - FOLLOW, **DECAYED), averaged(around(AdamW, **DECAYED))
    ),
    "clip, max_norm of rows, ema_decay": Case(
        stepped(
            optim.AdamW, max_grad_norm=1.0, max_norm=RADIUS, max_norm_dim=0, ema_decay=1 - FOLLOW, **DECAYED
        ),
        averaged(around(AdamW, before=clip, after=project_rows, **DECAYED)),
    ),
    "ExponentialMovingAverage": Case(
        ema, over_model(lambda kept, now: torch._foreach_lerp_(kept, now, FOLLOW))
    ),
    "get_ema_multi_avg_fn": Case(
        averaged_model(averages.get_ema_multi_avg_fn), averaged_model(swa_utils.get_ema_multi_avg_fn)
    ),
    "BestWeights": Case(best, over_model(torch._foreach_copy_)),
    "penalties.l2": Case(
        penalized(lambda params: penalties.l2(params, DECAY)),
        penalized(lambda params: 0.5 * DECAY * sum(p.square().sum() for p in params)),
    ),
    "penalties.l1": Case(
        penalized(lambda params: penalties.l1(params, L1)),
        penalized(lambda params: L1 * sum(p.abs().sum() for p in params)),
    ),
    "penalties.l2, accumulate": Case(
        accumulated(lambda params: penalties.l2(params, DECAY, accumulate=True)), accumulated(add_l2)
    ),
    "penalties.l1, accumulate": Case(
        accumulated(lambda params: penalties.l1(params, L1, accumulate=True)), accumulated(add_l1)
    ),
    "max_norm_": Case(
        projected(lambda params: penalties.max_norm_(params, RADIUS)), projected(project)
    ),
    "max_norm_ of rows": Case(
        projected(lambda params: penalties.max_norm_(params, RADIUS, dim=0)), projected(project_rows)
    ),
}  # fmt: skip


class _Turns:
    """The two sides of a case, beside each other."""

    def __init__(self, name: str, shapes: tuple):
        values = [torch.randn(shape) / math.sqrt(shape[-1]) for shape in shapes]
        self.params = [[nn.Parameter(x.clone()) for x in values] for _ in range(2)]
        self.sides = [make(params) for make, params in zip(CASES[name], self.params, strict=True)]
        self.gradients = [torch.randn(shape) * (SCALE if name == "GradScaler" else 1) for shape in shapes]

    def turn(self) -> tuple[float, float]:
        """Seconds of each side."""
        found = []
        for params, side in zip(self.params, self.sides, strict=True):
            for p, g in zip(params, self.gradients, strict=True):
                p.grad = g.clone()
            start = time.process_time()
            side.call()
            found.append(time.process_time() - start)
        return tuple(found)


def results(name: str, shapes: tuple, calls: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """What each side has after some calls."""
    turns = _Turns(name, shapes)
    for _ in range(calls):
        turns.turn()
        for g in turns.gradients:
            g.neg_().add_(0.1)
    return tuple(side.results() for side in turns.sides)


def measure(name: str, shapes: tuple, repeats: int) -> dict[str, float]:
    """Milliseconds of each side."""
    turns = _Turns(name, shapes)
    times = [turns.turn() for _ in range(repeats)]
    ours, theirs = (1e3 * min(side) for side in zip(*times, strict=True))
    return {"ours_ms": ours, "torch_ms": theirs}


def run(path: Path) -> dict:
    """Measures and writes the result file. Where kernels are interpreted, in a process of its own without them."""
    if backend.INTERPRETED:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        subprocess.run([sys.executable, "-m", __name__, str(path)], env=environment, check=True)
        return json.loads(path.read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [
            {"case": name, "tensors": size, **measure(name, shapes, REPEATS)}
            for size, shapes in SHAPES.items()
            for name in CASES
        ]
    finally:
        torch.set_num_threads(threads)
    document = {
        "note": NOTE,
        "provenance": {**provenance(torch.device("cpu")), "command": "python -m bench pieces"},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return document


if __name__ == "__main__":
    run(Path(sys.argv[1]))

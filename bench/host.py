"""What a step of an optimizer takes on the host: everything but its launches, which are left out.

With thousands of small tensors that is all a step takes. The time is that of this process, per tensor, for 10,000
parameters of 64 elements. The steps go the way of the kernels: on a GPU with its tensors, elsewhere with tensors that
are meant for the interpreter, which never gets to run.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from fastreg import optim
from fastreg.ops import backend

from .provenance import provenance

TENSORS, SIZE, REPEATS = 10_000, 64, 300
NOTE = "Process time per tensor of a step without its launches, the least of all repetitions. Says nothing of a kernel."
OPTIMIZERS = {
    "SGD, momentum": lambda params: optim.SGD(params, lr=1e-3, momentum=0.9),
    "AdamW": optim.AdamW,
    "AdamW, clip, max-norm, EMA": lambda params: optim.AdamW(
        params, max_grad_norm=1.0, max_norm=10.0, ema_decay=0.999
    ),
}


class _Stepper:
    """An optimizer with its tensors."""

    def __init__(self, make: Callable, device: torch.device, tensors: int):
        self.params = [
            torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float32, device=device)) for _ in range(tensors)
        ]
        self.gradients = [
            [torch.zeros(SIZE, dtype=torch.float32, device=device) for _ in self.params] for _ in range(2)
        ]
        self.optimizer = make(self.params)
        self.replace()

    def replace(self) -> None:
        self.gradients.reverse()
        for p, g in zip(self.params, self.gradients[0], strict=True):
            p.grad = g

    def time(self, replace: bool = False) -> float:
        """Nanoseconds per tensor of a step, with new gradients or the same."""
        if replace:
            self.replace()
        start = time.process_time_ns()
        self.optimizer.step()
        return (time.process_time_ns() - start) / len(self.params)


def measure(device: torch.device, tensors: int, repeats: int) -> list[dict]:
    """A row for each optimizer, with nothing changed since the last step, and with all gradients replaced."""
    rows = []
    with mock.patch.object(backend.Launch, "run"):
        for name, make in OPTIMIZERS.items():
            stepper = _Stepper(make, device, tensors)
            stepper.time()  # makes state and tables
            unchanged = min(stepper.time() for _ in range(repeats))
            replaced = min(stepper.time(replace=True) for _ in range(repeats))
            rows.append({"optimizer": name, "unchanged_ns": unchanged, "replaced_ns": replaced})
    return rows


def run(path: Path) -> dict:
    """Measures and writes the result file. Without a GPU in a process of its own, whose tensors kernels take."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not backend.INTERPRETED:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, "-m", __name__, str(path)], env=environment, check=True)
        return json.loads(path.read_text())
    document = {
        "note": NOTE,
        "provenance": {**provenance(device), "command": "python -m bench host"},
        "tensors": TENSORS,
        "elements": SIZE,
        "rows": measure(device, TENSORS, REPEATS),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return document


if __name__ == "__main__":
    run(Path(sys.argv[1]))

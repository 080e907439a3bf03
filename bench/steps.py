"""Times one training step of whole networks, with our layers and with torch's: what all of it together changes.

Forward, backward and the optimizer's step, in bf16 autocast; images channels_last.

    python -m bench steps

The networks are those of ``networks.py``. Every implementation starts from the same weights; its logits in
evaluation mode have to agree with the others' before it is timed. The optimizer is torch's fused one
beside its layers, and ours beside ours.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreg import optim

from .harness import SCHEMA, Cpu, Cuda, explain, summary, time_limit
from .networks import FUSED, GPT, PLAIN, Layers, ResNet
from .provenance import provenance
from .report import STEPS


@dataclass(frozen=True)
class Network:
    """``build(layers)`` makes it, ``batch(device)`` its input and target; ``optimizer`` is a class of torch.optim with
    its arguments."""

    name: str
    build: Callable[[Layers], nn.Module]
    batch: Callable[[torch.device], tuple[Tensor, Tensor]]
    optimizer: tuple[type, dict]


def images(count: int, side: int, classes: int):
    def batch(device: torch.device) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 3, side, side, device=device).to(memory_format=torch.channels_last)
        return x, torch.randint(classes, (count,), device=device)

    return batch


def tokens(count: int, length: int, vocabulary: int):
    def batch(device: torch.device) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(vocabulary, (count, length + 1), device=device)
        return drawn[:, :-1], drawn[:, 1:]

    return batch


SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-5})
ADAMW = (torch.optim.AdamW, {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1})

NETWORKS = (
    Network("ResNet-50, batch 256, 224x224", ResNet, images(256, 224, 1000), SGD),
    Network("GPT, 12 blocks of 768, batch 16 x 1024", GPT, tokens(16, 1024, 50304), ADAMW),
)
# The same code on a CPU: it shows that the stages run.
SMALL_NETWORKS = (
    Network("small ResNet", partial(ResNet, depths=(1, 1), channels=8, classes=10), images(2, 32, 10), SGD),
    Network(
        "small GPT",
        partial(GPT, depth=2, width=32, heads=2, context=16, vocabulary=50),
        tokens(2, 16, 50),
        ADAMW,
    ),
)


def networks_of(device: torch.device) -> tuple[Network, ...]:
    return NETWORKS if device.type == "cuda" else SMALL_NETWORKS


@dataclass(frozen=True)
class Implementation:
    name: str
    layers: Layers
    compiled: bool = False


IMPLEMENTATIONS = (
    Implementation("fastreg", FUSED),
    Implementation("torch", PLAIN),
    Implementation("compile", PLAIN, compiled=True),
    Implementation("fastreg + compile", FUSED, compiled=True),
)


class Step:
    """A network with everything that it takes to train it; calling it makes one step."""

    def __init__(self, network: Network, implementation: Implementation, device: torch.device) -> None:
        torch.manual_seed(0)  # the same weights for all
        self.device = device
        self.model = network.build(implementation.layers).to(device)
        self.input, self.target = network.batch(device)
        if self.input.dim() == 4:
            self.model.to(memory_format=torch.channels_last)
        theirs, arguments = network.optimizer
        if implementation.layers is FUSED:
            self.optimizer = getattr(optim, theirs.__name__)(self.model.parameters(), **arguments)
        else:
            self.optimizer = theirs(self.model.parameters(), **arguments, fused=True)
        self.forward = torch.compile(self.model) if implementation.compiled else self.model

    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return F.cross_entropy(self.forward(self.input).flatten(0, -2), self.target.flatten())

    @torch.no_grad()
    def evaluated(self) -> Tensor:
        """The logits of the first example in evaluation mode, where no chance is left: the same for all."""
        self.model.eval()
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(self.input[:1])
        self.model.train()
        return logits.float()

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def launches(step: Step) -> int | None:
    """How many kernels and copies one step puts on the GPU."""
    if step.device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def measure(
    network: Network, implementations: Iterable[Implementation], clock, device, budget: float, limit: float
):
    """A row for each implementation: its time, peak memory and launches, or what went wrong."""
    expected = None
    for implementation in implementations:
        row = {"case": network.name, "implementation": implementation.name, "method": None, "error": None}
        step = None
        try:
            with time_limit(limit):
                step = Step(network, implementation, device)
                logits = step.evaluated()
                expected = logits if expected is None else expected
                difference = float((logits - expected).norm() / expected.norm())
                if not difference < 0.05:  # bf16 rounds to 2^-9, in each of some fifty layers
                    raise ValueError(f"the logits differ from the others' by {100 * difference:.1f} %")
                step()
                row["peak_memory"] = clock.peak_memory(step)
                row["launches"] = launches(step)
                row["method"], timer = next(iter(clock.methods(1 << 40).items()))
                row |= summary(timer(lambda step=step: step, budget))
                if not torch.isfinite(step()):
                    raise ValueError("the loss is not finite any more")
        except Exception as error:
            row["error"] = explain(error)
        del step
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch._dynamo.reset()
        yield row


def run(
    folder: Path,
    device: torch.device,
    *,
    networks: Iterable[Network] | None = None,
    names: tuple[str, ...] = (),
    budget: float = 5.0,
    limit: float = 300.0,
    clock=None,
    tell: Callable[[dict], None] = lambda row: None,
) -> Path:
    """Measures every network with every implementation (of ``names``, all if empty) and returns the result file,
    which is written anew after each. ``budget``: seconds of one timing; ``limit``: of one implementation."""
    gpu = device.type == "cuda"
    clock = clock or (Cuda(device) if gpu else Cpu())
    networks = networks or networks_of(device)
    chosen = [i for i in IMPLEMENTATIONS if not names or i.name in names]
    origin = provenance(device)
    document = {
        "schema": SCHEMA,
        "family": STEPS,
        "dtype": "bf16",
        "quick": False,
        "complete": False,
        "provenance": origin,
        "rows": [],
    }
    path = folder / f"{STEPS}-{origin['date'][:10]}-{origin['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for network in networks:
        for row in measure(network, chosen, clock, device, budget, limit):
            document["rows"].append(row)
            path.write_text(json.dumps(document, indent=1) + "\n")
            tell(row)
    document["complete"] = True
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path

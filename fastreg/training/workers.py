"""The processes that train together, one of them or as many as torchrun started."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastreg.training.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """This process's place among ``count`` processes. With one process, everything here costs nothing.

    Attributes:
        rank: 0 for the process that prints and writes.
        count: number of processes.
        device: what this process computes on.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shard(self, items: Tensor) -> Tensor:
        """This worker's share of ``items`` ``(N, ...)``: every ``count``-th, sizes differ by at most one."""
        return items[self.rank :: self.count]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over the workers, computed in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, item: T) -> list[T]:
        """The ``item`` of every worker, by rank, on every worker."""
        if self.count == 1:
            return [item]
        items: list[Any] = [None] * self.count
        dist.all_gather_object(items, item)
        return items

    def from_first(self, function: Callable[[], T]) -> T:
        """Calls ``function()`` on the first worker; all workers return its result, or raise its InputError."""
        if self.count == 1:
            return function()
        box: list[Any] = [None]
        if self.is_first:
            try:
                box = [function()]
            except InputError as error:
                box = [error]
        dist.broadcast_object_list(box, device=self.device)
        if isinstance(box[0], InputError):
            raise box[0]
        return box[0]

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model``, averaging its gradients over the workers."""
        if self.count == 1:
            return model
        device_ids = [self.device] if self.device.type == "cuda" else None
        # The buffers may differ until average_buffers. DDP would let the first worker's win, at every step.
        return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)

    def average_buffers(self, model: nn.Module) -> None:
        """Give all workers the mean of their buffers: batch norm's statistics, each of its own examples."""
        if self.count > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():  # and not the number of batches, the same everywhere
                    self.sum(buffer).div_(self.count)


def process_count() -> int:
    """How many processes torchrun started, or 1."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


@contextmanager
def join_workers(device: str) -> Iterator[Workers]:
    """Join the other processes, each with its own GPU where ``device`` is "cuda", and part in the end.

    A process that fails leaves at once and without a word to the others: torchrun ends them, and what waits
    for a message from it breaks off.
    """
    count = process_count()
    if count == 1:
        yield Workers(0, 1, torch.device(device))
        return
    if device.startswith("cuda"):
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device != "cuda":
            raise InputError(
                f"'--device {device}' under torchrun: give 'cuda', each process takes its own GPU"
            )
        if local_rank >= gpus:
            raise InputError(f"torchrun started more processes than this machine has GPUs ({gpus})")
        own_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(own_device)
        dist.init_process_group("nccl", device_id=own_device)
    else:
        own_device = torch.device(device)
        dist.init_process_group("gloo")
    yield Workers(dist.get_rank(), count, own_device)
    dist.destroy_process_group()

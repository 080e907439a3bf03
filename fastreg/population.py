"""Population statistics of batch normalization, measured with the weights frozen.

Over minibatches B of m values a channel, Algorithm 2 of Ioffe and Szegedy 2015 (arXiv 1502.03167) sets

    E[x] = E_B[mu_B],    Var[x] = m / (m - 1) E_B[sigma_B²]

where training leaves an exponential average over weights that were still moving.
"""

import contextlib
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from fastreg.ops.fused import sum_dtype

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE = 2.0
"""Seconds that a pass takes before its progress is shown."""


def update_bn(
    model: torch.nn.Module,
    loader: Iterable[Any],
    *,
    estimator: str = "minibatch",
    device: torch.device | str | int | None = None,
    max_batches: int | None = None,
    progress: bool | None = None,
) -> None:
    """Sets the running statistics of all batch normalization layers to those of the data, weights frozen.

        fastreg.update_bn(model, loader)  # after training, or after averaging weights
        model.eval()

    One pass over ``loader`` without gradients. Batch normalization normalizes by the statistics of each minibatch,
    as in training; every other module is in evaluation mode, so dropout is off, as it is at inference
    (:func:`torch.optim.swa_utils.update_bn` leaves it on). Works on ``torch.nn``'s layers, fastreg's and
    ``SyncBatchNorm``, whose minibatch is that of all processes.

    Afterwards ``running_mean`` and ``running_var`` hold the estimate and ``num_batches_tracked`` the number of
    minibatches in it; modes, momentum and everything else are as before. Left as they are: layers that do not track
    statistics, layers that are frozen (in evaluation mode inside a model in training mode), layers that the model
    never calls, and instance normalization. A layer called k times in a forward pass counts k minibatches.

    Statistics are taken in fp32 (fp64 of fp64) and gathered in fp64 on the layer's device, without waiting for it,
    whatever the dtype of the buffers. Wrappers are bypassed: compiled parts run eagerly, and in a ``DataParallel``
    or ``DistributedDataParallel`` model each process takes the statistics of its own loader.

    Args:
        model: called with each batch.
        loader: gives tensors, or lists or tuples whose first element the model is called with, or mappings: its
            keyword arguments.
        estimator: "minibatch" averages the minibatches' means and unbiased variances, each minibatch counting the
            same: Algorithm 2. "pooled" takes mean and unbiased variance of all values together, merged as Chan,
            Golub and LeVeque (1983) do it: it includes the variance between minibatches, and a last, smaller
            batch counts less.
        device: where to move the batches; None: they are passed on as they are.
        max_batches: read at most so many.
        progress: None shows a bar if rich is installed, stderr is a terminal and the pass takes longer than two
            seconds. True shows it from the first batch on, False never.

    Raises:
        ValueError: there is no batch, or no layer was called; a layer's statistics are not finite in its buffers'
            dtype; parameters are not initialized yet; an argument is out of range.
        ImportError: ``progress=True`` without rich.

    Whatever is raised, the model is unchanged.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"update_bn(model, loader): expected a module first, but got a {type(model).__name__}"
        )
    if estimator not in _ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}: choose one of {', '.join(_ESTIMATORS)}")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches has to be at least 1, but got {max_batches}")
    model = unwrapped(model)
    if any(is_lazy(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise ValueError("the model has parameters that are not initialized: call it on a batch first")
    layers = {
        module: _ESTIMATORS[estimator]()
        for module in model.modules()
        if _is_tracked(module) and (module.training or not model.training)
    }
    if not layers:
        return
    bar = _progress_bar(loader, max_batches, progress)
    batches = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # nothing is compiled for one pass with hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_measuring(model, layers))
        if bar is not None:
            stack.callback(bar.stop)
        begin = time.monotonic()
        for batch in itertools.islice(loader, max_batches):
            if bar is not None and (progress or time.monotonic() - begin > PATIENCE):
                bar.start()
            _call(model, batch, device)
            batches += 1
            if bar is not None:
                bar.advance(bar.task_ids[0])
    if not batches:
        raise ValueError("the loader gave no batch: there is nothing to take statistics of")
    _store(model, {layer: estimate for layer, estimate in layers.items() if estimate.calls})


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside ``torch.compile`` and torch's data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # of torch.compile
        if isinstance(inner, torch.nn.Module):
            model = inner
        elif isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def _is_tracked(module: torch.nn.Module) -> TypeGuard[_BatchNorm]:
    return (
        isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
        and module.running_var is not None
    )


class _Estimator(Protocol):
    calls: int

    def add(self, count: int | Tensor, mean: Tensor, deviations: Tensor) -> None: ...

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance."""


def _zero() -> Tensor:
    """The zero that sums start from, on any device."""
    return torch.zeros((), dtype=torch.float64, device="cpu")


class _Minibatch:
    """The averages over minibatches of the mean and of the unbiased variance."""

    def __init__(self) -> None:
        self.calls, self.mean, self.variance = 0, _zero(), _zero()

    def add(self, count: int | Tensor, mean: Tensor, deviations: Tensor) -> None:
        self.calls += 1
        self.mean = self.mean + mean
        self.variance = self.variance + deviations / (count - 1)

    def result(self) -> tuple[Tensor, Tensor]:
        return self.mean / self.calls, self.variance / self.calls


class _Pooled:
    """Mean and unbiased variance of all values together."""

    def __init__(self) -> None:
        self.count: int | Tensor = 0
        self.calls, self.mean, self.deviations = 0, _zero(), _zero()

    def add(self, count: int | Tensor, mean: Tensor, deviations: Tensor) -> None:
        self.calls += 1
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.deviations = self.deviations + deviations + difference.square() * (self.count * (count / total))
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.deviations / (self.count - 1)


_ESTIMATORS: dict[str, Callable[[], _Estimator]] = {"minibatch": _Minibatch, "pooled": _Pooled}


@contextlib.contextmanager
def _measuring(model: torch.nn.Module, layers: dict[_BatchNorm, _Estimator]) -> Iterator[None]:
    """Inside, ``layers`` normalize by minibatch statistics and note them; the rest is in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    handles = []
    try:
        for module in modes:
            module.training = module in layers
        for layer, estimate in layers.items():
            layer.track_running_stats = False  # in training mode: batch statistics, and no buffer changes
            hook = functools.partial(_note, estimate)
            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.track_running_stats = True
        for module, mode in modes.items():
            module.training = mode


def _note(estimate: _Estimator, layer: torch.nn.Module, args: tuple, kwargs: dict, _output: Any) -> None:
    """A forward hook, so that the layer has already checked its input."""
    x = args[0] if args else kwargs["input"]
    count, mean, deviations = _moments(x)
    group = _process_group(layer)
    if group is not None:
        estimate.add(*_of_all_processes(count, mean, deviations, group))
    elif count != 0:  # an empty batch is none
        estimate.add(count, mean, deviations)


def _moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Of ``x`` [N, C, ...]: values a channel; their mean and sum of squared deviations, fp64 [C]."""
    count = math.prod((x.size(0), *x.shape[2:]))
    if count == 0:
        return 0, x.new_zeros(x.size(1), dtype=torch.float64), x.new_zeros(x.size(1), dtype=torch.float64)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    variance, mean = torch.var_mean(x.to(sum_dtype(x.dtype)), dims, correction=0)
    return count, mean.double(), variance.double() * count


def _process_group(layer: torch.nn.Module) -> Any:
    """The processes whose batches ``layer`` normalizes together, or None."""
    distributed = torch.distributed
    if not isinstance(layer, torch.nn.SyncBatchNorm):
        return None
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = layer.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def _of_all_processes(
    count: int, mean: Tensor, deviations: Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    own = torch.cat([mean.new_full((1,), count), mean, deviations])
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(every, own, group)
    counts, means, deviations = torch.stack(every).split([1, mean.numel(), mean.numel()], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return total, mean, (deviations + counts * (means - mean).square()).sum(0)


def _call(model: torch.nn.Module, batch: Any, device: torch.device | str | int | None) -> None:
    def moved(value: Any) -> Any:
        return (
            value if device is None or not isinstance(value, Tensor) else value.to(device, non_blocking=True)
        )

    if isinstance(batch, Mapping):
        model(**{name: moved(value) for name, value in batch.items()})
    else:
        model(moved(batch[0] if isinstance(batch, (list, tuple)) else batch))


def _store(model: torch.nn.Module, layers: dict) -> None:
    """Writes the estimates into the buffers, all or none."""
    if not layers:
        raise ValueError("the model called none of its batch normalization layers, or on empty batches only")
    names = {module: name for name, module in model.named_modules()}
    results = {}
    for layer, estimate in layers.items():
        mean, variance = estimate.result()
        mean, variance = mean.to(layer.running_mean), variance.to(layer.running_var)
        if not (mean.isfinite() & variance.isfinite()).all():
            raise ValueError(
                f"the statistics of layer {names[layer]!r} are not finite in {layer.running_var.dtype}: "
                "the data or the weights hold NaN, Inf or values too large"
            )
        results[layer] = mean, variance, estimate.calls
    with torch.no_grad():
        for layer, (mean, variance, calls) in results.items():
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(calls)


def _progress_bar(loader: Iterable[Any], max_batches: int | None, progress: bool | None) -> "Progress | None":
    """A bar that is not started yet, or None."""
    if progress is False:
        return None
    try:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress
    except ImportError:
        if progress:
            raise ImportError("progress=True needs rich: pip install rich") from None
        return None
    console = Console(stderr=True)
    if not (progress or console.is_interactive or console.is_jupyter):
        return None
    total = max_batches
    with contextlib.suppress(TypeError):  # of a loader that does not know
        if isinstance(loader, Sized):
            total = len(loader) if max_batches is None else min(len(loader), max_batches)
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console)
    bar.add_task("batch statistics", total=total)
    return bar

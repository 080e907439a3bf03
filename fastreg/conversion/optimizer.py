"""``convert_optimizer``: torch's optimizers onto fastreg's."""

import weakref
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch.optim import Optimizer

from fastreg import optim
from fastreg.optim.options import OPTIONS

OURS: dict[type[Optimizer], type[Optimizer]] = {
    torch.optim.SGD: optim.SGD,
    torch.optim.Adam: optim.Adam,
    torch.optim.AdamW: optim.AdamW,
}

AnOptimizer = TypeVar("AnOptimizer", bound=Optimizer)


def convert_optimizer(optimizer: AnOptimizer) -> AnOptimizer:
    """Puts torch's ``SGD``, ``Adam`` or ``AdamW`` onto fastreg's, in place.

        optimizer = fastreg.convert_optimizer(optimizer)

    Its class changes, and nothing else: groups, state, hooks, and schedulers that refer to it stay. The groups get
    fastreg's options, all of them off: set them there, or in groups that are added later.

    Args:
        optimizer: of exactly one of these classes. One of fastreg's is returned as it is.

    Returns: ``optimizer``.

    Raises:
        TypeError: another class, or no optimizer.
        RuntimeError: something other than a scheduler of torch replaced its ``step``. Nothing was changed.
    """
    if type(optimizer) in OURS.values():
        return optimizer
    ours = OURS.get(type(optimizer))
    if ours is None:
        known = ", ".join(f"torch.optim.{kind.__name__}" for kind in OURS)
        raise TypeError(f"expected one of {known}, but got a {type(optimizer).__name__}")
    own: Any = vars(optimizer)
    scheduled = hasattr(own.get("step"), "_wrapped_by_lr_sched")
    if "step" in own and not scheduled:
        raise RuntimeError("the optimizer's step was replaced: convert the optimizer before that")
    own.pop("step", None)
    own.pop("_step_supports_amp_scaling", None)  # the class says it
    optimizer.__class__ = cast("type[AnOptimizer]", ours)
    optimizer.defaults.update(OPTIONS)
    optimizer.__setstate__({})  # as of an optimizer whose pickle is of an older version
    if scheduled:
        own["step"] = _noted(optimizer)
    return optimizer


def _noted(optimizer: Optimizer) -> Any:
    """The step of its class, and a note that it was called, which the schedulers of torch look for."""
    found, function = weakref.ref(optimizer), type(optimizer).step

    @wraps(function)
    def step(*arguments: Any, **keywords: Any) -> Any:
        here = found()
        assert here is not None
        here._opt_called = True  # type: ignore[attr-defined]
        return function(here, *arguments, **keywords)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return step

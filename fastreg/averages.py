r"""Averages of weights over a training, and the best weights of one, for all tensors of a model in one launch.

    ema = fastreg.ExponentialMovingAverage(model, decay=0.999)
    best = fastreg.BestWeights(model)
    for ...:
        optimizer.step()
        ema.update()
    with ema.applied():
        loss = validate(model)
    best.update(loss < lowest)  # on the device: nothing waits for it
    ...
    best.restore()

Both read the tensors of the model anew each time, so that the model may be moved, or loaded with ``assign=True``. Where
its tensors have other names or shapes than before, or weights are no longer tied, they raise an error and change
nothing.
Where an optimizer takes every step that is averaged, ``ema_decay`` of :mod:`fastreg.optim` costs 8 bytes a weight in
place of 12.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreg.ops.arguments import integer, real
from fastreg.ops.layout import check_written
from fastreg.ops.multi_tensor.averages import copy_, copy_if_, follow_
from fastreg.ops.multi_tensor.bulk import Watch
from fastreg.ops.multi_tensor.optimizers import compute_dtype
from fastreg.optim.distributed import local, local_pairs

__all__ = ["BestWeights", "ExponentialMovingAverage", "get_ema_multi_avg_fn"]


class _Tensors:
    """The parameters and buffers of a model by name, tied ones once: as they are at the moment."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._places = self._find()
        self.names = list(self._places)

    def _find(self) -> dict[str, tuple[dict, str]]:
        """In which dict, and by which key, each tensor is."""
        model = self._model
        self._modules = list(model.modules())  # none of them ends, and leaves its id to another
        self._dicts = [x for m in self._modules for x in (m._modules, m._parameters, m._buffers)]
        self._keys = list(chain.from_iterable(self._dicts))
        self._watch = Watch([], self._dicts)
        names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        places = {}
        for path, module in model.named_modules():
            for kept in (module._parameters, module._buffers):
                for key in kept:
                    name = f"{path}.{key}" if path else key
                    if name in names:
                        places[name] = kept, key
        return places

    def now(self) -> list[Tensor]:
        """
        Raises:
            ValueError: the names are no longer the same.
        """
        if not self._watch.finds([], self._dicts) or list(chain.from_iterable(self._dicts)) != self._keys:
            self._places = self._find()
        if len(self._places) != len(self.names) or list(self._places) != self.names:
            raise ValueError(_differing("the model", list(self._places), self.names))
        return [kept[key] for kept, key in self._places.values()]


class _Kept:
    """Tensors beside those of a model, which can be saved, loaded, and written into the model."""

    def __init__(self, model: torch.nn.Module, keep: Callable[[Tensor], Tensor]) -> None:
        self.model = model
        self._tensors = _Tensors(model)
        now = self._tensors.now()
        for name, x in zip(self._tensors.names, now, strict=True):
            check_written(local(x), name)
        self._kept = [keep(x.detach()) for x in now]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by the names of the model. The next update changes it."""
        return dict(zip(self._tensors.names, self._kept, strict=True))

    @torch.no_grad()
    def copy_to(self, model: torch.nn.Module) -> None:
        """Writes what is kept into the parameters and buffers of ``model``, of the same names."""
        tensors = _Tensors(model)
        if tensors.names != self._tensors.names:
            raise ValueError(_differing("the model", tensors.names, self._tensors.names))
        self._copy(tensors.now(), self._kept)

    @torch.no_grad()
    def _copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        names = self._tensors.names
        copy_(*local_pairs(targets, sources, names), names)

    def state_dict(self) -> dict[str, Any]:
        """What is kept, copied: no later update changes it."""
        return {"tensors": {name: x.clone() for name, x in self.tensors.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what ``state_dict`` returned."""
        self._check_keys(state_dict, "tensors")
        found, names = state_dict["tensors"], self._tensors.names
        if found.keys() != set(names):
            raise ValueError(_differing("the state", list(found), names))
        self._copy(self._kept, [found[name] for name in names])

    def _check_keys(self, state_dict: dict[str, Any], *keys: str) -> None:
        missing = [key for key in keys if key not in state_dict]
        if missing:
            raise ValueError(f"this is no state of {type(self).__name__}: it has no {', '.join(missing)}")

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "kept": self._kept, **self._rest()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._kept = state.pop("kept")
        self.__dict__.update(state)
        self._tensors = _Tensors(self.model)

    def _rest(self) -> dict[str, Any]:
        return {}


def _differing(what: str, found: list[str], expected: list[str]) -> str:
    missing = [name for name in expected if name not in found]
    more = [name for name in found if name not in expected]
    return f"{what} has other tensors: missing {missing}, unexpected {more}"


class ExponentialMovingAverage(_Kept):
    r"""An exponential moving average of the parameters and buffers of a model.

    .. math::
        a_0 = p_0, \qquad a_t = a_{t-1} + (1 - \text{decay}) (p_t - a_{t-1})

    One launch for all tensors of a dtype, 12 bytes a weight. Averages of 16-bit weights are kept in fp32, where small
    steps are not lost. Buffers are averaged too, statistics of batch normalization among them; integers are copied. An
    infinity, as in a mask, stays; on the CPU not in a parameter that requires a gradient, whose average becomes NaN.

    Args:
        model: is averaged as it is now, and at every :meth:`update`.
        decay: between 0 and 1.

    The averages lie where the model lay; those of DTensors are in the same pieces.

    Raises:
        ValueError: a decay out of range; in every method, a tensor of the model that is gone, has come, or has another
            shape, and then nothing was written.
        RuntimeError: a tensor of the model that is sparse, or whose elements share memory (``expand``).

    Source: Polyak and Juditsky 1992; the exponential form as in Szegedy et al. 2016, "Rethinking the Inception
    Architecture", section 8.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = _checked_decay(decay)
        self.updates = 0

        def wide(x: Tensor) -> Tensor:
            return x.to(compute_dtype(x.dtype) if x.is_floating_point() else x.dtype, copy=True)

        super().__init__(model, wide)

    def update(self) -> None:
        """Lets the averages follow the model as it is now. Call it after each step of the optimizer."""
        names = self._tensors.names
        follow_(*local_pairs(self._kept, self._tensors.now(), names), self.decay, names)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[torch.nn.Module]:
        """In the context the model has the averages, for validation; then its own weights again, to the bit.

        Takes memory for a second copy of the model. What happens to its weights in the context is lost.
        """
        now = self._tensors.now()
        before = [x.detach().clone() for x in now]
        self._copy(now, self._kept)
        try:
            yield self.model
        finally:
            self._copy(self._tensors.now(), before)

    def state_dict(self) -> dict[str, Any]:
        """Averages, decay and the number of updates, copied: no later update changes it."""
        return {**super().state_dict(), **self._rest()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what ``state_dict`` returned, its decay included."""
        self._check_keys(state_dict, "tensors", "decay", "updates")
        decay, updates = _checked_decay(state_dict["decay"]), integer("updates", state_dict["updates"])
        super().load_state_dict(state_dict)
        self.decay, self.updates = decay, updates

    def _rest(self) -> dict[str, Any]:
        return {"decay": self.decay, "updates": self.updates}


class BestWeights(_Kept):
    """A copy of the parameters and buffers of a model, as they were when it was at its best.

    Args:
        model: is copied as it is now, and at every :meth:`update` that improved.

    ``best.update(loss < lowest)`` with tensors on the device copies there or does not, and the host waits for neither:
    8 bytes a weight where it improved, none where it did not.

    Raises:
        ValueError, RuntimeError: as :class:`ExponentialMovingAverage`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model, torch.clone)

    def update(self, improved: bool | Tensor) -> None:
        """Copies the model as it is now, if ``improved``.

        Args:
            improved: a bool of Python or numpy, or a bool tensor of one element. One on the device of the model is
                read there.

        Raises:
            TypeError, ValueError: neither of them.
        """
        if isinstance(improved, Tensor):
            if improved.dtype != torch.bool:
                raise TypeError(f"improved has to be a bool tensor, but got {improved.dtype}")
            if improved.numel() != 1:
                raise ValueError(f"improved has to have one element, but got {tuple(improved.shape)}")
            names = self._tensors.names
            copy_if_(*local_pairs(self._kept, self._tensors.now(), names), local(improved), names)
        elif not isinstance(improved, (bool, np.bool_)):
            raise TypeError(
                f"improved has to be a bool or a bool tensor, but got a {type(improved).__name__}"
            )
        elif improved:
            self._copy(self._kept, self._tensors.now())

    def restore(self) -> None:
        """Gives the model its best weights back; before the first improvement, those it had at first."""
        self._copy(self._tensors.now(), self._kept)


def get_ema_multi_avg_fn(decay: float = 0.999) -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
    """As :func:`torch.optim.swa_utils.get_ema_multi_avg_fn`, in one launch: for ``AveragedModel(multi_avg_fn=...)``.

    That model keeps averages in the dtype of its parameters: of 16-bit ones, small steps are lost. On the CPU this
    takes up to 1.6 times as long as torch's function: it looks for infinities (masks in buffers), of which that one
    makes NaN.
    """
    decay = _checked_decay(decay)

    def average(averages: Sequence[Tensor], current: Sequence[Tensor], _: Any) -> None:
        follow_(*local_pairs(averages, current), decay)

    return average


def _checked_decay(decay: Any) -> float:
    found = real("decay", decay)
    if not 0.0 <= found <= 1.0:
        raise ValueError(f"Invalid decay value {decay} provided. Please provide a value in [0,1] range.")
    return found

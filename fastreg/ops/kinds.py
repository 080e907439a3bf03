"""Kinds of tensors: all that a plan follows from, asked of many tensors at once."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class _Kinds:
    """As torch's ``TensorGuards``, where they are not there."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._kinds = list(map(self._of, tensors))

    def check(self, *tensors: Tensor) -> bool:
        return list(map(self._of, tensors)) == self._kinds

    @staticmethod
    def _of(x: Tensor) -> tuple:
        return type(x), x.dtype, x.device, x.shape, x.stride(), x.requires_grad


def kinds_of(tensors: Sequence[Tensor]) -> Any:
    """``check(*others)`` says of strided tensors whether others have their types, dtypes, devices, sizes and strides.

    These are the guards of torch.compile, which are not public: all tensors in one call. They may say no where we would
    not: to one tensor that is there twice, and to a gradient that can itself be differentiated.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes, strides = ([list(ask(x)) for x in tensors] for ask in (Tensor.size, Tensor.stride))
        # The stub has a number where a list of them is meant, one of each tensor.
        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)  # type: ignore[arg-type]
    except Exception:
        return _Kinds(tensors)

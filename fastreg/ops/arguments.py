"""Numbers as torch's functions take them: Python's, numpy's, and tensors without dimensions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """The number of Python that torch takes ``value`` for. What torch takes for no number comes back as it is.

    Functions with a counterpart in torch hand such a value on to that, which refuses it in its own words.
    """
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor) and value.dim() == 0 and not (value.requires_grad or value.is_meta):
        return value.item()
    return value


def plain_shape(sizes: Any) -> tuple[int, ...] | None:
    """``sizes`` as Python's ints; None if they are no sequence of what torch takes for ints."""
    if type(sizes) is not tuple and not isinstance(sizes, Sequence):
        return None
    for n in sizes:
        if type(n) is not int:
            found = tuple(map(plain, sizes))
            return found if all(map(is_integer, found)) else None
    return tuple(sizes)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def number(name: str, value: Any) -> float:
    """``value`` as Python's number, for an argument that torch's functions do not have."""
    found = plain(value)
    if not is_number(found):
        raise TypeError(f"{name} has to be a number, but got {type(value).__name__}")
    return found


def real(name: str, value: Any) -> float:
    """``value`` as Python's float, for an argument that torch's functions do not have."""
    try:
        return float(number(name, value))
    except OverflowError:
        raise ValueError(f"{name} has to be a number that a float holds, but got one beyond") from None


def integer(name: str, value: Any) -> int:
    """``value`` as Python's int, for an argument that torch's functions do not have."""
    found = plain(value)
    if not is_integer(found):
        raise TypeError(f"{name} has to be an int, but got {type(value).__name__}")
    return found

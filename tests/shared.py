"""Helpers of several test files: comparisons within a tolerance, how a call ends, what it keeps."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastreg.ops import backend

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_triton = pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, terms: float = 1) -> None:
    """Equal within ``tolerance``, relative and absolute. terms: how many rounded terms each value is a sum of."""
    allowed = tolerance * math.sqrt(terms)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=allowed, atol=allowed)


def near(
    actual: Tensor, expected: Tensor, tolerance: float, equal_nan: bool = False, moves: float = 0.0
) -> None:
    """Equal within ``tolerance`` times the largest value, at least 1: a sum that cancels keeps the rounding of its
    terms. moves: how far the expected values move when their inputs do by one rounding, of which a kernel makes up to
    16 in a row (mean, deviation, variance, their sums over lanes, and the gradient of each)."""
    largest = max(1.0, expected.abs().nan_to_num(0, 0, 0).max().item() if expected.numel() else 0.0)
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance * largest + 16 * moves, equal_nan=equal_nan
    )


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same bits, but for the payload of a NaN and the sign of 0."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def outcome(call: Callable[[], Any]) -> tuple[Any, Any]:
    """How a call ends, comparably, and its result: the type and message of its exception, or its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except Exception as error:
            return (type(error), str(error)), None
    # The interpreter is numpy, which warns of roots of negative numbers; a GPU, like ATen, gives NaN.
    return [(w.category, str(w.message)) for w in caught if w.category is not RuntimeWarning], result


def ending(call: Callable[[], Any]) -> Any:
    """How a call ends: the type and message of its exception, or its warnings."""
    return outcome(call)[0]


def kept_storages(call: Callable[[], Any]) -> tuple[dict[int, int], Any]:
    """What a call keeps for its backward pass, as bytes by the address of each storage, and its result."""
    found = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    return found, result


def saved_bytes(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> int:
    """Bytes that a call keeps for its backward pass, each storage once."""
    found, result = kept_storages(call)
    assert (result[0] if isinstance(result, tuple) else result).requires_grad
    return sum(found.values())


def compiled(function, backend: str = "aot_eager", **options) -> tuple[Callable, CompileCounterWithBackend]:
    """The compiled function (one graph, or an error) and the counter of its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def compilations(counter) -> int:
    """Compiled graphs that do something. Where eps turns out to be a constant, Dynamo has an empty one compiled and
    starts again."""
    return sum(any(node.op.startswith("call") for node in graph.graph.nodes) for graph in counter.graphs)


class Marked(Tensor):
    """A tensor subclass that passes through every function, as DTensor does."""

"""Operands, roundings and fixtures of the tests of the machine that executes PTX."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import ptx
from ptx import assemble, assembled

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def all_is_ptx():
    """Triton's assembler takes every kernel of this file that ran."""
    yield
    assemble(assembled)


GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True, **({"params": ["machine", "gpu"]} if GPU else {}))
def each_executor(request, monkeypatch):
    """Where there is a GPU, every test of this file also asks it."""
    monkeypatch.setattr(ptx, "executor", getattr(request, "param", "machine"))


@pytest.fixture(autouse=True)
def same_numbers():
    """Each test draws the same, whichever ran before."""
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state
    with np.errstate(all="ignore"):
        yield


EDGES = [0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 127, 128, 255, 256]


def integers(bits: int, count: int = 64, signed: bool = False) -> np.ndarray:
    """Small and large ones, and any."""
    near = [*EDGES, *(-x for x in EDGES), *((1 << bits - 1) + x for x in (-2, -1, 0, 1)), (1 << bits) - 1]
    some = [int(x) for x in RANDOM.integers(0, 1 << 63, count)] + [
        3 * int(x) for x in RANDOM.integers(0, 1 << 62, count)
    ]
    values = np.array([x % (1 << bits) for x in [*near, *some]], f"u{bits // 8}")
    return RANDOM.permutation(values).view(f"{'i' if signed else 'u'}{bits // 8}")


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, zeros by their sign; NaN is NaN."""
    expected = np.asarray(expected).astype(found.dtype)
    equal = (found.view(f"u{found.itemsize}") == expected.view(f"u{found.itemsize}")) | (
        (found != found) & (expected != expected)
    )
    wrong = np.flatnonzero(~equal)
    assert not len(wrong), (
        f"{len(wrong)} wrong, first {wrong[0]}: {found[wrong[0]]!r} for {expected[wrong[0]]!r}"
    )


def wrapped(values, bits: int, signed: bool = False) -> np.ndarray:
    unsigned = np.array([int(x) % (1 << bits) for x in values], f"u{bits // 8}")
    return unsigned.view(f"i{bits // 8}") if signed else unsigned


def bits_of(values: np.ndarray, kind: str) -> np.ndarray:
    """fp64 values of a format as its bits."""
    if kind == "bf16":
        bits = (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), bits)
    if kind == "f16":
        return np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))
    return values.astype({"f32": np.float32, "f64": np.float64, "tf32": np.float32}[kind])

"""Operands, the definition with all masks at once in fp64, and tiles of DropConnect, for its tests."""

import pytest
import torch
from machine_option import bf16

from fastreg.ops.launch import forget
from fastreg.ops.linear import drop_connect as ops

SEED = 0x123456789ABCDEF
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: bf16(1.6e-2)}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter's time goes by the tile, not by what is in it."""
    monkeypatch.setattr(ops, "BLOCK_ROWS", 16)
    monkeypatch.setattr(ops, "BLOCK_COLUMN_BYTES", 64)
    monkeypatch.setattr(ops, "BLOCK_GRADIENT", (16, 16))
    monkeypatch.setattr(ops, "BLOCK_SHARED_GRADIENT", (16, 16))
    monkeypatch.setattr(ops, "BLOCK_MASK", (4, 16))
    forget()
    yield
    forget()


def tensors(device, examples, outputs, inputs, dtype=torch.float32):
    shapes = ((examples, inputs), (outputs, inputs), (outputs,), (examples, outputs))
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


SHARING = {
    "example": {},
    "few": {"mode": "group", "group_size": 3},
    "group": {"mode": "group", "group_size": 16},
    "batch": {"mode": "batch"},
    "batch in memory": {"mode": "batch"},
}

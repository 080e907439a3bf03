"""Every case of the benchmark suite, as a GPU times it: launched, checked by Triton, recorded in a graph."""

import importlib

import pytest
import torch

from fastreg.bench import FAMILIES, harness
from fastreg.bench.cases import DIRECTIONS

CASES = {
    f"{family}: {case.name}": case
    for family in FAMILIES
    for case in importlib.import_module(f"fastreg.bench.{family}").CASES
}
CUDA = torch.device("cuda", 0)


@pytest.fixture
def clock(gpu, monkeypatch):
    gpu.weightless = True
    monkeypatch.setattr(harness, "MINIMUM", 1)
    clock = harness.Cuda(CUDA)
    clock.BATCH = 2
    return clock


@pytest.mark.parametrize("name", CASES)
def test_ours_is_timed_by_all_methods(gpu, clock, name):
    case = CASES[name]
    inputs = case.inputs(1 << 16, torch.bfloat16, CUDA)
    directions = DIRECTIONS if harness.differentiated(inputs) else ["forward"]
    for direction in directions:
        for method in clock.methods(1).values():
            assert method(lambda direction=direction: harness.prepare(direction, case.ours, inputs), 0.0)
    assert gpu.races == []


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("optimizers")])
def test_torchs_optimizers_are_recorded_in_graphs(gpu, clock, name):
    """They refuse, as ours do, where they count their steps on the host."""
    gpu.weightless = False
    case = CASES[name]
    inputs = case.inputs(2048, torch.float32, CUDA)
    assert clock.graph(lambda: harness.prepare("forward", case.torch, inputs), 0.0)

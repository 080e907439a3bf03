"""A planned launch starts the compiled kernel itself, and leaves to Triton what was compiled for something else."""

import pytest
import torch
import triton

import fastreg.functional as F
from fastreg.kernels import dropout as kernels
from fastreg.ops import launch


@pytest.fixture
def bound(gpu, needs_compiler, monkeypatch) -> list[str]:
    """Launches that went through Triton's own choice of a variant."""
    names = []
    run = kernels.forward.run

    def watched(*arguments, **options):
        names.append("forward")
        return run(*arguments, **options)

    monkeypatch.setattr(kernels.forward, "run", watched)
    return names


def values() -> torch.Tensor:
    return torch.ones(1 << 20, device="cuda")


def test_triton_chooses_once(gpu, bound):
    for seed in range(3, 8):
        F.dropout(values(), seed=seed)
    assert gpu.names() == ["forward"] * 5
    assert [one.arguments["seed"] for one in gpu.launches] == list(range(3, 8))
    assert (
        len(bound) == 2
    )  # the kernel, and the one that takes a seed from memory, which is loaded for graphs


def test_an_address_that_is_no_multiple_of_16_is_another_variant(gpu, bound):
    x = torch.ones((1 << 20) + 1, device="cuda")
    F.dropout(x[:-1], seed=1)
    before = len(bound)
    F.dropout(x[1:], seed=1)
    assert len(bound) > before
    assert len({id(one) for one in gpu.compiled if one.name == "forward"}) >= 2
    before = len(bound)
    F.dropout(x[:-1], seed=1)
    assert len(bound) == before  # the first is still known


def test_a_seed_in_memory_may_lie_anywhere(gpu, bound):
    seeds = torch.arange(1, 7, device="cuda")
    for i in range(6):
        F.dropout(values(), seed=seeds[i : i + 1])
    assert len(bound) == 1


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_hear_of_every_launch(gpu, bound, hook):
    F.dropout(values(), seed=1)
    before, chain = len(bound), getattr(triton.knobs.runtime, hook)

    def hear(*arguments):
        pass

    chain.add(hear)
    try:
        F.dropout(values(), seed=1)
    finally:
        chain.remove(hear)
    assert len(bound) == before + 1


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_may_be_no_chain(gpu, bound, monkeypatch, hook):
    F.dropout(values(), seed=1)
    before = len(bound)
    monkeypatch.setattr(triton.knobs.runtime, hook, None)
    F.dropout(values(), seed=1)
    assert len(bound) == before


def test_a_hook_of_a_kernel_hears_of_every_launch(gpu, bound, monkeypatch):
    F.dropout(values(), seed=1)
    before = len(bound)
    monkeypatch.setattr(kernels.forward, "pre_run_hooks", [lambda *arguments, **options: None])
    F.dropout(values(), seed=1)
    assert len(bound) == before + 1


def test_a_version_of_triton_that_is_not_known_takes_the_ordinary_way(gpu, bound, monkeypatch):
    monkeypatch.setattr(launch, "DIRECT", False)
    for _ in range(3):
        F.dropout(values(), seed=1)
    assert len(bound) == 4


def test_the_device_of_the_tensors_is_that_of_the_launch(gpu, bound):
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        F.dropout(torch.ones(1 << 20, device=device), seed=1)
        assert gpu.streams[gpu.launches[-1].stream].device == torch.device(device)
    assert torch.cuda.current_device() == 0

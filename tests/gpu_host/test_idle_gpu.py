"""``bench/idle_gpu.py``: launches of real kernels by Triton's launcher, which do nothing."""

import pytest
import torch
import triton
import triton.language as tl

from fastreg import functional as F
from fastreg import random
from fastreg.bench import idle_gpu
from fastreg.ops import backend


@triton.jit
def add_one(x_ptr, amount, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(x_ptr + place, tl.load(x_ptr + place) + amount)


def launch(grid: int, x: torch.Tensor):
    return add_one[(grid,)](x, 1.0, BLOCK=64, **backend.OPTIONS)


@pytest.fixture
def launches():
    with idle_gpu.attached() as launches:
        yield launches


def launched(launches, call) -> int:
    before = launches()
    call()
    return launches() - before


def test_launches_are_counted_and_do_nothing(launches):
    x = torch.ones(64)
    assert launched(launches, lambda: launch(3, x)) == 1
    assert launched(launches, lambda: launch(0, x)) == 0  # Triton's launcher asks for no driver
    assert x.eq(1).all()


def test_kernels_are_compiled_and_can_be_launched_directly(launches):
    x = torch.ones(64)
    compiled = launch(1, x)
    assert compiled.metadata.target.arch == 90
    assert compiled.asm["cubin"]
    assert launched(launches, lambda: compiled[(2, 1, 1)](x, 1.0, 64)) == 1
    arguments = compiled.function, compiled.packed_metadata, None, None, None, x, 1.0, 64
    assert launched(launches, lambda: compiled.run(2, 1, 1, 0, *arguments)) == 1


def test_the_launcher_is_tritons_and_reads_its_arguments(launches):
    compiled = launch(1, torch.ones(64))
    before = launches()
    with pytest.raises(TypeError, match="data_ptr"):
        compiled[(1, 1, 1)](object(), 1.0, 64)
    with pytest.raises(TypeError):
        compiled[(1, 1, 1)](torch.ones(64), "one", 64)
    assert launches() == before


def test_tensors_of_the_cpu_go_to_the_kernels_and_back(launches):
    x = torch.ones(64)
    assert launched(launches, lambda: F.dropout(x, 0.5, inplace=True)) == 1
    assert x.eq(1).all()
    trained = x.clone().requires_grad_()
    assert launched(launches, lambda: F.dropout(trained).backward(x)) == 2


def test_random_streams_are_those_of_a_gpu(launches):
    first, second = random.stream(torch.device("cpu")), random.stream(torch.device("cpu"))
    assert first.seed == second.seed
    assert second.offset == first.offset + random.STEP
    assert random.stream(torch.device("cpu"), seed=3) == random.Stream(3)


def test_everything_is_put_back():
    before = random.stream, torch.cuda.default_generators, backend.INTERPRETED, triton.runtime.driver._active
    with idle_gpu.attached() as launches:
        F.dropout(torch.ones(8))
    assert (
        random.stream,
        torch.cuda.default_generators,
        backend.INTERPRETED,
        triton.runtime.driver._active,
    ) == before
    assert launched(launches, lambda: F.dropout(torch.ones(8))) == 0

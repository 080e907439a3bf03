"""Launches that are planned once: a later call fills in its own tensors, and whatever differs is planned anew."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastreg.ops import launch as module  # noqa: E402
from fastreg.ops.backend import Launch, number  # noqa: E402
from fastreg.ops.launch import planned  # noqa: E402
from fastreg.random import Stream  # noqa: E402

BLOCK = 16


@triton.jit(do_not_specialize=["seed_ptr", "seed", "offset"])
def added(x_ptr, y_ptr, z_ptr, seed_ptr, seed: tl.int64, offset: tl.int64, scale, BLOCK: tl.constexpr):
    """z = x + scale y + seed + offset"""
    i = tl.arange(0, BLOCK)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    z = tl.load(x_ptr + i) + scale * tl.load(y_ptr + i) + (seed + offset).to(tl.float32)
    tl.store(z_ptr + i, z)


@pytest.fixture
def add():
    """x + scale (x + scale y + n) + n, n = seed + offset, in two launches, with workspace between them.

    ``add.built``: how often it was planned.
    """

    @planned
    def launches(x, y, z, stream, scale) -> list[Launch]:
        add.built += 1
        between = torch.empty(2, BLOCK, device=x.device)
        rest = {**number("seed", stream.seed, 0), "offset": stream.offset, "scale": scale, "BLOCK": BLOCK}
        first = {"x_ptr": x, "y_ptr": y, "z_ptr": between[1], **rest}
        second = {"x_ptr": x, "y_ptr": between[1], "z_ptr": z, **rest}
        return [Launch(added, (1,), first), Launch(added, (1,), second)]

    add = launches
    add.built = 0
    return add


def check(add, x, y, stream=None, scale=2.0):
    z = torch.empty_like(x)
    stream = stream or Stream(3, 4)
    add.run(x, y, z, stream, scale)
    drawn = int(stream.seed) + stream.offset
    torch.testing.assert_close(z, x + scale * (x + scale * y + drawn) + drawn)


def randn(device):
    return torch.randn(BLOCK, device=device)


def test_later_calls_have_their_own_tensors_and_streams(add, device):
    for seed in (3, 5, 2**40):
        check(add, randn(device), randn(device), Stream(seed, seed % 7))
    assert add.built == 1


def test_a_tensor_may_be_passed_twice_and_then_not(add, device):
    for _ in range(3):
        x = randn(device)
        check(add, x, x)
        check(add, randn(device), randn(device))
    assert add.built == 1


@pytest.mark.parametrize("differs", ["option", "strides", "dtype", "shape", "seed in memory"])
def test_what_differs_is_planned_anew(add, device, differs):
    x, y, stream, scale = randn(device), randn(device), Stream(1, 2), 2.0
    check(add, x, y, stream, scale)
    if differs == "option":
        scale = 3.0
    elif differs == "strides":
        x = torch.randn(2 * BLOCK, device=device)[::2]
    elif differs == "dtype":
        y = y.double()
    elif differs == "shape":
        x = torch.randn(2 * BLOCK, device=device)
    else:
        stream = Stream(torch.tensor([1], device=device), 2)
    add.run(x, y, torch.empty(BLOCK, device=device), stream, scale)
    assert add.built == 2
    check(add, randn(device), randn(device))  # the first plan is still there
    assert add.built == 2


def test_an_absent_tensor_is_another_kind(device):
    seen = []

    @planned
    def launches(x, a, b) -> list[Launch]:
        seen.append((a is None, b is None))
        return []

    x = randn(device)
    for _ in range(2):
        launches.run(x, x, None)
        launches.run(x, None, x)
    assert seen == [(False, True), (True, False)]


def test_the_number_of_plans_is_bounded(add, device, monkeypatch):
    monkeypatch.setattr(module, "PLANS", 3)
    for scale in (1.0, 2.0, 3.0, 4.0, 5.0, 1.0):
        check(add, randn(device), randn(device), scale=scale)
        assert sum(map(len, add._plans.values())) <= 3
    assert add.built == 6


def test_plans_keep_no_tensor(add, device):
    import gc
    import weakref

    tensors = [randn(device) for _ in range(3)]
    gone = [weakref.ref(t) for t in tensors]
    add.run(*tensors, Stream(1), 2.0)
    del tensors
    gc.collect()
    assert all(reference() is None for reference in gone)


def test_a_view_of_an_argument_is_refused(device):
    """The next call would find workspace in its place."""

    @planned
    def launches(x) -> list[Launch]:
        return [Launch(added, (1,), {"x_ptr": x[1:]})]

    with pytest.raises(AssertionError, match="view of an argument"):
        launches.run(randn(device))


def test_nothing_runs_on_an_empty_grid(device):
    @planned
    def launches(x) -> list[Launch]:
        return [Launch(None, (0,), {"x_ptr": x})]

    launches.run(randn(device))

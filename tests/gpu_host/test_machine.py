"""The machine of ``bench/machine`` as Triton's driver: launches of ordinary kernels on CPU tensors."""

import gc
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from fastreg.bench import machine
from fastreg.bench.executed import execute, sampled
from fastreg.bench.inspect import report_on, violations
from fastreg.bench.sass import Budget, InspectError, Kernel
from fastreg.ops.backend import Launch

TARGETS = machine.TARGETS


@pytest.fixture(params=TARGETS)
def attached(request):
    found = machine.attach(request.param, machine.Options(counting=True), keeps=True)
    yield found
    found.detach()


@triton.jit
def scaled(x_ptr, y_ptr, scale: tl.float64, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, (x * scale.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=i < n)


def launch(kernel, n: int, *arguments) -> None:
    kernel[(triton.cdiv(n, 256),)](*arguments, BLOCK=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_kernel_computes_what_it_says(attached, dtype):
    x = torch.randn(1000, dtype=dtype)
    y = torch.zeros_like(x)
    launch(scaled, 1000, x, y, 3.0, 1000)
    torch.testing.assert_close(y, (3 * x.float()).to(dtype), rtol=0, atol=0)
    (one,) = attached.launched
    assert (one.name, one.grid, one.threads) == ("scaled", (4, 1, 1), 128)
    assert one.counters.loads.bytes == x.nbytes == one.counters.stores.bytes
    assert one.touched == (x.nbytes, x.nbytes)


def test_an_access_behind_the_tensor_names_the_line_of_the_source(attached):
    x, y = torch.zeros(1000), torch.zeros(1024)[:1000]
    with pytest.raises(machine.Fault) as error:
        launch(scaled, 1000, x, y, 1.0, 1001)
    text = str(error.value)
    assert text.startswith("scaled, test_machine.py:")
    assert "program (3, 0, 0), thread" in text
    assert "x_ptr is the nearest tensor, of 4000 bytes; the access of" in text


@triton.jit
def follow(entries_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    source = tl.load(entries_ptr).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + i, tl.load(source + i))


def test_tables_of_addresses_reach_the_tensors_that_lie_there_and_no_freed_ones(attached):
    x, y = torch.randn(1 << 16), torch.zeros(256)
    table = torch.tensor([x.data_ptr()])
    follow[(1,)](table, y, BLOCK=256)
    assert torch.equal(y, x[:256])
    del x
    gc.collect()
    with pytest.raises(
        machine.Fault, match=r"is in freed memory: it was a tensor \(65536,\) of torch.float32"
    ):
        follow[(1,)](table, y, BLOCK=256)


@triton.jit
def transposed(x_ptr, y_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i * N + j)
    tl.store(y_ptr + i * N + j, tl.trans(x))


@triton.jit
def multiplied(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TURNED: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + (k[None, :] * M + m[:, None] if TURNED else m[:, None] * K + k[None, :]))
    b = tl.load(b_ptr + (n[None, :] * K + k[:, None] if TURNED else k[:, None] * N + n[None, :]))
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision="tf32"))


def test_an_exchange_through_shared_memory(attached):
    x, y = torch.randn(64, 64), torch.zeros(64, 64)
    transposed[(1,)](x, y, N=64)
    assert torch.equal(y, x.T)
    assert attached.launched[0].counters.shared.requests


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("sizes", [(64, 16, 32), (128, 64, 64), (64, 128, 128), (16, 16, 16), (128, 256, 32)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_of_whole_numbers_are_exact(attached, dtype, sizes, turned):
    """mma.sync, and on sm_90 wgmma with operands in shared memory, in both orders and with every swizzle."""
    if attached.cc == 100:
        pytest.skip("products of sm_100 are missing")
    m, n, k = sizes
    a, b = (torch.randint(-8, 9, shape).to(dtype) for shape in ((m, k), (k, n)))
    c = torch.zeros(m, n)
    stored = [x.T.contiguous() if turned else x for x in (a, b)]
    multiplied[(1,)](*stored, c, M=m, N=n, K=k, TURNED=turned)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=0, atol=0)
    opcodes = attached.launched[0].counters.instructions
    assert any(name.startswith("wgmma" if attached.cc == 90 and m >= 64 else "mma.sync") for name in opcodes)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_warps_gives_the_same(seed):
    attached = machine.attach("sm_90", machine.Options(seed=seed))
    try:
        x, y = torch.randn(64, 64), torch.zeros(64, 64)
        transposed[(1,)](x, y, N=64, num_warps=8)
        assert torch.equal(y, x.T)
    finally:
        attached.detach()


# --- fastreg inspect --execute ------------------------------------------------------------------------------


@triton.jit
def strided(x_ptr, y_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + STEP * i))


def declared(step: int, bytes_: float, **budget) -> Kernel:
    x = torch.empty(1 << 20, device="meta")
    arguments = {"x_ptr": x, "y_ptr": x[:: 1 + (step > 1)], "STEP": step, "BLOCK": 1024}
    count = (1 << 20) // max(step, 1)
    budget = Budget(narrow_loads=99, narrow_stores=99, min_headroom=0, **budget)
    return Kernel.of("strided", Launch(strided, (count // 1024,), arguments), count, bytes_, budget=budget)


def broken(kernel: Kernel) -> list[str]:
    return violations(replace(report_on(kernel, 90), executed=execute(kernel, 90)))


def test_what_is_counted_holds_to_what_is_declared():
    found = execute(declared(1, 8), 90)
    assert (found.bytes, found.sectors, found.ratio, found.conflicts) == (8, 8, 1, 0)
    assert not broken(declared(1, 8))
    assert broken(declared(1, 7.9)) == ["7.9 bytes per element are declared, it moves 8"]


def test_sectors_that_are_asked_for_in_vain_break_the_budget():
    # A thread has 4 elements: lanes of a load are 32 bytes apart, and each asks for a sector. 4 x 32 and 16 for 32.
    moves = "8 bytes per element are declared, it moves 12"
    assert broken(declared(2, 8)) == [moves, "4.500 times the fewest sectors are asked for, 1 allowed"]
    assert broken(declared(2, 8, sectors=4.5)) == [moves]


def test_programs_of_a_sample_are_different_and_all_of_a_small_grid():
    assert sampled(5, 100) == (0, 1, 2, 3, 4)
    some = sampled(10_000, 4096)
    assert len(some) == len({*some}) == 256
    assert max(some) - min(some) > 9_800


def test_what_cannot_run_says_so():
    with pytest.raises(InspectError, match="too many to execute"):
        execute(replace(declared(1, 8), elements=1 << 30), 90)
    with pytest.raises(InspectError, match="without its tables"):
        execute(replace(declared(1, 8), launch=None), 90)

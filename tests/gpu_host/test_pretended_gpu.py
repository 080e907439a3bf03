"""The stand-in itself: it answers as CUDA and Triton's launcher do, and records."""

import threading

import pytest
import torch
import triton
import triton.language as tl
from pretended_gpu import CAPTURED
from pretended_records import LARGEST_GRID


@triton.jit
def scaled(x_ptr, y_ptr, factor, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, i < n) * factor, i < n)


def launch(x, grid=(8,), factor=2.0, **more):
    scaled[grid](x, torch.empty_like(x), factor, x.numel(), BLOCK=128, **more)


def test_tensors_say_where_they_pretend_to_be(gpu):
    x = torch.ones(4, 3, device="cuda")
    assert x.is_cuda
    assert x.device == torch.device("cuda:0")
    assert type(x) is torch.Tensor
    assert torch.empty(2, device="cuda:1").device.index == 1
    for view in (x[1:], x.t(), x.detach(), x.view(-1), torch.nn.Parameter(x)):
        assert view.device == x.device
    for made in (x + 1, x.sum(), torch.empty_like(x), x.new_zeros(2), x.double()):
        assert made.device == x.device
    assert torch.ones(3).device.type == "cpu"
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(2, device="cuda:7")


def test_tensors_move(gpu):
    x = torch.arange(3.0)
    for there in (
        x.cuda(),
        x.to("cuda"),
        x.to(torch.device("cuda", 0)),
        torch.tensor([0.0, 1, 2], device="cuda"),
    ):
        assert there.device == torch.device("cuda:0")
        assert there.cpu().device.type == "cpu"
        assert there.cpu().tolist() == [0, 1, 2]
        assert there.to("cuda:1").device.index == 1
        assert there.to("cuda") is there
        assert there.to(torch.float64).device == there.device
    module = torch.nn.Linear(3, 2).cuda()
    assert {p.device.type for p in module.parameters()} == {"cuda"}
    assert module.cpu().weight.device.type == "cpu"
    assert torch.nn.Linear(3, 2, device="cuda:1").weight.device.index == 1


def test_gradients_stay_on_the_device(gpu):
    layer, x = torch.nn.Linear(3, 2, device="cuda"), torch.ones(4, 3, device="cuda", requires_grad=True)
    layer(x).relu().sum().backward()
    assert {x.grad.device, layer.weight.grad.device, layer.bias.grad.device} == {torch.device("cuda:0")}


def test_mixed_devices_raise_the_error_of_torch(gpu):
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        x + torch.ones(3, device="cuda:1")
    assert (x + torch.tensor(1.0)).device == x.device  # a number of the host may go anywhere


def test_launches_are_specialized_by_triton(gpu):
    x = torch.ones(1024, device="cuda")
    launch(x)
    launch(x, grid=(7, 2), factor=3.0)
    assert len(gpu.compiled) == 1
    assert [one.grid for one in gpu.launches] == [(8, 1, 1), (7, 2, 1)]
    assert gpu.launches[1].types == {"x_ptr": "*fp32", "y_ptr": "*fp32", "factor": "fp32", "n": "i32"}
    assert gpu.launches[1].constants == {"BLOCK"}
    launch(x[1:])  # of another alignment and length
    launch(x.half())
    launch(x, num_warps=8)
    assert len(gpu.compiled) == 4


def test_kernels_are_compiled_for_the_capability(gpu):
    gpu.compiles = True
    launch(torch.ones(1024, device="cuda"))
    assert len(gpu.launches) == 1
    kernel = next(iter(scaled.device_caches[0][0].values()))
    assert ".target sm_90" in kernel.asm["ptx"]


@pytest.mark.parametrize("dimension", range(3))
def test_grids_have_limits(gpu, dimension):
    x = torch.ones(1024, device="cuda")
    grid = [1, 1, 1]
    grid[dimension] = LARGEST_GRID[dimension]
    launch(x, tuple(grid))
    grid[dimension] += 1
    with pytest.raises(RuntimeError, match="invalid argument"):
        launch(x, tuple(grid))


def test_all_programs_together_have_a_limit(gpu):
    """Triton's launcher multiplies the dimensions as C's int: beyond it launches nothing, and says nothing."""
    x = torch.ones(1024, device="cuda")
    launch(x, (1 << 15, 65535))
    with pytest.raises(RuntimeError, match="invalid argument"):
        launch(x, (1 << 16, 1 << 15))


def test_a_launch_wants_tensors_of_its_device(gpu):
    with pytest.raises(ValueError, match="pointer argument x_ptr is on cpu"):
        scaled[(1,)](torch.ones(3), torch.ones(3, device="cuda"), 2.0, 3, BLOCK=128)
    far = torch.ones(3, device="cuda:1")
    with pytest.raises(ValueError, match="is on cuda:1, the launch on cuda:0"):
        launch(far)
    with torch.cuda.device(1):
        launch(far)
    assert gpu.streams[gpu.launches[-1].stream].device.index == 1


def test_a_graph_replays_what_it_recorded(gpu):
    x, graph = torch.zeros(4, dtype=torch.float64, device="cuda"), torch.cuda.CUDAGraph()
    launch(torch.zeros(1, dtype=torch.int64, device="cuda"))
    with torch.cuda.graph(graph):
        drawn = torch.randint(1 << 40, (1,), device="cuda")
        y = x + 1
        y += drawn
        launch(drawn)
    assert torch.cuda.default_generators[0].get_offset() == 0
    gpu.forget()
    seen = []
    for start in (10.0, 20.0):
        x.fill_(start)
        graph.replay()
        seen.append(drawn.item())
        assert y.tolist() == [start + 1 + seen[-1]] * 4
    assert seen[0] != seen[1]
    assert [one.values["x_ptr"] for one in gpu.launches] == seen
    assert [one.name for one in gpu.operations] == 2 * ["fill_", "randint", "add", "add_"]
    assert torch.cuda.default_generators[0].get_offset() == 8


def test_recording_a_graph_runs_nothing(gpu):
    x, out, graph = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert x.add_(1) is x
        torch._foreach_add_([x], 1.0)
        assert torch.add(x, 1, out=out) is out
    assert x.tolist() == out.tolist() == [0, 0, 0]
    graph.replay()
    graph.replay()
    assert x.tolist() == [4, 4, 4]
    assert out.tolist() == [5, 5, 5]


def test_what_a_capture_forbids_raises(gpu):
    x, default = torch.ones(3, device="cuda"), torch.cuda.default_generators[0]
    forbidden = {
        "waiting": lambda: x.sum().item(),
        "a copy to the host": lambda: x.cpu(),
        "synchronizing": torch.cuda.synchronize,
        "a first launch": lambda: launch(x),
        "the seed": default.initial_seed,
        "the offset": default.get_offset,
        "setting it": lambda: default.set_offset(4),
        "the state": torch.cuda.get_rng_state,
        "a generator that the graph does not know": lambda: x.normal_(generator=torch.Generator("cuda")),
    }
    for what, call in forbidden.items():
        if what != "a generator that the graph does not know" and what != "a first launch":
            call()
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="captur"):
            call()
    assert CAPTURED.startswith("CUDA error")


def test_streams_are_in_order_among_each_other_once_they_waited(gpu):
    side = torch.cuda.Stream()
    x = torch.ones(3, device="cuda")
    with torch.cuda.stream(side):
        launch(x)
    assert len(gpu.races) == 1
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launch(x)
    assert len(gpu.races) == 1


def test_a_side_stream_joins_a_capture_and_has_to_come_back(gpu):
    x = torch.ones(3, device="cuda")

    def fork(join):
        side = torch.cuda.Stream()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            main = torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                assert torch.cuda.is_current_stream_capturing()
                x + 1
            if join:
                main.wait_stream(side)

    fork(join=True)
    with pytest.raises(RuntimeError, match="unjoined"):
        fork(join=False)


def test_generators_have_a_seed_and_an_offset(gpu):
    generator = torch.Generator("cuda:1").manual_seed(2**63 + 5)
    assert (generator.device, generator.initial_seed(), generator.get_offset()) == (
        torch.device("cuda:1"),
        2**63 + 5,
        0,
    )
    torch.ones(3, device="cuda:1").normal_(generator=generator)
    assert generator.get_offset() == 4
    state = generator.get_state()
    generator.set_offset(40)
    generator.set_state(state)
    assert (generator.initial_seed(), generator.get_offset()) == (2**63 + 5, 4)
    torch.manual_seed(3)
    torch.rand(3, device="cuda")
    with torch.random.fork_rng(devices=[0]):
        torch.manual_seed(4)
        assert torch.cuda.initial_seed() == 4
    assert torch.cuda.initial_seed() == 3
    assert torch.cuda.default_generators[0].get_offset() == 4


def test_graphed_callables_of_torch(gpu):
    layer, x = torch.nn.Linear(3, 2, device="cuda"), torch.ones(4, 3, device="cuda")
    expected = layer(torch.full((4, 3), 2.0, device="cuda")).tolist()
    graphed = torch.cuda.make_graphed_callables(layer, (x,))
    y = graphed(torch.full((4, 3), 2.0, device="cuda"))
    assert y.tolist() == expected
    y.sum().backward()
    assert layer.weight.grad.tolist() == [[8.0] * 3] * 2


def test_tensors_without_memory_have_any_shape(gpu):
    gpu.weightless = True
    x = torch.empty(2**40, dtype=torch.bfloat16, device="cuda")
    assert (x + 1).device.type == "cuda"
    launch(x, (2**31 - 1,))
    assert gpu.launches[0].types["n"] == "i64"


def test_it_ends_with_the_test(gpu):
    """The next test, and other threads, see the CPU build again."""
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(3).device.type))
    thread.start()
    thread.join()
    assert found == ["cpu"]


def test_afterwards_there_is_no_gpu():
    assert not torch.cuda.is_available()
    assert torch.ones(3).device.type == "cpu"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(3, device="cuda")

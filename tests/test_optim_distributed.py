"""Optimizers of parameters that are spread over processes, against one process with all of them.

What one process does with whole tensors is tested elsewhere: here the same class takes the same steps on whole tensors,
and the pieces have to make up the same parameters and the same state.
"""

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import path_taken, take
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from fastreg import optim
from fastreg.ops import backend
from fastreg.optim import distributed

pytestmark = pytest.mark.xdist_group("processes")  # one set of them is enough for two cores

# Sums in another order: of gradients over processes, of squares over pieces. Adam divides by their size.
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 2e-5, "atol": 2e-6}}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "adamw": ("AdamW", {"lr": 0.05, "weight_decay": 0.3, "amsgrad": True}),
    "clipped": ("SGDW", {"lr": 0.3, "momentum": 0.9, "max_grad_norm": 0.05}),
    "everything": (
        "AdamW",
        {"lr": 0.05, "weight_decay": 0.3, "l1": 0.01, "max_norm": 0.9, "max_norm_dim": 0, "max_grad_norm": 0.05,
         "ema_decay": 0.8, "cautious": True},
    ),
}  # fmt: skip


@pytest.fixture(params=["kernels", "aten"])
def path(request) -> str:
    """Where processes do their part: see ``processes.take``."""
    if request.param == "kernels" and not backend.HAS_TRITON:
        pytest.skip("needs Triton")
    return request.param


def dtype_of(path: str) -> torch.dtype:
    return torch.float32 if path == "kernels" else torch.float64


def make(case: str, parameters, module=optim, **more):
    name, arguments = CASES[case]
    return getattr(module, name)(parameters, **{**arguments, **more})


class Net(nn.Sequential):
    """Of 5, 3 and 1 rows: two processes have uneven pieces of them, four have empty ones."""

    def __init__(self, dtype):
        torch.manual_seed(5)
        super().__init__(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
        self.to(dtype)


ROWS = 8  # a batch, over the processes


def batch(i: int, dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return tuple(torch.randn(ROWS, n, generator=generator).to(dtype) for n in (6, 1))


def train(model, optimizer, steps, dtype, rank: int = 0, world: int = 1) -> None:
    own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    for i in steps:
        x, y = (t[own] for t in batch(i, dtype))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def whole(t: Any) -> Any:
    return t.full_tensor() if isinstance(t, DTensor) else t


def results(model, optimizer) -> dict[str, Tensor]:
    """Whole parameters and state, by name."""
    found = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = whole(p.detach())
        found |= {f"{name}.{key}": whole(v) for key, v in optimizer.state[p].items() if torch.is_tensor(v)}
    return {name: value.clone() for name, value in found.items()}


@contextlib.contextmanager
def taking(path: str):
    """The path in this process, for the reference."""
    kept = backend.runs_kernels
    take(path)
    yield
    backend.runs_kernels = kept


def expected_of(case: str, path: str, steps, **more) -> dict[str, Tensor]:
    with taking(path):
        model = Net(dtype_of(path))
        optimizer = make(case, model.parameters(), **more)
        train(model, optimizer, steps, dtype_of(path))
        return results(model, optimizer)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], dtype) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, msg=f"{name}: {{}}".format, **CLOSE[dtype])


# --- data parallel ----------------------------------------------------------------------------------------


def job_ddp(rank: int, case: str, world: int):
    dtype = dtype_of(path_taken())
    model = Net(dtype)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=1e-4)
    optimizer = make(case, parallel.parameters())
    train(parallel, optimizer, range(3), dtype, rank, world)
    narrow = [p.grad.data_ptr() % 16 for p in model.parameters()]
    return results(model, optimizer), narrow


@pytest.mark.parametrize("case", CASES)
def test_data_parallel_gradients_are_views_of_buckets(processes, path, case):
    found = processes(2)(job_ddp, path, case, 2)
    expected = expected_of(case, path, range(3))
    for own, narrow in found:
        compare(own, expected, dtype_of(path))
        assert any(narrow)  # gradients that 16-byte accesses do not reach
    for name, value in found[0][0].items():
        assert torch.equal(value, found[1][0][name]), name  # processes stay together


def job_zero(rank: int, world: int):
    dtype = dtype_of(path_taken())
    model = Net(dtype)
    parallel = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(parallel.parameters(), optimizer_class=optim.AdamW, lr=0.05)
    train(parallel, optimizer, range(3), dtype, rank, world)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_zero_redundancy_optimizer(processes):
    model = Net(torch.float64)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.05), range(3), torch.float64)
    for own in processes(2)(job_zero, "aten", 2):
        compare(own, {name: p.detach() for name, p in model.named_parameters()}, torch.float64)


# --- sharded parameters -----------------------------------------------------------------------------------


def sharded(dtype, world: int, replicas: int = 1):
    model = Net(dtype)
    shape, names = (
        ((world,), ("shard",)) if replicas == 1 else ((replicas, world // replicas), ("copy", "shard"))
    )
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def job_sharded(rank: int, case: str, world: int, replicas: int = 1, more=None):
    dtype = dtype_of(path_taken())
    model = sharded(dtype, world, replicas)
    optimizer = make(case, model.parameters(), **(more or {}))
    train(model, optimizer, range(3), dtype, rank, world)
    for p in model.parameters():
        assert isinstance(p, DTensor)
        for key, value in optimizer.state[p].items():
            if key != "step" and torch.is_tensor(value):
                like = torch.zeros_like(p)
                assert isinstance(value, DTensor), key
                assert value._spec.mesh == like._spec.mesh
                assert value.placements == like.placements
                assert (value.shape, value.stride()) == (like.shape, like.stride())
                assert value._local_tensor.shape == p._local_tensor.shape
    empty = sum(p._local_tensor.numel() == 0 for p in model.parameters())
    return results(model, optimizer), empty


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_pieces_of_parameters_are_stepped_as_the_whole(processes, path, case, world):
    found = processes(world)(job_sharded, path, case, world)
    expected = expected_of(case, path, range(3))
    for own, _ in found:
        compare(own, expected, dtype_of(path))
    assert sum(empty for _, empty in found) > 0


@pytest.mark.parametrize("case", ["clipped", "everything"])
def test_replicas_of_shards_count_once(processes, case):
    """Two times two processes: the norm of the gradients goes over the shards and not over their copies."""
    found = processes(4)(job_sharded, "aten", case, 4, 2)
    expected = expected_of(case, "aten", range(3))
    for own, _ in found:
        compare(own, expected, torch.float64)


def test_torch_takes_the_same_steps(processes):
    """The reference is ours on whole tensors: here it is torch's, and torch's global norm."""
    model = Net(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for i in range(3):
        x, y = batch(i, torch.float64)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    found = processes(2)(job_sharded, "aten", "clipped", 2, 1, {"weight_decay": 0.0})
    for own, _ in found:
        for name, p in model.named_parameters():
            # torch divides by the norm plus 1e-6
            assert_close(own[name], p.detach(), rtol=1e-4, atol=1e-6)


def job_scaled(rank: int, case: str, world: int):
    dtype = dtype_of(path_taken())
    model = sharded(dtype, world)
    optimizer = make(case, model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in (-1, 0, 1):
        x, y = (t[rank * ROWS // world : (rank + 1) * ROWS // world] for t in batch(i % 10, dtype))
        optimizer.zero_grad()
        scaler.scale((model(x) - y).square().mean()).backward()
        if i == -1 and rank == 0:  # on one process alone
            model[0].weight.grad._local_tensor[0, 0] = torch.inf
        kept = [p.grad.to_local().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p.grad.to_local(), g) for p, g in zip(model.parameters(), kept, strict=True))
    return results(model, optimizer), scaler.get_scale()


@pytest.mark.parametrize("case", ["momentum", "everything"])
def test_an_infinity_on_one_process_skips_the_step_of_all(processes, path, case):
    expected = expected_of(case, path, range(2))
    for own, scale in processes(2)(job_scaled, path, case, 2):
        compare(own, expected, dtype_of(path))
        assert scale == 4.0


# --- any mesh, any placement ------------------------------------------------------------------------------

SHAPES = {"rows": (5, 6), "columns": (4, 3), "both": (6, 7), "copies": (3, 4), "row": (1, 5), "plain": (2, 2)}
PLACEMENTS = {
    "rows": (Replicate(), Shard(0)),
    "columns": (Shard(1), Replicate()),
    "both": (Shard(0), Shard(1)),
    "copies": (Replicate(), Replicate()),
    "row": (Shard(0), Shard(0)),
}


def values(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()
    }


def job_mixed(rank: int, case: str, more: dict):
    """Every placement on a mesh of 2 x 2, plain parameters beside them, gradients as partial sums."""
    dtype = dtype_of(path_taken())
    mesh = init_device_mesh("cpu", (2, 2))
    parameters = {}
    for name, value in values(0).items():
        value = value.to(dtype)
        spread = distribute_tensor(value, mesh, PLACEMENTS[name]) if name in PLACEMENTS else value
        parameters[name] = nn.Parameter(spread)
    optimizer = make(case, parameters.values(), **more)
    for step in (1, 2):
        for name, value in values(step).items():
            p, value = parameters[name], value.to(dtype)
            if name == "copies":  # each process has a part of the sum
                part = value / 4 + (rank - 1.5) * 0.1
                p.grad = DTensor.from_local(part, mesh, (Partial(), Partial()), run_check=False)
            else:
                p.grad = (
                    distribute_tensor(value, mesh, PLACEMENTS[name]) if name in PLACEMENTS else value.clone()
                )
        optimizer.step()
    norm = getattr(optimizer, "grad_norm", None)
    found = {name: whole(p.detach()) for name, p in parameters.items()}
    return found | ({} if norm is None else {"norm": whole(norm)})


def expected_mixed(case: str, path: str, more: dict) -> dict[str, Tensor]:
    with taking(path):
        parameters = {name: nn.Parameter(value.to(dtype_of(path))) for name, value in values(0).items()}
        optimizer = make(case, parameters.values(), **more)
        for step in (1, 2):
            for name, value in values(step).items():
                parameters[name].grad = value.to(dtype_of(path))
            optimizer.step()
        if more.get("max_grad_norm"):
            exact = torch.cat([value.flatten() for value in values(2).values()]).norm()
            assert_close(optimizer.grad_norm.double(), exact, rtol=1e-6, atol=0)
    found = {name: p.detach() for name, p in parameters.items()}
    return found | ({"norm": optimizer.grad_norm} if more.get("max_grad_norm") else {})


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("case", ["momentum", "adamw"])
def test_placements_and_plain_parameters_together(processes, path, case, clip):
    more = {"max_grad_norm": clip}
    expected = expected_mixed(case, path, more)
    for own in processes(4)(job_mixed, path, case, more):
        compare(own, expected, dtype_of(path))


@pytest.mark.parametrize("radius", [0.5, 100.0])
def test_the_norm_of_a_whole_parameter_goes_over_its_pieces(processes, path, radius):
    more = {"max_norm": radius}
    expected = expected_mixed("momentum", path, more)
    for own in processes(4)(job_mixed, path, "momentum", more):
        compare(own, expected, dtype_of(path))


def job_refused(rank: int):
    mesh = init_device_mesh("cpu", (2,))
    for placement, good in ((Shard(0), True), (Replicate(), True), (Shard(1), False)):
        p = nn.Parameter(distribute_tensor(torch.full((4, 6), 5.0), mesh, (placement,)))
        kept = p.to_local().clone()
        optimizer = optim.SGD([p], lr=0.1, max_norm=1.0, max_norm_dim=0)
        p.grad = torch.ones_like(p)
        if good:
            optimizer.step()
            assert_close(p.full_tensor().norm(dim=1), torch.ones(4))
        else:
            with pytest.raises(RuntimeError, match="rows that are whole"):
                optimizer.step()
            assert torch.equal(p.to_local(), kept)
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, (Shard(0),)))
    with pytest.raises(RuntimeError, match=r"placements|partial"):
        distributed.shards(DTensor.from_local(torch.ones(3), mesh, (Partial(),), run_check=False))
    plain = nn.Parameter(torch.ones(4))
    assert distributed.shards(plain) is None
    assert distributed.shards(p).dimensions == (0,)
    assert distributed.local(plain) is plain
    assert distributed.local(p).data_ptr() == p.to_local().data_ptr()


def test_rows_in_pieces_are_refused(processes, path):
    processes(2)(job_refused, path)


def job_absent(rank: int):
    """A process without a gradient takes part in the sum of the others."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, dtype=torch.float64), mesh, (Shard(0),)))
    optimizer = optim.SGD([p], lr=1.0, max_grad_norm=1.0)
    local = torch.full((2,), 3.0, dtype=torch.float64)
    if rank == 0:
        p.grad = DTensor.from_local(local, mesh, (Shard(0),), run_check=False)
    optimizer.step()
    return p.to_local(), optimizer.grad_norm


def test_a_process_without_gradients_does_not_hang_the_others(processes):
    (first, norm), (second, other) = processes(2)(job_absent, "aten")
    assert_close(norm.double(), torch.tensor(18.0, dtype=torch.float64).sqrt())
    assert torch.equal(norm, other)
    assert_close(first, 1 - torch.full((2,), 0.5, dtype=torch.float64).sqrt())
    assert second.tolist() == [1.0, 1.0]


def job_added(rank: int):
    """A group of pieces comes to one of whole tensors that has been stepped."""
    mesh = init_device_mesh("cpu", (2,))
    plain = nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([plain], lr=0.5)
    plain.grad = torch.ones(3)
    optimizer.step()
    spread = nn.Parameter(distribute_tensor(torch.ones(4), mesh, (Shard(0),)))
    optimizer.add_param_group({"params": [spread]})
    spread.grad = distribute_tensor(torch.ones(4), mesh, (Shard(0),))
    optimizer.step()
    return plain.detach(), spread.full_tensor()


def test_pieces_may_be_added_later(processes, path):
    for plain, spread in processes(2)(job_added, path):
        assert plain.tolist() == [0.0] * 3
        assert spread.tolist() == [0.5] * 4


def job_waits(rank: int):
    """A gradient that is still on its way, as an asynchronous redistribution leaves it."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, dtype=torch.float64), mesh, (Shard(0),)))
    part = DTensor.from_local(torch.full((4,), 1.5, dtype=torch.float64), mesh, (Partial(),), run_check=False)
    p.grad = part.redistribute(mesh, (Shard(0),), async_op=True)
    assert type(p.grad._local_tensor) is not Tensor
    optim.SGD([p], lr=0.1).step()
    return p.full_tensor()


def test_a_gradient_under_way_is_awaited(processes, path):
    for own in processes(2)(job_waits, path):
        assert_close(own, torch.full((4,), 0.7, dtype=torch.float64))


# --- checkpoints ------------------------------------------------------------------------------------------


def job_initial_state(rank: int, case: str, tensor: bool):
    """``get_optimizer_state_dict`` of a fresh optimizer takes a step with zero gradients and lr = 0."""
    dtype = dtype_of(path_taken())
    model = sharded(dtype, 2)
    kept = {name: p.to_local().clone() for name, p in model.named_parameters()}
    more = {"lr": torch.tensor(0.05)} if tensor else {}
    optimizer = make(case, model.parameters(), **more)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert state.keys() == kept.keys()
    for name, p in model.named_parameters():
        assert torch.equal(p.to_local(), kept[name]), name
        for key, value in state[name].items():
            local = value.to_local() if isinstance(value, DTensor) else value
            # the average, where there is one, is the parameter itself; all else is zero
            same = local.shape == kept[name].shape and torch.equal(local.to(dtype), kept[name])
            assert key == "step" or same or not local.any(), f"{name}.{key}"
    return {key for values in state.values() for key in values}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    "case", ["clipped", "everything"]
)  # coupled decay is a gradient: it enters the buffer
def test_the_first_state_of_a_checkpoint_changes_nothing(processes, path, case, tensor):
    keys, other = processes(2)(job_initial_state, path, case, tensor)
    assert keys == other
    assert keys >= ({"momentum_buffer"} if case == "clipped" else {"step", "exp_avg", "exp_avg_sq"})


def job_save(rank: int, case: str, folder: str, world: int):
    dtype = dtype_of(path_taken())
    model = sharded(dtype, world)
    optimizer = make(case, model.parameters())
    train(model, optimizer, range(2), dtype, rank, world)
    parameters, state = get_state_dict(model, optimizer)
    dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=folder)


def resume(model, optimizer, folder: str, dtype, rank: int, world: int) -> dict[str, Tensor]:
    parameters, state = get_state_dict(model, optimizer)
    loaded = {"model": parameters, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(model, optimizer, range(2, 4), dtype, rank, world)
    return results(model, optimizer)


def job_resume(rank: int, case: str, folder: str, world: int):
    dtype = dtype_of(path_taken())
    model = sharded(dtype, world)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0)  # everything comes from the file
    return resume(model, make(case, model.parameters()), folder, dtype, rank, world)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_two_processes_is_loaded_by_four_and_by_one(processes, path, case, tmp_path):
    processes(2)(job_save, path, case, str(tmp_path), 2)
    expected = expected_of(case, path, range(4))
    for own in processes(4)(job_resume, path, case, str(tmp_path), 4):
        compare(own, expected, dtype_of(path))
    with taking(path):
        model = Net(dtype_of(path))
        optimizer = make(case, model.parameters())
        alone = resume(model, optimizer, str(tmp_path), dtype_of(path), 0, 1)
    compare(alone, expected, dtype_of(path))


@pytest.mark.parametrize("case", ["momentum", "adamw"])
def test_a_checkpoint_of_torch_is_loaded_by_ours(processes, case, tmp_path):
    """The same keys, on sharded parameters."""
    model = Net(torch.float64)
    theirs = make(case, model.parameters(), torch.optim)
    train(model, theirs, range(2), torch.float64)
    parameters, state = get_state_dict(model, theirs)
    dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=str(tmp_path))
    train(model, theirs, range(2, 4), torch.float64)
    for own in processes(2)(job_resume_torch, "aten", case, str(tmp_path), 2):
        compare(own, results(model, theirs), torch.float64)


def job_resume_torch(rank: int, case: str, folder: str, world: int):
    """Groups of torch's checkpoints have none of our options: they are asked for without ours, too."""
    model = sharded(torch.float64, world)
    optimizer = make(case, model.parameters())
    parameters, state = get_state_dict(model, optimizer)
    known = set(make(case, [nn.Parameter(torch.ones(1))], torch.optim).param_groups[0])
    mine = copy.deepcopy(state["param_groups"])
    state["param_groups"] = [{k: v for k, v in g.items() if k in known} for g in mine]
    loaded = {"model": parameters, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    for group, kept in zip(loaded["optimizer"]["param_groups"], mine, strict=True):
        group.update({k: v for k, v in kept.items() if k not in group})
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(model, optimizer, range(2, 4), torch.float64, rank, world)
    return results(model, optimizer)


def test_nothing_is_initialised_here():
    """The reference is of one process, whatever ran before."""
    assert not dist.is_initialized()

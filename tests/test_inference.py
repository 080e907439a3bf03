"""``fastreg.update_bn``: population statistics of batch normalization."""

import copy
import io
import sys

import pytest
import torch
import torch.nn.functional as F
from norm_models import assert_state, batches_of, randomize, state_of
from rich.console import Console
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastreg
import fastreg.nn as fnn
from fastreg import population

pytestmark = pytest.mark.usefixtures("aten")


# ===== update_bn ===========================================================================================


def two_layers(layers, activation=True, dtype=torch.float64):
    """conv, norm, relu, dropout, linear, norm: with fastreg's layers the relu is inside the norm."""
    relu = activation and layers is fnn
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        layers.BatchNorm2d(4, **({"activation": "relu"} if relu else {})),
        nn.Identity() if relu else nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 9, 5),
        layers.BatchNorm1d(5),
    ).to(dtype)


def by_hand(model, batches):
    """What each of the two norms of ``two_layers`` gets in training mode, channels last dimension."""
    inputs = [[], []]
    for x in batches:
        h = F.conv2d(x, model[0].weight, model[0].bias).movedim(1, -1)
        inputs[0].append(h.reshape(-1, 4))
        flat = h.reshape(-1, 4)
        h = (h - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()
        h = F.relu(h * model[1].weight + model[1].bias).movedim(-1, 1).flatten(1)
        inputs[1].append(F.linear(h, model[5].weight, model[5].bias))
    return inputs


@pytest.mark.smoke
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layers", [nn, fnn], ids=["torch", "fastreg"])
@pytest.mark.parametrize("estimator", ["minibatch", "pooled"])
def test_is_algorithm_2(layers, estimator, training):
    model = randomize(two_layers(layers)).train(training)
    batches = batches_of([8, 8, 3])
    former = state_of(model)
    modes = [module.training for module in model.modules()]
    fastreg.update_bn(model, batches, estimator=estimator)
    for norm, name, inputs in zip((model[1], model[6]), ("1.", "6."), by_hand(model, batches), strict=True):
        if estimator == "minibatch":
            mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
            variance = torch.stack([x.var(0) for x in inputs]).mean(0)
        else:
            mean, variance = torch.cat(inputs).mean(0), torch.cat(inputs).var(0)
        # fp64 throughout, sums of a few hundred values
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-12, atol=1e-12)
        assert norm.num_batches_tracked == 3
        assert norm.momentum == 0.1
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            former[name + key] = model.state_dict()[name + key]
    assert_state(model, former)
    assert [module.training for module in model.modules()] == modes
    assert all(module.track_running_stats for module in (model[1], model[6]))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("estimator", ["minibatch", "pooled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_far_mean_and_narrow_dtypes(dtype, estimator):
    """Mean 1e4, variance 1: what E[x²] - E[x]² loses in fp32."""
    layer = nn.BatchNorm2d(2).to(dtype)
    far = 1e4 if dtype == torch.float32 else 8.0
    x = (torch.randn(50, 16, 2, 8, 8, dtype=torch.float64) + far).to(dtype)
    fastreg.update_bn(layer, list(x), estimator=estimator)
    values = x.double().movedim(2, -1).reshape(50, -1, 2)
    variance = values.var(1).mean(0) if estimator == "minibatch" else values.flatten(0, 1).var(0)
    # The result is rounded once to the buffers' dtype, after fp32 sums in each minibatch and fp64 ones over all. A
    # minibatch mean of 1e4 is rounded to 5e-4 in fp32; the means spread by 1/32, so pooling them may be wrong by
    # twice the product.
    unit = torch.finfo(dtype).eps
    bound = 1e-6 if estimator == "minibatch" else 2 * 5e-4 / 32
    torch.testing.assert_close(
        layer.running_mean.double(), values.flatten(0, 1).mean(0), rtol=unit, atol=0, check_dtype=False
    )
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=max(unit, bound), atol=0)


def test_pooled_merges_without_cancelling():
    """Many minibatches, mean 1e7 standard deviations away: E[x²] - E[x]² loses all digits even in fp64."""
    layer = nn.BatchNorm1d(1, dtype=torch.float64)
    x = torch.randn(50, 4, 1, dtype=torch.float64) + 1e8
    fastreg.update_bn(layer, list(x), estimator="pooled")
    # x itself is rounded to 1.5e-8, which is shared with the reference; its sums are exact to 1e-6 here
    torch.testing.assert_close(layer.running_var, x.view(-1, 1).var(0), rtol=1e-6, atol=0)


def test_under_autocast():
    model = two_layers(fnn, dtype=torch.float32)
    batches = batches_of([8, 8], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fastreg.update_bn(model, batches)
        h = torch.stack([model[0](x) for x in batches])
        assert h.dtype == torch.bfloat16
    assert model[1].running_var.dtype == torch.float32
    expected = torch.stack([x.double().movedim(1, -1).reshape(-1, 4).var(0) for x in h]).mean(0)
    torch.testing.assert_close(
        model[1].running_var.double(), expected, rtol=1e-6, atol=0
    )  # fp32 sums of bf16


def test_a_layer_called_twice_counts_two_minibatches():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = fnn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x) + self.norm(input=5 * x[:4]).sum()

    model, x = Twice(), torch.randn(10, 3)
    saved = []
    model.register_forward_hook(lambda module, args, output: saved.append(output.requires_grad))
    fastreg.update_bn(model, [x])
    assert saved == [False]  # nothing is kept for a backward pass
    mean = (x.mean(0) + 5 * x[:4].mean(0)) / 2
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=1e-6, atol=1e-6)  # one fp32 sum
    assert model.norm.num_batches_tracked == 2


def test_what_is_left_alone():
    """Frozen layers, layers without tracked statistics, layers that are not called, instance normalization."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.live, self.frozen = nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval()
            self.untracked = nn.BatchNorm1d(3, track_running_stats=False)
            self.stopped, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.stopped.track_running_stats = False
            self.instance = nn.InstanceNorm1d(3, track_running_stats=True)
            self.out = nn.BatchNorm1d(3)

        def forward(self, x):
            x = self.stopped(self.untracked(self.frozen(self.live(x))))
            return self.out(self.instance(x) if x.dim() == 3 else x)

    model = randomize(Model())
    former = state_of(model)
    fastreg.update_bn(model, [torch.randn(6, 3, 4) for _ in range(2)])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, former[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{layer}.{kind}" for layer in ("live", "out") for kind in kinds}
    assert not model.frozen.training
    assert not model.stopped.track_running_stats
    model.eval()
    fastreg.update_bn(model, [torch.randn(6, 3, 4)])  # a model in evaluation mode has no frozen layers
    assert not torch.equal(model.frozen.running_mean, former["frozen.running_mean"])


def test_forms_of_batches():
    x = torch.randn(6, 3)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x, scale=1):
            return self.norm(x * scale)

    for batch, factor in ((x, 1), ((x, 7), 1), ([x], 1), ({"x": x, "scale": 3}, 3)):
        model = Named()
        fastreg.update_bn(model, iter([batch]), device="cpu")
        torch.testing.assert_close(model.norm.running_mean, factor * x.mean(0), rtol=1e-6, atol=1e-6)


def test_moves_batches_to_the_device():
    model = nn.BatchNorm1d(3)

    def stop(_, args):
        raise InterruptedError(args[0].device.type)

    model.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError, match="meta"):
        fastreg.update_bn(model, [torch.randn(6, 3)], device="meta")


def test_reads_no_more_than_max_batches():
    read = []

    def loader():
        for x in torch.randn(9, 6, 3):
            read.append(x)
            yield x

    layer = nn.BatchNorm1d(3)
    fastreg.update_bn(layer, loader(), max_batches=2)
    assert len(read) == 2
    assert layer.num_batches_tracked == 2
    torch.testing.assert_close(
        layer.running_mean, torch.stack(read).mean((0, 1)), rtol=1e-6, atol=1e-6
    )  # fp32


def test_empty_batches_do_not_count():
    layer, x = nn.BatchNorm1d(3), torch.randn(6, 3)
    fastreg.update_bn(layer, [x, x[:0]])
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, x.mean(0), rtol=1e-6, atol=1e-6)


def broken_loader():
    yield torch.randn(4, 3, 5, 5)
    raise OSError("the disk is gone")


NAN = torch.full((4, 3, 5, 5), torch.nan)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (list, ValueError, "the loader gave no batch"),
        (broken_loader, OSError, "the disk is gone"),
        (lambda: batches_of([4, 4], torch.float32, (3, 3, 3)), RuntimeError, "cannot be multiplied"),
        (lambda: batches_of([4, 1], torch.float32), ValueError, "more than 1 value per channel"),
        (lambda: [torch.randn(4, 3, 5, 5), NAN], ValueError, r"layer '1' are not finite in torch\.float32"),
        (lambda: [NAN[:0]], ValueError, "called none of its batch normalization layers, or on empty"),
    ],
    ids=["empty", "loader", "shape", "one value", "nan", "empty batch"],
)
def test_nothing_changes_on_errors(loader, error, message, training):
    model = randomize(two_layers(fnn, dtype=torch.float32)).train(training)
    model[3].train(not training)
    former, modes = state_of(model), [module.training for module in model.modules()]
    with pytest.raises(error, match=message):
        fastreg.update_bn(model, loader())
    assert_state(model, former)
    assert [module.training for module in model.modules()] == modes
    assert all(module.track_running_stats for module in (model[1], model[6]))
    assert not any(module._forward_hooks for module in model.modules())


def test_refuses_bad_arguments():
    model = nn.BatchNorm1d(3)
    with pytest.raises(
        TypeError, match=r"update_bn\(model, loader\): expected a module first, but got a list"
    ):
        fastreg.update_bn([], model)
    with pytest.raises(ValueError, match="unknown estimator 'mean': choose one of minibatch, pooled"):
        fastreg.update_bn(model, [], estimator="mean")
    with pytest.raises(ValueError, match="max_batches has to be at least 1, but got 0"):
        fastreg.update_bn(model, [], max_batches=0)
    with pytest.raises(ValueError, match="not initialized: call it on a batch first"):
        fastreg.update_bn(nn.LazyBatchNorm1d(), [torch.randn(4, 3)])


def test_without_layers_reads_nothing():
    fastreg.update_bn(nn.Linear(3, 3), broken_loader())


def test_compiled_models():
    """Both forms of compiling, each after its code exists: it is neither used nor replaced."""
    plain = two_layers(fnn, dtype=torch.float32)
    batches = batches_of([8, 8], dtype=torch.float32)
    inside, whole = copy.deepcopy(plain), copy.deepcopy(plain)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    wrapped = torch.compile(whole, backend=backend)
    inside.compile(backend=backend)
    for model in (wrapped, inside):
        model.eval()(batches[0])
    compiled = len(graphs)
    fastreg.update_bn(plain, batches)
    for model in (wrapped, inside):
        fastreg.update_bn(model, batches)
    assert_state(inside, plain.state_dict())
    assert_state(whole, plain.state_dict())
    assert len(graphs) == compiled
    torch.compiler.reset()


def test_data_parallel_wrappers():
    plain = two_layers(fnn, dtype=torch.float32)
    batches = batches_of([8, 8], dtype=torch.float32)
    model = copy.deepcopy(plain)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        fastreg.update_bn(wrapped, batches)
        fastreg.update_bn(plain, batches)
        assert_state(model, plain.state_dict())
        folded = fastreg.fold_batch_norm(wrapped.eval())
        assert type(folded) is nn.Sequential
    finally:
        torch.distributed.destroy_process_group()


def test_synchronized_layers_take_the_minibatch_of_all_processes(monkeypatch):
    """Three minibatches of seven rows, two of which come from a process that is played by its part of all_gather."""

    class OnCpu(nn.SyncBatchNorm):
        forward = _BatchNorm.forward  # torch's own refuses CPU tensors while there is a process group

    x = torch.randn(3, 7, 2) * 3 + 5

    def all_gather(tensors, own, group):
        count, mean, deviations = population._moments(next(theirs))
        tensors[0].copy_(own)
        tensors[1].copy_(torch.cat([mean.new_full((1,), count), mean, deviations]))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    for estimator in ("minibatch", "pooled"):
        theirs, layer = iter(x[:, 5:]), OnCpu(2, process_group="any")
        fastreg.update_bn(layer, list(x[:, :5]), estimator=estimator)
        assert_is_of_all(layer, x, estimator)


def assert_is_of_all(layer, x, estimator):
    variance = x.var(1).mean(0) if estimator == "minibatch" else x.flatten(0, 1).var(0)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 1)), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.running_var, variance, rtol=1e-6, atol=0)  # fp32 sums


def one_of_two_processes(rank, file, x):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    part = [minibatch[:5] if rank == 0 else minibatch[5:] for minibatch in x]
    for estimator in ("minibatch", "pooled"):
        layer = fnn.SyncBatchNorm(2)
        fastreg.update_bn(layer, part, estimator=estimator)
        assert_is_of_all(layer, x, estimator)
    model = nn.parallel.DistributedDataParallel(nn.BatchNorm1d(2))
    fastreg.update_bn(model, part[: 1 + rank])  # no collective of the wrapper: loaders may differ in length
    assert model.module.num_batches_tracked == 1 + rank
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    x = torch.randn(3, 7, 2) * 3 + 5
    torch.multiprocessing.spawn(one_of_two_processes, (str(tmp_path / "store"), x), nprocs=2)


def test_torchs_own_update_bn_takes_our_layers():
    torchs, ours = two_layers(nn, dtype=torch.float32), two_layers(fnn, activation=False, dtype=torch.float32)
    torchs[3].p = ours[3].p = 0.0
    randomize(torchs)
    ours.load_state_dict(torchs.state_dict())
    batches = batches_of([8, 8, 3], dtype=torch.float32)
    for model in (torchs, ours):
        torch.optim.swa_utils.update_bn([(x, 0) for x in batches], model)
    assert_state(ours, torchs.state_dict())  # the same operations in ATen: the same bits
    assert ours[1].num_batches_tracked == 3
    assert ours[1].momentum == 0.1
    # Its running average of the same numbers, in fp32, is our minibatch estimate.
    fastreg.update_bn(ours, batches)
    for norm in (1, 6):
        torch.testing.assert_close(ours[norm].running_mean, torchs[norm].running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[norm].running_var, torchs[norm].running_var, rtol=1e-5, atol=1e-6)


# --- its progress bar --------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch):
    """stderr, played by a terminal of rich."""
    text = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console", lambda **_: Console(file=text, force_terminal=True, force_interactive=True)
    )
    return text


def test_bar_shows_on_long_loaders_only(terminal, monkeypatch):
    layer, batches = nn.BatchNorm1d(3), [torch.randn(6, 3)] * 4
    fastreg.update_bn(layer, batches)
    assert terminal.getvalue() == ""
    fastreg.update_bn(layer, batches, progress=True)
    assert "batch statistics" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()
    terminal.truncate(0)
    monkeypatch.setattr(population, "PATIENCE", -1)
    fastreg.update_bn(layer, batches, progress=False)
    assert terminal.getvalue() == ""
    for loader in (batches, iter(batches)):
        terminal.truncate(0)
        fastreg.update_bn(layer, loader, max_batches=3)
        assert "3/3" in terminal.getvalue()
    terminal.truncate(0)
    with pytest.raises(OSError, match="disk"):
        fastreg.update_bn(two_layers(nn, dtype=torch.float32), broken_loader())
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is shown again: the bar has stopped


def test_no_bar_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(population, "PATIENCE", -1)
    fastreg.update_bn(nn.BatchNorm1d(3), [torch.randn(6, 3)])
    assert capsys.readouterr() == ("", "")


def test_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    layer = nn.BatchNorm1d(3)
    fastreg.update_bn(layer, [torch.randn(6, 3)])
    assert layer.num_batches_tracked == 1
    with pytest.raises(ImportError, match="progress=True needs rich: pip install rich"):
        fastreg.update_bn(layer, [torch.randn(6, 3)], progress=True)
    assert layer.num_batches_tracked == 1

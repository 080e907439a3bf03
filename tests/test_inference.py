"""Population statistics and folding of batch normalization: fastreg/population.py, fastreg/folding.py."""

import copy
import io
import sys

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastreg
import fastreg.nn as fnn
from fastreg import population
from fastreg.folding import ChannelAffine, Folded

pytestmark = pytest.mark.usefixtures("aten")

# fp32: a few roundings of 6e-8 in each of at most five layers, which gains up to 3 may each amplify.
FP32 = 1e-5
# fp64: the same number of roundings of 1e-16: folding itself is exact.
FP64 = 1e-13


def assert_same(actual, expected, tolerance):
    """The error counts against the largest value: a sum that cancels keeps the rounding of its terms."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item())
    )


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, equal_nan=True, msg=name)


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


def batches_of(sizes, dtype=torch.float64, shape=(3, 5, 5)):
    return [torch.randn(size, *shape, dtype=dtype) * 2 + 1 for size in sizes]


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


def randomize(model):
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.normal_(module.weight, 1)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model


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


# ===== fold_batch_norm =====================================================================================


def norms_in(model):
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def affines_in(model):
    return [name for name, module in model.named_modules() if isinstance(module, ChannelAffine)]


def check_fold(model, *inputs, affine=(), left=(), **keywords):
    """Folds in fp32 and in fp64, compares outputs and what became of each normalization; returns the fp32 fold."""
    model = randomize(model).eval()
    for dtype, tolerance in ((torch.float64, FP64), (torch.float32, FP32)):
        model.to(dtype)
        x = [value.to(dtype) for value in inputs]
        example = {name: value.to(dtype) for name, value in keywords.items()}
        expected = model(*x)
        former = state_of(model)
        folded = fastreg.fold_batch_norm(model, **example)
        assert_state(model, former)
        assert_same(folded(*x), expected, tolerance)
        assert affines_in(folded) == list(affine)
        assert norms_in(folded) == list(left)
        assert not any(module.training for module in folded.modules())
    assert folded is not model
    return folded


class Block(nn.Module):
    """A residual block as torchvision writes it; with fastreg's layers, residual and relu are the norm's."""

    def __init__(self, channels, layers=nn):
        super().__init__()
        self.ours = layers is fnn
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = layers.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = (
            layers.BatchNorm2d(channels, activation="relu") if self.ours else layers.BatchNorm2d(channels)
        )
        self.relu = nn.ReLU(inplace=True)
        self.down = None

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        out = self.relu(self.bn1(self.conv1(x)))
        if self.ours:
            return self.bn2(self.conv2(out), residual=identity)
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def resnet(layers=nn):
    second = Block(8, layers)
    second.down = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), layers.BatchNorm2d(8))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        layers.BatchNorm2d(8),
        nn.ReLU(),
        Block(8, layers),
        second,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
        layers.BatchNorm1d(5),
    )


def test_stack():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False),
        fnn.BatchNorm2d(4, eps=0.1, activation="gelu"),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4, affine=False),
    )
    folded = check_fold(model, torch.randn(2, 3, 8, 8))
    assert type(folded[1]) is nn.Identity
    assert type(folded[4]) is Folded
    assert list(folded.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias", "5.weight", "5.bias"]
    assert folded[0].weight.requires_grad


@pytest.mark.parametrize("layers", [nn, fnn], ids=["torch", "fastreg"])
def test_residual_network(layers):
    folded = check_fold(resnet(layers), torch.randn(2, 3, 9, 9))
    assert type(folded) is nn.Sequential
    assert type(folded[3]) is Block


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 8, 3, groups=2),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(4, 8, 2, dilation=2),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.ConvTranspose1d(4, 8, 3),
        nn.ConvTranspose2d(4, 8, 3, stride=2, groups=4, bias=False),
        nn.ConvTranspose2d(8, 8, 3, groups=8),
        nn.ConvTranspose3d(4, 8, 2, groups=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("synchronized", [False, True])
def test_convolutions(layer, synchronized):
    dims = int(type(layer).__name__[-2])
    norm = nn.SyncBatchNorm(8) if synchronized else getattr(nn, f"BatchNorm{dims}d")(8)
    folded = check_fold(nn.Sequential(layer, norm), torch.randn(2, layer.in_channels, *[5] * dims))
    if dims == 1 or synchronized:  # unbatched, it would have normalized another dimension
        with pytest.raises(AssertionError, match=f"folded for inputs of rank {dims + 2}"):
            folded(torch.randn(layer.in_channels, *[5] * dims))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "before",
    [
        [nn.Flatten()],
        [nn.Flatten(), nn.Dropout(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), fnn.LayerNorm(6)],
    ],
)
def test_linear(before, bias):
    check_fold(nn.Sequential(*before, nn.Linear(6, 4, bias), nn.BatchNorm1d(4)), torch.randn(5, 2, 3))


class Reshaped(nn.Module):
    def __init__(self, reshape):
        super().__init__()
        self.reshape = reshape
        self.linear, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.linear(self.reshape(x)))


@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: torch.flatten(x, 1),
        lambda x: x.flatten(start_dim=1).relu(),
        lambda x: F.relu(x.view(x.size(0), -1)),
        lambda x: torch.reshape(x, (-1, 6)),
    ],
)
def test_linear_after_reshaping(reshape):
    check_fold(Reshaped(reshape), torch.randn(5, 2, 3))


def test_linear_of_three_dimensions_is_not_folded():
    """Channels are dim 1, features the last, and here both are 4: only the affine form is right."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    check_fold(model, torch.randn(5, 4, 6), affine=["1"])
    check_fold(model, torch.randn(5, 4, 6), affine=["1"], example=torch.randn(5, 4, 6))
    check_fold(Reshaped(lambda x: x.flatten(2)), torch.randn(5, 4, 2, 3), affine=["norm"])
    check_fold(Reshaped(nn.Flatten(2)), torch.randn(5, 4, 2, 3), affine=["norm"])
    check_fold(Reshaped(nn.ReLU()), torch.randn(5, 4, 6), affine=["norm"])
    check_fold(Reshaped(F.relu), torch.randn(5, 4, 6), affine=["norm"])
    check_fold(Reshaped(lambda x: x.view(-1, 4, 6)), torch.randn(5, 4, 6), affine=["norm"])


@torch.fx.wrap
def flatten(x, start_dim):
    """Not what torch's function of this name does, and unknown to the tracer."""
    return torch.flatten(x, start_dim).unflatten(1, (4, 6))


def test_what_does_not_show_a_matrix():
    unflattening = nn.Flatten()
    unflattening.register_forward_hook(lambda module, args, output: output.unflatten(1, (4, 6)))
    for reshape in (lambda x: flatten(x, 1), lambda x: x.flatten(1).unflatten(1, (4, 6)), unflattening):
        check_fold(Reshaped(reshape), torch.randn(5, 4, 6), affine=["norm"])


def test_linear_with_an_example():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    folded = check_fold(model, torch.randn(5, 6), example=torch.randn(2, 6))
    with pytest.raises(AssertionError, match="folded for inputs of rank 2"):
        folded(torch.randn(5, 4, 6))
    assert not model[1]._forward_hooks


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 4), (5, 3, 4, 4, 2)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_first_layer_becomes_affine(shape, activation):
    kind = getattr(fnn, f"BatchNorm{max(len(shape) - 2, 1)}d")
    model = nn.Sequential(kind(3, activation=activation), nn.ReLU())
    folded = check_fold(model, torch.randn(shape), affine=["0"])
    with pytest.raises(AssertionError, match="expected 3 channels in dim 1"):
        folded(torch.randn(shape)[:, :1])
    torch.fx.symbolic_trace(folded)


def test_affine_form_keeps_residual_dtype_and_memory_format():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = fnn.BatchNorm2d(3, activation="relu")

        def forward(self, x, r):
            return self.norm(x, residual=r)

    model = randomize(Model()).eval()
    x, r = torch.randn(2, 2, 3, 4, 4).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    folded = fastreg.fold_batch_norm(model)
    y = folded(x, r)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same(y, model(x, r), 2**-8)  # a value next to a rounding boundary of bf16 may take the other side
    with pytest.raises(ValueError, match="the residual has to have the shape of the input"):
        folded(x, r[:1])


class Using(nn.Module):
    """conv and norm, used as ``use(model, x)`` says."""

    def __init__(self, use, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm, self.again = nn.Conv2d(4, 4, 1), norm(4), nn.BatchNorm2d(4)
        self.use = use
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        return self.use(self, x)


def counted(self, x):
    self.count.add_(1)
    self.last = x
    self.norm.seen = True
    return self.norm(self.conv(x)) * torch.tensor([2.0], dtype=torch.float64).to(x.dtype)


def hidden_use(self, x):
    kept = self.conv(x)
    kept.add_(1)
    return self.norm(self.conv(x) if False else kept)


def sliced(self, x):
    layers = nn.Sequential(self.conv, self.norm)
    kept = layers[:1](x)
    return layers[1:](kept), kept


def by_type(self, x):
    for layer in (self.conv, self.norm):
        x = 3 * layer(x) if isinstance(layer, _BatchNorm) else layer(x)
    return x


@pytest.mark.parametrize(
    ("use", "affine", "left"),
    [
        (lambda self, x: self.norm(self.conv(x)), [], []),
        (counted, [], []),
        (lambda self, x: self.norm(input=self.conv(x)), [], []),
        (lambda self, x: torch.cat([self.norm(y := self.conv(x)), y]), ["norm"], []),
        (lambda self, x: self.norm(self.conv(x)) + self.again(self.conv(x)), ["norm", "again"], []),
        (lambda self, x: self.norm(self.conv(x)) + self.conv(x), ["norm"], []),
        (lambda self, x: self.norm(self.conv(x)) + self.norm(x), ["norm"], []),
        (hidden_use, ["norm"], []),
        (lambda self, x: self.norm(self.conv(x)) + self.conv.weight.sum(), ["norm"], []),
        (lambda self, x: self.norm(self.conv(x)) + self.norm.bias.sum(), [], ["norm"]),
        (lambda self, x: self.norm(self.conv(x)) + self.norm.running_var.sum(), [], ["norm"]),
        (lambda self, x: self.norm(self.conv(x)) * self.norm.eps, [], ["norm"]),
        (by_type, [], ["norm"]),
        (lambda self, x: sliced(self, x)[0], [], []),
        (lambda self, x: torch.cat(sliced(self, x)), ["norm"], []),
    ],
)
def test_only_what_is_proved(use, affine, left):
    """The second norm is in most of these models never called: it stays."""
    model = Using(use)
    unused = [] if "again" in affine else ["again"]
    folded = check_fold(model, torch.randn(2, 4, 3, 3), affine=affine, left=left + unused)
    count = folded.count.clone()
    again = fastreg.fold_batch_norm(folded)  # tracing alone leaves no traces
    assert torch.equal(again.count, count)
    assert not [name for name in vars(again) if "constant" in name]
    assert isinstance(getattr(again, "last", torch.zeros(())), torch.Tensor)


def test_residual_that_is_the_input():
    check_fold(
        Using(lambda self, x: self.norm(y := self.conv(x), residual=y), fnn.BatchNorm2d),
        torch.randn(2, 4, 3, 3),
        affine=["norm"],
        left=["again"],
    )


def test_residual_without_activation():
    model = Using(lambda self, x: self.norm(self.conv(x), residual=x), fnn.BatchNorm2d)
    folded = check_fold(model, torch.randn(2, 4, 3, 3), left=["again"])
    with pytest.raises(ValueError, match="the residual has to have the shape of the input"):
        folded.norm(torch.randn(2, 4, 3, 3), residual=torch.randn(4, 1, 1))


def test_unbatched_input_of_another_rank():
    """BatchNorm1d takes [C, H, W] of an unbatched convolution for [N, C, L]: its channels are the rows."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4))
    check_fold(model, torch.randn(3, 4, 5), affine=["1"])


def test_layers_that_do_not_fit():
    """They fail when they are called, as before."""
    for model in (
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(1)),
    ):
        folded = fastreg.fold_batch_norm(model.eval())
        with pytest.raises((AssertionError, RuntimeError), match=r"channels|expand"):
            folded(torch.randn(2, 4, 3, 3))


class Optional(nn.Module):
    """The convolution's output leaves in one of the ways to call it."""

    def __init__(self, escape):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.escape = escape

    def forward(self, x, scale=None, *, features=False):
        kept = self.conv(x)
        out = self.norm(kept)
        if scale is not None:
            out = out * scale
        return (out, kept if self.escape else x) if features else out


@pytest.mark.parametrize("escape", [True, False])
def test_every_way_of_calling_is_looked_at(escape):
    folded = check_fold(Optional(escape), torch.randn(2, 4, 3, 3), affine=["norm"] if escape else [])
    x = torch.randn(2, 4, 3, 3)
    folded(x, torch.ones(()), features=True)


def test_too_many_ways_of_calling():
    class Model(Using):
        def forward(self, x, a=0.0, b=0.0, c=0.0, d=0.0):
            return self.norm(self.conv(x)) + a + b + c + d

    check_fold(Model(None), torch.randn(2, 4, 3, 3), left=["norm", "again"])


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.parts = nn.ModuleList(
            [Block(8), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), Block(8, fnn)]
        )

    def forward(self, x):
        x = self.norm(self.stem(x))
        if x.sum() > 1e9:
            return x
        for part in self.parts:
            x = part(x)
        return x


def test_untraceable_model_is_folded_part_by_part():
    folded = check_fold(Untraceable(), torch.randn(2, 3, 8, 8), left=["norm"])
    assert type(folded.parts[1][1]) is nn.Identity


def test_hooks():
    """A hooked pair is left; around a hooked module the rest is folded, and so is its inside."""
    shapes = []
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        Block(8),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8),
    )
    model[2].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    model[3].register_forward_hook(lambda module, args, output: output * 2)
    model[5].register_forward_pre_hook(lambda module, args: None)
    folded = check_fold(model, torch.randn(2, 3, 4, 4), affine=["4"], left=["5"])
    assert set(shapes) == {(2, 8, 4, 4)}  # no proxies
    assert type(folded[2].bn1) is nn.Identity


def weight_normed():
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))


def replaced_forward():
    layer = nn.Conv2d(4, 4, 1)
    layer.forward = lambda x: F.conv2d(x, layer.weight)
    return layer


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Ours(Doubling):
    """A layer like those of fastreg.nn, which are not traced into."""

    __module__ = "fastreg.nn.doubling"


class Negated(nn.Module):
    """A parametrization that cannot be traced."""

    def forward(self, weight):
        return -weight if weight.sum() > 0 else weight


def parametrized(channels):
    layer = nn.BatchNorm2d(channels)
    nn.utils.parametrize.register_parametrization(layer, "weight", Negated())
    return layer


class Subclass(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        (weight_normed, nn.BatchNorm2d),
        (lambda: Doubling(4, 4, 1), nn.BatchNorm2d),
        (lambda: Ours(4, 4, 1), nn.BatchNorm2d),
        (lambda: nn.Conv2d(4, 4, 1), Subclass),
        (lambda: nn.Conv2d(4, 4, 1), parametrized),
        (lambda: nn.Conv2d(4, 4, 1), lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
    ],
)
def test_layers_that_are_not_torchs_own(layer, norm):
    left = norm is not nn.BatchNorm2d
    check_fold(
        nn.Sequential(layer(), norm(4)),
        torch.randn(2, 4, 3, 3),
        affine=[] if left else ["1"],
        left=["1"] if left else [],
    )


def test_a_replaced_forward_is_left():
    model = randomize(nn.Sequential(replaced_forward(), nn.BatchNorm2d(4))).eval()
    assert affines_in(fastreg.fold_batch_norm(model)) == ["1"]


def test_a_pair_called_from_two_regions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.block.register_forward_hook(lambda module, args, output: None)

        def forward(self, x):
            return self.block(x) + self.block[1](self.block[0](x))

    check_fold(Model(), torch.randn(2, 4, 3, 3), left=["block.1"])


def test_a_layer_with_two_names():
    """Called by one of them, and seen under both."""
    model = Using(lambda self, x: self.norm(self.conv(x)))
    model.alias = model.norm
    check_fold(model, torch.randn(2, 4, 3, 3), left=["norm", "again"])


def test_shared_modules():
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    check_fold(nn.Sequential(block, nn.ReLU(), block), torch.randn(2, 4, 3, 3), affine=["0.1"])
    conv = nn.Conv2d(4, 4, 1)
    check_fold(
        nn.Sequential(conv, nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4)),
        torch.randn(2, 4, 3, 3),
        affine=["1", "3"],
    )
    norm = nn.BatchNorm2d(4)
    check_fold(
        nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Conv2d(4, 4, 1), norm), torch.randn(2, 4, 3, 3), left=["1"]
    )


def test_tied_weights_keep_the_other_layer():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    check_fold(model, torch.randn(2, 4, 3, 3))


def test_channels_last():
    model = randomize(resnet()).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    folded = fastreg.fold_batch_norm(model)
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert folded[:5](x).is_contiguous(memory_format=torch.channels_last)
    assert_same(folded(x), model(x), FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_folded_in_fp64(dtype):
    """A convolution of ``dtype``, an fp32 normalization: each new weight is rounded once."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))
    randomize(model).eval()
    model[0].to(dtype)
    folded = fastreg.fold_batch_norm(model)
    norm = copy.deepcopy(model[1]).double()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = model[0].weight.double() * scale.view(-1, 1, 1, 1)
    assert torch.equal(folded[0].weight, weight.to(dtype))
    assert torch.equal(folded[0].bias, (norm.bias - norm.running_mean * scale).to(dtype))
    x = torch.randn(2, 4, 5, 5).to(dtype)
    # four roundings to bf16: of weights, convolution, bias and result
    assert_same(folded(x), model(x), FP32 if dtype == torch.float32 else 2**-6)


def test_affine_form_of_narrow_parameters_is_fp32():
    model = randomize(nn.Sequential(nn.BatchNorm2d(3))).eval().bfloat16()
    folded = fastreg.fold_batch_norm(model)
    assert folded[0].weight.dtype == torch.float32
    x = torch.randn(2, 3, 4, 4).bfloat16()
    assert_same(folded(x), model(x), 2**-8)  # computed in fp32 and rounded once, both


def test_weights_that_would_overflow_are_not_folded():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    model[0].half().weight.data.fill_(6e4)
    model[1].running_var.fill_(0.01)
    folded = fastreg.fold_batch_norm(model)
    assert affines_in(folded) == ["1"]
    assert torch.equal(folded[0].weight, model[0].weight)


def test_in_place():
    model = randomize(resnet()).eval()
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    assert fastreg.fold_batch_norm(model, inplace=True) is model
    assert norms_in(model) == []
    assert_same(model(x), expected, FP32)


def test_compiled_and_folded_models():
    model = randomize(nn.Sequential(fnn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4))).eval()
    wrapped = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 5, 5)
    folded = fastreg.fold_batch_norm(wrapped)
    assert type(folded) is nn.Sequential
    assert_same(torch.compile(folded, backend="eager", fullgraph=True)(x), model(x), FP32)
    torch.compiler.reset()


def test_graph_modules():
    model = torch.fx.symbolic_trace(randomize(resnet()).eval())
    check_fold(model, torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize("inplace", [True, False])
def test_refuses_training_mode(inplace):
    model = randomize(resnet())
    former = state_of(model)
    with pytest.raises(ValueError, match=r"the model is in training mode: call model\.eval\(\)"):
        fastreg.fold_batch_norm(model, inplace=inplace)
    model.eval()[3].bn1.train()
    with pytest.raises(ValueError, match=r"its module '3\.bn1' is in training mode"):
        fastreg.fold_batch_norm(model, inplace=inplace)
    assert_state(model, former)
    with pytest.raises(TypeError, match="expected a module, but got a list"):
        fastreg.fold_batch_norm([model])


def test_update_then_fold():
    """Algorithm 2 from end to end."""
    model = randomize(resnet(fnn))
    fastreg.update_bn(model, batches_of([8, 8], torch.float32, (3, 9, 9)))
    x = torch.randn(2, 3, 9, 9)
    assert_same(fastreg.fold_batch_norm(model.eval())(x), model(x), FP32)

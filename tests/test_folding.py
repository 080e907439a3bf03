"""``fastreg.fold_batch_norm``: batch normalization folded into the layer before it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from norm_models import assert_state, batches_of, randomize, state_of
from shared import near
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastreg
import fastreg.nn as fnn
from fastreg.folding import ChannelAffine, Folded

pytestmark = pytest.mark.usefixtures("aten")

# fp32: a few roundings of 6e-8 in each of at most five layers, which gains up to 3 may each amplify.
FP32 = 1e-5
# fp64: the same number of roundings of 1e-16: folding itself is exact.
FP64 = 1e-13


def assert_alike(actual, expected, tolerance):
    assert actual.dtype == expected.dtype
    near(actual, expected, tolerance)


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
        assert_alike(folded(*x), expected, tolerance)
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


@pytest.mark.smoke
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
    assert_alike(y, model(x, r), 2**-8)  # a value next to a rounding boundary of bf16 may take the other side
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
    assert_alike(folded(x), model(x), FP32)


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
    assert_alike(folded(x), model(x), FP32 if dtype == torch.float32 else 2**-6)


def test_affine_form_of_narrow_parameters_is_fp32():
    model = randomize(nn.Sequential(nn.BatchNorm2d(3))).eval().bfloat16()
    folded = fastreg.fold_batch_norm(model)
    assert folded[0].weight.dtype == torch.float32
    x = torch.randn(2, 3, 4, 4).bfloat16()
    assert_alike(folded(x), model(x), 2**-8)  # computed in fp32 and rounded once, both


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
    assert_alike(model(x), expected, FP32)


def test_compiled_and_folded_models():
    model = randomize(nn.Sequential(fnn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4))).eval()
    wrapped = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 5, 5)
    folded = fastreg.fold_batch_norm(wrapped)
    assert type(folded) is nn.Sequential
    assert_alike(torch.compile(folded, backend="eager", fullgraph=True)(x), model(x), FP32)
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
    assert_alike(fastreg.fold_batch_norm(model.eval())(x), model(x), FP32)

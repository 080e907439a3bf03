"""Tensors without data, on the meta device and under ``FakeTensorMode``: shapes, dtypes, strides, gradients."""

import pytest
import torch
from every_layer import LAYERS
from torch._subclasses.fake_tensor import FakeTensorMode

import fastreg.functional as F
import fastreg.nn as fnn

all_layers = pytest.mark.parametrize("name", LAYERS)
both_modes = pytest.mark.parametrize("training", [True, False])
RANDOM = [*(name for name in F.__all__ if "drop" in name), "gaussian_noise", "noisy_linear"]


def _seen(y, x, layer):
    """All that can be known of a result and its gradients without data."""
    y = y[0] if isinstance(y, tuple) else y
    gradients = [None] * (1 + len(list(layer.parameters())))
    if y.requires_grad:
        gradients = torch.autograd.grad(y.sum(), [x, *layer.parameters()], allow_unused=True)
    return [t if t is None else (t.shape, t.dtype, t.stride()) for t in (y, *gradients)]


def _expected(case, training):
    """What the layer shows with data."""
    x = torch.randn(case.shape, requires_grad=True)
    layer = case.make().train(training)
    return _seen(layer(x), x, layer)


@all_layers
@both_modes
def test_on_the_meta_device(name, training, path):
    case = LAYERS[name]
    layer = case.make().to("meta").train(training)
    x = torch.empty(case.shape, device="meta", requires_grad=True)
    assert _seen(layer(x), x, layer) == _expected(case, training)


@all_layers
@both_modes
def test_under_fake_tensor_mode(name, training, path):
    case = LAYERS[name]
    expected = _expected(case, training)
    with FakeTensorMode():
        layer = case.make().train(training)
        x = torch.empty(case.shape, requires_grad=True)
        assert _seen(layer(x), x, layer) == expected


@pytest.mark.parametrize(
    "name", [name for name, case in LAYERS.items() if case.torchs and len(case.shape) == 4]
)
@both_modes
@pytest.mark.parametrize("device", ["meta", "fake"])
def test_layouts_are_those_of_torch(name, training, device):
    case = LAYERS[name]
    mode = FakeTensorMode() if device == "fake" else torch.device("meta")
    with mode:
        ours, theirs = case.make().train(training), case.torchs().train(training)
        x = torch.empty(case.shape).to(memory_format=torch.channels_last).requires_grad_()
        assert _seen(ours(x), x, ours) == _seen(theirs(x), x, theirs)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch itself needs a build for CUDA")
@all_layers
@both_modes
def test_fake_tensors_of_a_gpu_that_is_not_there(name, training):
    """Nothing asks CUDA for a generator."""
    case = LAYERS[name]
    with torch.no_grad(), FakeTensorMode():
        layer = case.make()
        if list(layer.parameters()):
            layer = getattr(fnn, case.layer)(*case.arguments, **case.keywords, device="cuda")
        x = torch.empty(case.shape, device="cuda")
        y = layer.train(training)(x)
        assert (y.device.type, y.dtype) == ("cuda", torch.float32)


def _arguments(name, device):
    x = torch.ones((4, 6, 3, 2, 5)[: {"1": 3, "2": 4}.get(name[-2], 5)], device=device)
    more = {
        "drop_connect_linear": (torch.ones(7, x.shape[-1], device=device),),
        "noisy_linear": (torch.ones(7, x.shape[-1], device=device),),
        "dropout_add_layer_norm": (x, x.shape[-1:]),
    }
    return (x, *more.get(name, ()))


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize(
    "given", [{}, {"seed": 3}, {"generator": torch.Generator()}], ids=["", "seed", "generator"]
)
def test_functions_with_every_source_of_randomness(name, given, path):
    """A generator belongs to a device, and there is none on the meta device: torch's own error."""
    call = getattr(F, name)
    options = {"training": True, **given}
    if "generator" not in given:
        assert (
            call(*_arguments(name, "meta"), **options).shape
            == call(*_arguments(name, "cpu"), **options).shape
        )
    with FakeTensorMode():
        assert (
            call(*_arguments(name, "cpu"), **options).shape == call(*_arguments(name, "cpu"), **options).shape
        )

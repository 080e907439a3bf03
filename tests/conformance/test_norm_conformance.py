"""Batch, group and instance normalization under PyTorch's own suites, and beside torch's layers in everything else.

Both backends (fixture ``path``). ATen has to give torch's bits, for a plain normalization is torch's own function
there. The kernels are compared with torch in fp64: their statistics are fp32 for 16-bit inputs, torch's are not.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from norm_cases import (
    FUNCTIONS,
    KINDS,
    MODULES,
    SHAPES,
    all_kinds,
    assert_computed_alike,
    assert_layers_agree,
    gradient_scale,
    leaves,
    randomize,
    slow,
    tensors,
)
from shared import assert_same, outcome

import fastreg.functional as FF
import fastreg.nn as fnn
from fastreg.ops.backend import Launch

try:  # private, and not promised to stay where it is
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
except ImportError:
    op_db, module_db = [], []

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
sampled = pytest.mark.sampled


@all_kinds
def test_the_paths_are_what_they_are_called(kind, device, path, monkeypatch):
    """All tests below with ``path`` would pass if both paths were ATen: this one would not."""
    launches = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch, device: (launches.append(1), run(launch, device)))
    x, weight, bias, _ = tensors(SHAPES[4], device)
    x.requires_grad_()
    y = KINDS[kind](FF, x, weight, bias)
    forward = len(launches)
    y.sum().backward()
    assert (forward > 0, len(launches) > forward) == (path == "kernels",) * 2


# --- ModuleInfo -------------------------------------------------------------------------------------------

MODULE_INFOS = [
    info for info in module_db if info.module_cls in [getattr(torch.nn, name) for name in MODULES]
]


def on_both_in(things, dtypes, fast):
    """As ``on_both``. fast: {dtype: the labels that the default run takes on the kernels}."""
    return [
        pytest.param(
            thing,
            dtype,
            backend_name,
            id=f"{label}-{str(dtype)[6:]}-{backend_name}",
            marks=[slow] if backend_name == "kernels" and label not in fast.get(dtype, ()) else [],
        )
        for label, thing in things.items()
        for dtype in dtypes
        for backend_name in ("kernels", "aten")
    ]


MODULE_CASES = on_both_in(
    {info.module_cls.__name__: info for info in MODULE_INFOS},
    DTYPES,
    {torch.float32: MODULES, torch.bfloat16: ("BatchNorm2d", "GroupNorm", "InstanceNorm2d")},
)


def ours_of(layer_class):
    return getattr(fnn, layer_class.__name__)


@pytest.mark.skipif(not module_db, reason="torch.testing._internal has changed")
def test_module_info_knows_what_it_is_asked_for():
    assert {info.module_cls.__name__ for info in MODULE_INFOS} == set(MODULES)
    assert {op.name for op in OP_INFOS} == {f"nn.functional.{name}" for name in FUNCTIONS}


def module_inputs(info, device, dtype, training):
    for entry in info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=True, training=training
    ):
        if entry.forward_input is not None:
            yield entry.constructor_input, entry.forward_input


def check_module_inputs(info, dtype, path, training, device, memory_format=None):
    """Our layer beside torch's on the inputs that PyTorch lists: all of them, or those of the format's rank in it."""
    inputs = list(module_inputs(info, device, dtype, training))
    if memory_format is not None:
        rank = 5 if memory_format is torch.channels_last_3d else 4
        inputs = [each for each in inputs if each[1].args[0].dim() == rank]
    assert len(inputs) >= (4 if memory_format is None else 2)
    for constructor, forward in inputs:
        stock = info.module_cls(*constructor.args, **constructor.kwargs).to(device, dtype).train(training)
        layer = ours_of(info.module_cls)(*constructor.args, **constructor.kwargs).to(device, dtype)
        layer.train(training)
        randomize(stock)
        assert str(layer.load_state_dict(stock.state_dict())) == "<All keys matched successfully>"
        exact = path == "aten"
        (x,) = forward.args
        if memory_format is not None:
            x = x.detach().contiguous(memory_format=memory_format)
        if not exact:
            stock, x64 = stock.double(), x.double()
            if not list(stock.parameters()) and not list(stock.buffers()):
                # Nothing to be in fp64: the layer then computes in the dtype of what it is called with.
                stock_forward = stock.forward
                stock.forward = lambda x, forward=stock_forward: forward(x.double())
            assert x64.dtype == torch.float64
        assert_layers_agree(layer, stock, x, exact, steps=2 if exact else 1)


@sampled
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("info", "dtype", "path"), MODULE_CASES, indirect=["path"])
def test_module_info_inputs_act_as_in_torch(info, dtype, path, training, device):
    check_module_inputs(info, dtype, path, training, device)


CHANNELS_LAST = {
    "BatchNorm2d": torch.channels_last,
    "BatchNorm3d": torch.channels_last_3d,
    "GroupNorm": torch.channels_last,
    "InstanceNorm2d": torch.channels_last,
    "InstanceNorm3d": torch.channels_last_3d,
}


@sampled
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "info",
    [info for info in MODULE_INFOS if info.module_cls.__name__ in CHANNELS_LAST],
    ids=lambda info: info.module_cls.__name__,
)
def test_module_info_inputs_in_channels_last_act_as_in_torch(info, training, path, device):
    memory_format = CHANNELS_LAST[info.module_cls.__name__]
    check_module_inputs(info, torch.float32, path, training, device, memory_format)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("info", MODULE_INFOS, ids=lambda info: info.module_cls.__name__)
def test_module_info_error_inputs_raise_as_in_torch(info, training, device, path):
    """As torch, and as the suite says where torch itself does: 2.13 accepts eps = 0 in evaluation."""
    if info.module_error_inputs_func is None:
        pytest.skip("torch lists none")
    for error in info.module_error_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=False, training=training
    ):
        constructor, forward = (
            error.module_error_input.constructor_input,
            error.module_error_input.forward_input,
        )
        construction = error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR

        def run(layer_class, constructor=constructor, forward=forward, construction=construction):
            layer = layer_class(*constructor.args, **constructor.kwargs).train(training)
            return None if construction else layer(*forward.args, **forward.kwargs)

        actual, expected = (
            outcome(functools.partial(run, c))[0] for c in (ours_of(info.module_cls), info.module_cls)
        )
        assert actual == expected
        assert expected[:1] == (error.error_type,) or not (training or construction)


# --- OpInfo -----------------------------------------------------------------------------------------------

OP_INFOS = [
    op for op in op_db if op.name.removeprefix("nn.functional.") in FUNCTIONS and not op.variant_test_name
]
OP_CASES = on_both_in(
    {op.name.removeprefix("nn.functional."): op for op in OP_INFOS},
    DTYPES,
    {torch.float32: FUNCTIONS, torch.bfloat16: ("batch_norm", "group_norm")},
)


def bound(name, sample):
    """A sample's arguments by name, in the order of both signatures: torch's first ones."""
    names = {
        "batch_norm": ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        "group_norm": ("num_groups", "weight", "bias", "eps"),
        "instance_norm": (
            *("running_mean", "running_var", "weight", "bias"),
            *("use_input_stats", "momentum", "eps"),
        ),
    }[name]
    return dict(zip(names, sample.args, strict=False)) | sample.kwargs


def prepared(arguments, dtype=None):
    """A copy of a sample's arguments, with parameters as leaves, and the tensors among them."""
    copied = {}
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value = value.detach().to(dtype or value.dtype, copy=True)
            value.requires_grad_(key in ("weight", "bias"))
        copied[key] = value
    return copied


def check_sample(name, sample, exact):
    arguments = bound(name, sample)
    (x,), (expected_x,) = leaves(sample.input), leaves(sample.input if exact else sample.input.double())
    ours, theirs = prepared(arguments), prepared(arguments, None if exact else torch.float64)
    y, expected = getattr(FF, name)(x, **ours), getattr(F, name)(expected_x, **theirs)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    dy = torch.randn_like(y)
    given = [key for key in ("weight", "bias") if ours.get(key) is not None]
    gradients = torch.autograd.grad(y, [x, *(ours[key] for key in given)], dy)
    expected_gradients = torch.autograd.grad(
        expected, [expected_x, *(theirs[key] for key in given)], dy.to(expected.dtype)
    )
    statistics = [key for key in ("running_mean", "running_var") if ours.get(key) is not None]
    if exact:
        assert y.stride() == expected.stride()
        assert_same(y, expected)
        assert_same(gradients, expected_gradients)
        for key in statistics:
            assert_same(ours[key], theirs[key])
        return
    assert_computed_alike(y, expected)
    eps = arguments.get("eps", 1e-5)
    groups = 0 if name == "batch_norm" else arguments.get("num_groups") or x.shape[1]
    var = None
    if name == "batch_norm" and not arguments.get("training", False):
        var = arguments["running_var"]
    scale = gradient_scale(x, groups, eps, ours.get("weight"), dy, var) if x.dim() > 1 else 0
    assert_computed_alike(gradients[0], expected_gradients[0], scale)
    for gradient, expected_gradient in zip(gradients[1:], expected_gradients[1:], strict=True):
        # Each term is dy (x - mean) / sqrt(var + eps), of which the last factor is at most the root of the number.
        terms = x.numel() // max(1, gradient.numel())
        assert_computed_alike(gradient, expected_gradient, terms * dy.abs().max().item() if terms else 0)
    for key in statistics:
        assert_computed_alike(ours[key], theirs[key])


@sampled
@pytest.mark.parametrize(("op", "dtype", "path"), OP_CASES, indirect=["path"])
def test_op_info_samples_act_as_in_torch(op, dtype, path, device):
    samples = list(op.sample_inputs(device, dtype))
    if op.reference_inputs_func is not None and path == "aten":
        samples += op.reference_inputs(device, dtype)  # large: on the kernels, in the slow test below
    assert len(samples) >= 9
    for sample in samples:
        check_sample(op.name.removeprefix("nn.functional."), sample, path == "aten")


@slow
@pytest.mark.parametrize("op", OP_INFOS, ids=lambda op: op.name.removeprefix("nn.functional."))
def test_op_info_reference_inputs_on_the_kernels(op, device):
    if op.reference_inputs_func is None:
        pytest.skip("torch lists none")
    for sample in op.reference_inputs(device, torch.float32):
        check_sample(op.name.removeprefix("nn.functional."), sample, exact=False)


def test_op_info_error_inputs_raise_as_in_torch(device, path):
    listed = [(op, error) for op in OP_INFOS if op.error_inputs_func for error in op.error_inputs(device)]
    assert len(listed) >= 2 * bool(op_db)
    for op, error in listed:
        sample, name = error.sample_input, op.name.removeprefix("nn.functional.")
        with pytest.raises(error.error_type, match=error.error_regex):
            getattr(FF, name)(sample.input, *sample.args, **sample.kwargs)

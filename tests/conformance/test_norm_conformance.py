"""Batch, group and instance normalization under PyTorch's own suites, and beside torch's layers in everything else.

Both backends (fixture ``path``). ATen has to give torch's bits, for a plain normalization is torch's own function
there. The kernels are compared with torch in fp64: their statistics are fp32 for 16-bit inputs, torch's are not.
"""

import copy
import functools
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from machine_option import bf16
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastreg.functional as FF
import fastreg.nn as fnn
from fastreg.ops.backend import Launch
from fastreg.ops.fused import ACTIVATIONS, activated

try:  # private, and not promised to stay where it is
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
except ImportError:
    op_db, module_db = [], []

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FUNCTIONS = ("batch_norm", "group_norm", "instance_norm")
BATCH_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
INSTANCE_NORMS = ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
MODULES = (*BATCH_NORMS, "GroupNorm", *INSTANCE_NORMS)
RANK = {name: int(name[-2]) + 2 for name in (*BATCH_NORMS, *INSTANCE_NORMS)} | {"GroupNorm": 4}
CHANNELS = 6
SHAPES = {3: (4, CHANNELS, 5), 4: (3, CHANNELS, 5, 3), 5: (2, CHANNELS, 3, 2, 3)}

slow = pytest.mark.slow
sampled = pytest.mark.sampled


def on_both(names, *values, only=lambda *case: True, fast=lambda *case: True):
    """All combinations of the values (or ``only`` some), on both backends.

    fast: which combinations the default run takes on the kernels; ``-m slow`` takes the others. The interpreter needs
    about 0.2 s a launch, and no combination asks the kernels for anything that those do not.
    """
    cases = [
        pytest.param(*case, path, marks=[slow] if path == "kernels" and not fast(*case) else [])
        for case in itertools.product(*values)
        if only(*case)
        for path in ("kernels", "aten")
    ]
    return pytest.mark.parametrize((*names.split(), "path"), cases, indirect=["path"])


all_functions = pytest.mark.parametrize("name", FUNCTIONS)
all_modules = pytest.mark.parametrize("name", MODULES)
some_modules = on_both(
    "name", MODULES, fast=("BatchNorm1d", "BatchNorm2d", "GroupNorm", "InstanceNorm2d").__contains__
)


def outcome(call):
    """What a call does, comparably, and its result: its exception's type and message, or its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except Exception as error:
            return (type(error), str(error)), None
    # The interpreter is numpy, which warns of roots of negative numbers; a GPU, like ATen, gives NaN.
    return [(w.category, str(w.message)) for w in caught if w.category is not RuntimeWarning], result


def assert_near(actual, expected, scale=0.0, rounding=0.0):
    """Equal up to what computing in fp32 (fp64 for fp64) and one rounding to the dtype of ``actual`` may do.

    scale: the size of the terms of a sum, where it is larger than the sum. 64 ulps of the largest term: sums of at
    most some thousand terms, whose roundings grow as the root of their number, and a chain of about ten roundings
    behind them. 16-bit results are rounded once more, by less than one unit (the interpreter truncates bf16).
    rounding: of terms that were rounded to 16 bits before the sum.
    """
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    accumulated = torch.float64 if actual.dtype == torch.float64 else torch.float32
    largest = expected.abs().nan_to_num(posinf=0).max().item()
    atol = 64 * torch.finfo(accumulated).eps * max(scale, largest) + rounding
    eps = torch.finfo(actual.dtype).eps
    rtol = 0.0 if actual.dtype == accumulated else 1.01 * eps
    atol += 0.0 if actual.dtype == accumulated else torch.finfo(actual.dtype).tiny * eps
    assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


def assert_same(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def gradient_scale(x, groups, eps, weight, dy, var=None):
    """The size of what the gradient of x is a difference of: dy weight / sqrt(var + eps)."""
    if x.numel() == 0:
        return 0.0
    if var is None:
        x = x.detach().double()
        units = x.transpose(0, 1).flatten(1) if groups == 0 else x.reshape(x.shape[0] * groups, -1)
        var = units.var(1, correction=0)
    rstd = (var.double().min() + eps).rsqrt().nan_to_num(0).item()
    return rstd * dy.abs().max().item() * (1 if weight is None else weight.abs().max().item())


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


# --- the library's functions, plain and fused -------------------------------------------------------------


def _statistics(x):
    """Running statistics that every dtype has exactly."""
    steps = torch.arange(x.shape[1], dtype=x.dtype, device=x.device) / 8
    return steps - 0.375, steps + 0.25


def _kind(name, *arguments, evaluation=False, **keywords):
    """A function (namespace, x, weight, bias, **fused) of one way to normalize."""

    def call(f, x, weight=None, bias=None, **fused):
        if name == "group_norm":
            return f.group_norm(x, *arguments, weight, bias, **keywords, **fused)
        mean, var = _statistics(x) if evaluation else (None, None)
        return getattr(f, name)(x, mean, var, weight, bias, not evaluation, **keywords, **fused)

    return call


KINDS = {
    "batch_norm": _kind("batch_norm"),
    "batch_norm_evaluation": _kind("batch_norm", evaluation=True),
    "group_norm": _kind("group_norm", 3),
    "instance_norm": _kind("instance_norm"),
    "instance_norm_evaluation": _kind("instance_norm", evaluation=True),
}
all_kinds = pytest.mark.parametrize("kind", KINDS)
GROUPS = {"group_norm": 3, "instance_norm": CHANNELS}  # 0 for batch normalization


def reference(kind, x, weight=None, bias=None, activation=None, residual=None):
    """activation(norm(x) + residual) by torch alone."""
    return activated(KINDS[kind](F, x, weight, bias), activation, residual)


def tensors(shape, device, dtype=torch.float64):
    """x, weight, bias, residual. The weights are away from 0, some of them negative."""
    x, residual = torch.randn(2, *shape, dtype=dtype, device=device)
    weight = torch.rand(shape[1], dtype=dtype, device=device) + 0.5
    weight[::3] *= -1
    return x, weight, torch.randn(shape[1], dtype=dtype, device=device), residual


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


def groups_of(layer):
    if isinstance(layer, torch.nn.GroupNorm):
        return layer.num_groups
    return layer.num_features if isinstance(layer, torch.nn.modules.instancenorm._InstanceNorm) else 0


def randomize(layer):
    """Parameters and statistics at their starting values hide errors."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5)
        for name, buffer in layer.named_buffers():
            if name.startswith("running"):
                buffer.uniform_(0.2, 1.2)


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


def assert_layers_agree(layer, expected_layer, x, exact, steps=2):
    """Both do the same with ``x``: results, all gradients, and state after each step."""
    dy = torch.randn_like(x)
    for _ in range(steps):
        before = copy.deepcopy(expected_layer)
        (leaf,), (expected_leaf,) = leaves(x), leaves(x.to(dtype_of(expected_layer, x)))
        y, expected = layer(leaf), expected_layer(expected_leaf)
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
        parameters, expected_parameters = list(layer.parameters()), list(expected_layer.parameters())
        gradients = torch.autograd.grad(y, [leaf, *parameters], dy)
        expected_gradients = torch.autograd.grad(
            expected, [expected_leaf, *expected_parameters], dy.to(expected.dtype)
        )
        if exact:
            assert y.stride() == expected.stride()
            assert_same(y, expected)
            assert_same(gradients, expected_gradients)
        else:
            assert y.stride() == leaf.stride()
            assert_near(y, expected)
            batched = x if x.dim() == RANK.get(type(layer).__name__, x.dim()) else x.unsqueeze(0)
            tracked = getattr(before, "running_var", None)
            var = None if before.training or tracked is None else tracked
            scale = gradient_scale(
                batched, groups_of(layer), layer.eps, getattr(layer, "weight", None), dy, var
            )
            assert_near(gradients[0], expected_gradients[0], scale)
            for gradient, expected_gradient in zip(gradients[1:], expected_gradients[1:], strict=True):
                terms = x.numel() // gradient.numel() if x.numel() else 0
                assert_near(gradient, expected_gradient, terms * dy.abs().max().item() if terms else 0)
        for (key, value), (expected_key, expected_value) in zip(
            layer.state_dict().items(), expected_layer.state_dict().items(), strict=True
        ):
            assert key == expected_key
            if exact or not value.is_floating_point():
                assert_same(value, expected_value.to(value.dtype))
            else:
                assert_near(value, expected_value)


def assert_states_agree(layer, expected_layer, path):
    state, expected = layer.state_dict(), expected_layer.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        (assert_near if path == "kernels" and value.is_floating_point() else assert_same)(state[key], value)


def dtype_of(layer, x):
    """The dtype that torch's layer is to be called in: x's, or that of its own (fp64) parameters and buffers."""
    state = [t.dtype for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()]
    return state[0] if state else x.dtype


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
    assert_near(y, expected)
    eps = arguments.get("eps", 1e-5)
    groups = 0 if name == "batch_norm" else arguments.get("num_groups") or x.shape[1]
    var = None
    if name == "batch_norm" and not arguments.get("training", False):
        var = arguments["running_var"]
    scale = gradient_scale(x, groups, eps, ours.get("weight"), dy, var) if x.dim() > 1 else 0
    assert_near(gradients[0], expected_gradients[0], scale)
    for gradient, expected_gradient in zip(gradients[1:], expected_gradients[1:], strict=True):
        # Each term is dy (x - mean) / sqrt(var + eps), of which the last factor is at most the root of the number.
        terms = x.numel() // max(1, gradient.numel())
        assert_near(gradient, expected_gradient, terms * dy.abs().max().item() if terms else 0)
    for key in statistics:
        assert_near(ours[key], theirs[key])


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


# --- errors and odd calls ---------------------------------------------------------------------------------
# Each case makes its own tensors: (function, device) -> (call, tensors that a call may change).


def _batch_norm_case(shape=(4, 3, 5), *, dtype=torch.float32, x=None, channels=3, **changed):
    def case(f, device):
        torch.manual_seed(1)
        input = torch.randn(shape).to(dtype) if x is None else x()
        arguments = {
            "running_mean": torch.linspace(-0.5, 0.5, channels),
            "running_var": torch.linspace(0.5, 1.5, channels),
            "weight": torch.linspace(0.5, 1.5, channels),
            "bias": torch.linspace(-1, 1, channels),
            "training": True,
        }
        arguments |= {key: value() if callable(value) else value for key, value in changed.items()}
        return _on(device, f.batch_norm, input, arguments)

    return case


def _group_norm_case(shape=(2, 6, 3, 3), groups=3, *, dtype=torch.float32, channels=6, **changed):
    def case(f, device):
        torch.manual_seed(1)
        arguments = {
            "num_groups": groups,
            "weight": torch.linspace(0.5, 1.5, channels),
            "bias": torch.linspace(-1, 1, channels),
        }
        arguments |= {key: value() if callable(value) else value for key, value in changed.items()}
        return _on(device, f.group_norm, torch.randn(shape).to(dtype), arguments)

    return case


def _instance_norm_case(shape=(4, 3, 5), *, dtype=torch.float32, channels=3, **changed):
    def case(f, device):
        torch.manual_seed(1)
        arguments = {
            "running_mean": torch.linspace(-0.5, 0.5, channels),
            "running_var": torch.linspace(0.5, 1.5, channels),
            "weight": torch.linspace(0.5, 1.5, channels),
            "bias": torch.linspace(-1, 1, channels),
        }
        arguments |= {key: value() if callable(value) else value for key, value in changed.items()}
        return _on(device, f.instance_norm, torch.randn(shape).to(dtype), arguments)

    return case


def _on(device, function, input, arguments):
    """The call on ``device`` (what is on the meta device stays there), and the running statistics."""

    def move(t):
        return t.to(device) if isinstance(t, torch.Tensor) and t.device.type == "cpu" else t

    arguments = {key: move(value) for key, value in arguments.items()}
    statistics = [arguments.get("running_mean"), arguments.get("running_var")]
    return (lambda: function(move(input), **arguments)), statistics


def ones(*shape, **options):
    return lambda: torch.ones(*shape, **options)


BATCH_NORM_CASES = {
    "one_value": _batch_norm_case((1, 3)),
    "one_value_of_an_image": _batch_norm_case((1, 3, 1, 1)),
    "one_value_in_evaluation": _batch_norm_case((1, 3), training=False),
    "one_value_without_statistics": _batch_norm_case((1, 3), running_mean=None, running_var=None),
    "scalar": _batch_norm_case(()),
    "scalar_in_evaluation": _batch_norm_case((), training=False),
    "rank_1": _batch_norm_case((3,)),
    "rank_1_in_evaluation": _batch_norm_case((3,), training=False),
    "empty": _batch_norm_case((0, 3, 5)),
    "empty_in_evaluation": _batch_norm_case((0, 3, 5), training=False),
    "empty_positions": _batch_norm_case((4, 3, 0)),
    "no_channels": _batch_norm_case((4, 0, 5), channels=0),
    "wrong_channels": _batch_norm_case((4, 2, 5)),
    "wrong_channels_in_evaluation": _batch_norm_case((4, 2, 5), training=False),
    "wrong_mean": _batch_norm_case(running_mean=ones(4)),
    "wrong_var": _batch_norm_case(running_var=ones(4)),
    "wrong_weight": _batch_norm_case(weight=ones(4)),
    "wrong_bias": _batch_norm_case(bias=ones(2)),
    "wrong_weight_without_statistics": _batch_norm_case(running_mean=None, running_var=None, weight=ones(4)),
    "weight_of_two_dimensions": _batch_norm_case(weight=ones(3, 1)),
    "weight_of_one_number": _batch_norm_case(weight=ones(1)),
    "evaluation_without_statistics": _batch_norm_case(training=False, running_mean=None, running_var=None),
    "evaluation_without_var": _batch_norm_case(training=False, running_var=None),
    "evaluation_without_mean": _batch_norm_case(training=False, running_mean=None),
    "training_without_var": _batch_norm_case(running_var=None),
    "training_without_mean": _batch_norm_case(running_mean=None),
    "no_parameters": _batch_norm_case(weight=None, bias=None),
    "no_weight": _batch_norm_case(weight=None),
    "no_bias": _batch_norm_case(bias=None),
    "integers": _batch_norm_case(dtype=torch.long),
    "integers_in_evaluation": _batch_norm_case(dtype=torch.long, training=False),
    "booleans": _batch_norm_case(dtype=torch.bool),
    "complex": _batch_norm_case(dtype=torch.complex64),
    "float8": _batch_norm_case(dtype=torch.float8_e4m3fn),
    "eps_0": _batch_norm_case(eps=0.0),
    "eps_0_in_evaluation": _batch_norm_case(eps=0.0, training=False),
    "eps_negative": _batch_norm_case(eps=-1.0),
    "eps_negative_in_evaluation": _batch_norm_case(eps=-1.0, training=False),
    "eps_negative_and_one_value": _batch_norm_case((1, 3), eps=-1.0),
    "eps_whole": _batch_norm_case(eps=1),
    "momentum_0": _batch_norm_case(momentum=0.0),
    "momentum_1": _batch_norm_case(momentum=1),
    "momentum_negative": _batch_norm_case(momentum=-0.5),
    "momentum_nan": _batch_norm_case(momentum=float("nan")),
    "meta_weight": _batch_norm_case(weight=ones(3, device="meta")),
    "meta_statistics": _batch_norm_case(running_mean=ones(3, device="meta")),
    "half_with_fp32_parameters": _batch_norm_case(dtype=torch.bfloat16),
    "unknown_argument": _batch_norm_case(epsilon=1e-5),
}

GROUP_NORM_CASES = {
    "scalar": _group_norm_case(()),
    "rank_1": _group_norm_case((6,)),
    "rank_2": _group_norm_case((2, 6)),
    "indivisible": _group_norm_case(groups=4),
    "no_groups": _group_norm_case(groups=0),
    "negative_groups": _group_norm_case(groups=-1),
    "more_groups_than_channels": _group_norm_case(groups=12),
    "one_value": _group_norm_case((1, 6), groups=6),
    "one_value_of_an_image": _group_norm_case((1, 6, 1, 1), groups=6),
    "wrong_weight": _group_norm_case(weight=ones(5)),
    "wrong_bias": _group_norm_case(bias=ones(5)),
    "weight_of_two_dimensions": _group_norm_case(weight=ones(6, 1)),
    "weight_of_one_number": _group_norm_case(weight=ones(1)),
    "no_parameters": _group_norm_case(weight=None, bias=None),
    "no_weight": _group_norm_case(weight=None),
    "no_bias": _group_norm_case(bias=None),
    "empty": _group_norm_case((0, 6, 3, 3)),
    "empty_positions": _group_norm_case((2, 6, 0)),
    "no_channels": _group_norm_case((2, 0, 3), channels=0),
    "integers": _group_norm_case(dtype=torch.long),
    "booleans": _group_norm_case(dtype=torch.bool),
    "complex": _group_norm_case(dtype=torch.complex64),
    "eps_0": _group_norm_case(eps=0.0),
    "eps_negative": _group_norm_case(eps=-0.5),
    "eps_below_the_variance": _group_norm_case(eps=-10.0),
    "meta_weight": _group_norm_case(weight=ones(6, device="meta")),
    "half_with_fp32_parameters": _group_norm_case(dtype=torch.float16),
    "unknown_argument": _group_norm_case(epsilon=1e-5),
}

INSTANCE_NORM_CASES = {
    "one_position": _instance_norm_case((4, 3, 1)),
    "one_position_of_an_image": _instance_norm_case((2, 3, 1, 1)),
    "one_position_in_evaluation": _instance_norm_case((4, 3, 1), use_input_stats=False),
    "scalar": _instance_norm_case(()),
    "rank_1": _instance_norm_case((3,)),
    "rank_2": _instance_norm_case((4, 3)),
    "rank_2_in_evaluation": _instance_norm_case((4, 3), use_input_stats=False),
    "evaluation": _instance_norm_case(use_input_stats=False),
    "evaluation_without_statistics": _instance_norm_case(
        use_input_stats=False, running_mean=None, running_var=None
    ),
    "evaluation_without_var": _instance_norm_case(use_input_stats=False, running_var=None),
    "training_without_var": _instance_norm_case(running_var=None),
    "training_without_mean": _instance_norm_case(running_mean=None),
    "training_without_statistics": _instance_norm_case(running_mean=None, running_var=None),
    "wrong_channels": _instance_norm_case((4, 2, 5)),
    "wrong_mean": _instance_norm_case(running_mean=ones(4)),
    "wrong_var": _instance_norm_case(running_var=ones(4)),
    "wrong_weight": _instance_norm_case(weight=ones(4)),
    "wrong_weight_alone": _instance_norm_case(weight=ones(4), running_mean=None, running_var=None),
    "wrong_bias": _instance_norm_case(bias=ones(2)),
    "weight_of_two_dimensions": _instance_norm_case(weight=ones(3, 1)),
    "weight_of_one_number": _instance_norm_case(weight=ones(1)),
    "no_parameters": _instance_norm_case(weight=None, bias=None),
    "no_weight": _instance_norm_case(weight=None),
    "no_bias": _instance_norm_case(bias=None),
    "empty": _instance_norm_case((0, 3, 5)),
    "empty_positions": _instance_norm_case((4, 3, 0)),
    "no_channels": _instance_norm_case((4, 0, 5), channels=0),
    "integers": _instance_norm_case(dtype=torch.long),
    "complex": _instance_norm_case(dtype=torch.complex64),
    "eps_0": _instance_norm_case(eps=0.0),
    "eps_negative": _instance_norm_case(eps=-0.1),
    "momentum_0": _instance_norm_case(momentum=0.0),
    "momentum_1": _instance_norm_case(momentum=1),
    "momentum_negative": _instance_norm_case(momentum=-1.2),
    "meta_weight": _instance_norm_case(weight=ones(3, device="meta")),
    "half_with_fp32_parameters": _instance_norm_case(dtype=torch.bfloat16),
    "unknown_argument": _instance_norm_case(training=True),
}

CALLS = {
    f"{name}-{case}": maker
    for name, cases in zip(FUNCTIONS, (BATCH_NORM_CASES, GROUP_NORM_CASES, INSTANCE_NORM_CASES), strict=True)
    for case, maker in cases.items()
}


def assert_calls_agree(maker, device, exact):
    call, statistics = maker(FF, device)
    expected_call, expected_statistics = maker(F, device)
    (actual, y), (expected, expected_y) = outcome(call), outcome(expected_call)
    assert actual == expected
    close = assert_same if exact else assert_near
    if isinstance(expected_y, torch.Tensor):
        assert y.dtype == expected_y.dtype
        if y.dtype in (torch.bfloat16, torch.float16) and not exact:
            # Torch rounds to 16 bits more than once (its scale and shift too): two units more.
            eps = torch.finfo(y.dtype).eps
            assert_close(y, expected_y, rtol=2 * eps, atol=2 * eps, equal_nan=True)
        else:
            close(y, expected_y)
    for t, expected_t in zip(statistics, expected_statistics, strict=True):
        if isinstance(t, torch.Tensor) and not t.is_meta:
            close(t, expected_t)


@pytest.mark.parametrize("case", CALLS)
def test_odd_calls_end_as_in_torch(case, device, path):
    """The same exception or warnings, else the same result; and the same running statistics afterwards."""
    assert_calls_agree(CALLS[case], device, path == "aten")


WRONG_TYPES = {
    "a_list": _batch_norm_case(x=lambda: [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]),
    "a_list_in_evaluation": _batch_norm_case(x=lambda: [[1.0, 2.0, 3.0]], training=False),
    "weight_is_a_number": _batch_norm_case(weight=1.0),
    "eps_is_text": _batch_norm_case(eps="small"),
    "momentum_is_none": _batch_norm_case(momentum=None),
    "momentum_is_text": _batch_norm_case(momentum="slow"),
    "momentum_is_a_number_in_text": _batch_norm_case(momentum="0.1"),
    "group_norm_groups_are_text": _group_norm_case(groups="3"),
    "group_norm_groups_are_a_fraction": _group_norm_case(groups=3.0),
    "group_norm_eps_is_none": _group_norm_case(eps=None),
    "instance_norm_momentum_is_none": _instance_norm_case(momentum=None),
    "instance_norm_weight_is_a_number": _instance_norm_case(weight=1.0),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_arguments_of_a_wrong_type_are_refused(case, device, path):
    """Without the text, which tells what the first line to stumble tried to do."""
    (actual, _), (expected, _) = (outcome(WRONG_TYPES[case](f, device)[0]) for f in (FF, F))
    assert expected[0] in (TypeError, AttributeError)
    assert actual
    assert actual[0] in (TypeError, AttributeError)


MIXED = {
    "fp64_parameters": ("float32", "float64"),
    "fp16_parameters": ("float32", "float16"),
    "fp64_input": ("float64", "float32"),
    "fp16_input_bf16_parameters": ("float16", "bfloat16"),
    "bf16_input_fp64_parameters": ("bfloat16", "float64"),
}


@pytest.mark.parametrize("mixed", MIXED)
@all_functions
def test_mixed_dtypes_that_torch_refuses(name, mixed, device, path):
    """Torch's refusal on ATen; the kernels may know an answer, which then has to be the right one."""
    x_dtype, dtype = (getattr(torch, d) for d in MIXED[mixed])
    x = torch.randn(4, 6, 5, device=device).to(x_dtype)
    weight = torch.linspace(0.5, 1.5, 6, device=device).to(dtype)
    arguments = {"num_groups": 3} if name == "group_norm" else {}
    if name == "batch_norm":
        arguments = {"running_mean": None, "running_var": None, "training": True}
    (error, y), (expected, _) = (
        outcome(lambda f=f: getattr(f, name)(x, weight=weight, bias=weight, **arguments)) for f in (FF, F)
    )
    assert expected[0] is RuntimeError
    if y is None:
        assert error == expected
        return
    assert path == "kernels"
    exact = getattr(F, name)(x.double(), weight=weight.double(), bias=weight.double(), **arguments)
    assert y.dtype == x_dtype
    assert_near(y, exact)


FUSED_ERRORS = {
    "unknown_activation": (ValueError, "unknown activation 'softmax'", lambda x: {"activation": "softmax"}),
    "residual_of_another_shape": (ValueError, "the residual has to have", lambda x: {"residual": x[:, :1]}),
    "residual_that_would_broadcast": (ValueError, "the residual has to have", lambda x: {"residual": x[0]}),
    "residual_elsewhere": (RuntimeError, "on the same device", lambda x: {"residual": x.to("meta")}),
}


@pytest.mark.parametrize("case", FUSED_ERRORS)
@all_functions
def test_a_wrong_activation_or_residual_is_refused_before_anything_changes(name, case, device, path):
    error, message, fused = FUSED_ERRORS[case]
    x = torch.randn(4, 6, 5, device=device)
    mean, var = torch.zeros(6, device=device), torch.ones(6, device=device)
    arguments = (3,) if name == "group_norm" else (mean, var, None, None, True)
    with pytest.raises(error, match=message):
        getattr(FF, name)(x, *arguments, **fused(x))
    assert_same((mean, var), (torch.zeros_like(mean), torch.ones_like(var)))


@all_modules
def test_a_layer_refuses_an_unknown_activation(name):
    with pytest.raises(ValueError, match="unknown activation 'softmax': choose one of relu, "):
        _layer(fnn, name, activation="softmax")


# --- errors of modules ------------------------------------------------------------------------------------


def _layer(nn, name, *arguments, **keywords):
    first = (3, CHANNELS) if name == "GroupNorm" else (CHANNELS,)
    return getattr(nn, name)(*first, *arguments, **keywords)


INPUTS_OF_ANY_RANK = [(), (6,), (4, 6), (6, 5), (4, 6, 5), (2, 6, 3, 2), (2, 6, 3, 1, 2), (2, 6, 1, 1, 2, 1)]
WRONG_INPUTS = [
    *((1, 6), (1, 6, 1), (1, 6, 1, 1), (1, 6, 1, 1, 1)),  # one value
    *((2, 6, 1), (2, 6, 1, 1), (2, 6, 1, 1, 1), (6, 1), (6, 1, 1), (6, 1, 1, 1)),  # one position
    *((4, 5), (4, 5, 3), (2, 5, 3, 2), (2, 5, 3, 1, 2), (5, 3)),  # five channels instead of six
    *((0, 6), (0, 6, 5), (0, 6, 3, 2), (0, 6, 2, 2, 2)),  # nothing
]
OPTIONS = {
    "default": {},
    "affine": {"affine": True, "track_running_stats": True},
    "plain": {"affine": False, "track_running_stats": False},
    "average": {"momentum": None, "track_running_stats": True},
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@on_both(
    "name options",
    MODULES,
    OPTIONS,
    fast=lambda name, options: (
        (name, options)
        in [
            ("BatchNorm1d", "average"),
            ("BatchNorm2d", "affine"),
            ("GroupNorm", "default"),
            ("InstanceNorm2d", "default"),
        ]
    ),
)
def test_layers_take_and_refuse_inputs_as_torch_does(name, options, training, device, path):
    """Also what a refused call leaves behind: torch counts a batch before it looks at its size."""
    options = OPTIONS[options]
    if name == "GroupNorm":
        options = {key: value for key, value in options.items() if key == "affine"}
    layer, stock = (_layer(nn, name, **options).to(device).train(training) for nn in (fnn, torch.nn))
    for shape in INPUTS_OF_ANY_RANK + WRONG_INPUTS:
        x = torch.randn(shape, device=device)
        (actual, y), (expected, expected_y) = outcome(lambda: layer(x)), outcome(lambda: stock(x))  # noqa: B023
        assert actual == expected, shape
        close = assert_same if path == "aten" else assert_near
        if expected_y is not None:
            close(y, expected_y)
        assert_states_agree(layer, stock, path)


@pytest.mark.parametrize(
    "arguments",
    [(), (6, 1e-5, 0.1, True, True, None, None, True), (2.5,), (-1,), ("6",), (4, 6), (0, 6), (3, 6, "eps")],
    ids=str,
)
@all_modules
def test_constructors_refuse_what_torch_refuses(name, arguments):
    (actual, layer), (expected, stock) = (
        outcome(lambda nn=nn: getattr(nn, name)(*arguments)) for nn in (fnn, torch.nn)
    )
    if isinstance(expected, tuple) and expected[0] is TypeError:
        # Python's own text names the classes of the call.
        assert actual[0] is TypeError
    else:
        assert actual == expected
    assert (layer is None) == (stock is None)


# --- layouts ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "samples_inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels_first_of_all": lambda x: x.movedim(1, 0).contiguous().movedim(0, 1),
    "gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "channel_gaps": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "first_dimension_sliced": lambda x: x.repeat_interleave(2, 0)[::2],
    "offset": lambda x: torch.cat((x[:1], x))[1:],
    "expanded_samples": lambda x: x[:1].expand(x.shape),
    "expanded_positions": lambda x: x[..., :1].expand(x.shape),
}
FORMATS = {"contiguous": None, "channels_last": {4: torch.channels_last, 5: torch.channels_last_3d}}


def check_gradients(kind, given, dy, path, **fused):
    """Result and gradients of ``given`` (x, weight, bias, residual) as they lie, against torch in fp64."""
    exact = leaves(*(None if t is None else t.double() for t in given))
    for t in given:
        if t is not None:
            t.requires_grad_()
    x, weight, bias, residual = given
    y = KINDS[kind](FF, x, weight, bias, residual=residual, **fused)
    expected = reference(kind, *exact[:3], fused.get("activation"), exact[3])
    wanted = [t for t in given if t is not None]
    gradients = torch.autograd.grad(y, wanted, dy)
    expected_gradients = torch.autograd.grad(expected, [t for t in exact if t is not None], dy.double())
    assert_near(y, expected)
    base = kind.removesuffix("_evaluation")
    var = _statistics(x)[1] if kind.endswith("evaluation") else None
    scale = gradient_scale(exact[0], GROUPS.get(base, 0), 1e-5, weight, dy, var)
    # Behind an activation its gradient is in the dtype of dy, as in eager PyTorch. (A derivative is 1.2 at most.)
    rounding = 0.0 if fused.get("activation") is None else 1.2 * torch.finfo(dy.dtype).eps * scale
    for t, gradient, expected_gradient in zip(wanted, gradients, expected_gradients, strict=True):
        assert gradient.dtype == t.dtype
        assert gradient.shape == t.shape
        parameter = t is weight or t is bias
        assert_near(
            gradient,
            expected_gradient,
            x.numel() // t.numel() * dy.abs().max().item() if parameter else scale,
            rounding if t is x else 0.0,
        )
    return y, gradients


@on_both(
    "kind layout rank",
    KINDS,
    LAYOUTS,
    (3, 4, 5),
    fast=lambda kind, layout, rank: (
        (kind in ("batch_norm", "group_norm") and rank == 4)
        or (layout == "channels_last" and (rank == 4 or kind == "batch_norm"))
    ),
)
def test_any_layout_has_the_values_and_gradients_of_torch(kind, layout, rank, device, path):
    if rank != 4 and layout not in ("contiguous", "channels_last", "transposed"):
        pytest.skip("rank 4 has it")
    x, weight, bias, _ = tensors(SHAPES[rank], device, torch.float32)
    x = LAYOUTS[layout](x)
    dy = torch.randn(SHAPES[rank], device=device)
    y, gradients = check_gradients(kind, (x, weight, bias, None), dy, path)
    if path == "aten":
        expected = KINDS[kind](F, x, weight, bias)
        assert y.stride() == expected.stride()
        assert gradients[0].stride() == torch.autograd.grad(expected, x, dy)[0].stride()
        return
    if layout in FORMATS and rank > 3 and not (kind.startswith("instance_norm") and layout != "contiguous"):
        # Torch's instance normalization on its own leaves channels last; ours need not.
        wanted = (FORMATS[layout] or {}).get(rank, torch.contiguous_format)
        assert y.is_contiguous(memory_format=wanted)
        assert gradients[0].is_contiguous(memory_format=wanted)


@on_both(
    "kind layout upstream",
    KINDS,
    ("contiguous", "channels_last"),
    ("contiguous", "channels_last", "transposed", "gaps", "expanded_samples", "one_number"),
    fast=lambda kind, layout, upstream: (
        kind in ("batch_norm", "group_norm", "batch_norm_evaluation")
        and (layout, upstream)
        in [("contiguous", "channels_last"), ("channels_last", "gaps"), ("contiguous", "one_number")]
    ),
)
def test_upstream_gradients_and_residuals_of_another_layout(kind, layout, upstream, device, path):
    x, weight, bias, residual = tensors(SHAPES[4], device, torch.float32)
    other = LAYOUTS.get(upstream, lambda x: x[:1, :1, :1, :1].expand(x.shape))
    dy = other(torch.randn(SHAPES[4], device=device))
    given = (LAYOUTS[layout](x), weight, bias, other(residual).detach())
    check_gradients(kind, given, dy, path, activation="silu")


@all_kinds
def test_parameters_and_statistics_that_are_views(kind, device, path):
    """Every second element of a larger tensor: running statistics have to be updated where they lie."""
    x, weight, bias, _ = tensors(SHAPES[4], device, torch.float32)
    strided = [t.repeat_interleave(2)[::2].detach() for t in (weight, bias)]
    check_gradients(kind, (x, *strided, None), torch.randn_like(x), path)
    if kind.endswith("evaluation") or kind == "group_norm":
        return
    stores = [torch.linspace(1, 3, 2 * CHANNELS, device=device) for _ in range(4)]
    mean, var, expected_mean, expected_var = (store[::2] for store in stores)
    getattr(FF, kind)(x, mean, var, *strided, True)
    getattr(F, kind)(x, expected_mean, expected_var, *strided, True)
    for store, expected in zip(stores[:2], stores[2:], strict=True):
        assert_near(store, expected)
        assert_same(store[1::2], torch.linspace(1, 3, 2 * CHANNELS, device=device)[1::2])


# --- modules ----------------------------------------------------------------------------------------------

CONSTRUCTIONS = [
    {},
    {"eps": 1e-3},
    {"affine": False},
    {"affine": True, "track_running_stats": True, "momentum": 0.3},
    {"momentum": None, "track_running_stats": True},
    {"track_running_stats": False},
    {"dtype": torch.float64},
    {"affine": True, "dtype": torch.bfloat16},
    {"device": "meta"},
    {"affine": True, "bias": False},
]


def constructions(name):
    for options in CONSTRUCTIONS:
        if name == "GroupNorm" and options.keys() & {"momentum", "track_running_stats"}:
            continue
        yield options


@all_modules
def test_layers_are_torchs_in_type_text_state_and_attributes(name):
    for options in constructions(name):
        (error, layer), (expected, stock) = (
            outcome(functools.partial(_layer, nn, name, **options)) for nn in (fnn, torch.nn)
        )
        if stock is None:  # torch 2.11 has no ``bias``
            assert (error[0], expected[0]) == (TypeError, TypeError)
            continue
        assert isinstance(layer, type(stock))
        assert type(layer) is not type(stock)
        assert (layer.extra_repr(), repr(layer)) == (stock.extra_repr(), repr(stock))
        assert list(layer.state_dict()) == list(stock.state_dict())
        for key, value in stock.state_dict().items():
            mine = layer.state_dict()[key]
            assert (mine.shape, mine.dtype, mine.device) == (value.shape, value.dtype, value.device)
            if not value.is_meta:
                assert_same(mine, value)
        assert {k for k, _ in layer.named_parameters()} == {k for k, _ in stock.named_parameters()}
        assert {k for k, _ in layer.named_buffers()} == {k for k, _ in stock.named_buffers()}
        attributes = {key for key in vars(stock) if not key.startswith("_")}
        assert {key for key in vars(layer) if not key.startswith("_")} == attributes | {"activation"}
        assert all(getattr(layer, key) == getattr(stock, key) for key in attributes)
        assert layer.training
        assert not layer.eval().training
        assert layer._version == stock._version
        assert type(layer).__constants__ == type(stock).__constants__


@all_modules
def test_an_activation_is_added_to_the_text_and_to_nothing_else(name):
    layer, plain = _layer(fnn, name, activation="silu"), _layer(fnn, name)
    assert layer.extra_repr() == f"{plain.extra_repr()}, activation=silu"
    assert list(layer.state_dict()) == list(plain.state_dict())


@some_modules
def test_state_goes_both_ways(name, device, path):
    options = {} if name == "GroupNorm" else {"affine": True, "track_running_stats": True}
    x = torch.randn(SHAPES[RANK[name]], device=device)
    for nn, other in ((fnn, torch.nn), (torch.nn, fnn)):
        source, target = _layer(nn, name, **options).to(device), _layer(other, name, **options).to(device)
        randomize(source)
        source(x)
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        assert_same(dict(target.state_dict()), dict(source.state_dict()))
        assert_near(target.eval()(x), source.eval()(x))
    # A state dict of before torch 0.4.1 has no counter.
    if name in BATCH_NORMS:
        old = {k: v for k, v in source.state_dict().items() if k != "num_batches_tracked"}
        for strict in (True, False):
            layers = [_layer(nn, name).to(device) for nn in (fnn, torch.nn)]
            mine, theirs = (
                outcome(functools.partial(layer.load_state_dict, old, strict)) for layer in layers
            )
            assert str(mine) == str(theirs)


@pytest.mark.parametrize("activation", [None, "gelu"])
@some_modules
def test_layers_survive_copy_and_pickle(name, activation, device, path):
    layer = _layer(fnn, name, affine=True, activation=activation).to(device)
    randomize(layer)
    x = torch.randn(SHAPES[RANK[name]], device=device)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = layer(x)
    for twin in twins:
        assert type(twin) is type(layer)
        assert repr(twin) == repr(layer)
        assert_same(twin(x), expected)
        assert_same(dict(twin.state_dict()), dict(layer.state_dict()))


@some_modules
def test_a_layer_of_torch_may_change_its_class(name, device, path):
    stock = _layer(torch.nn, name).to(device)
    layer = copy.deepcopy(stock)
    layer.__class__ = getattr(fnn, name)
    assert repr(layer) == repr(stock)
    assert_layers_agree(layer, stock, torch.randn(SHAPES[RANK[name]], device=device), path == "aten")


@some_modules
def test_factory_arguments(name, device, path):
    layer = _layer(fnn, name, affine=True, device=device, dtype=torch.float64)
    assert all(
        (t.dtype, t.device.type) == (torch.float64, device.type)
        for t in (*layer.parameters(), *layer.buffers())
        if t.is_floating_point()
    )
    x = torch.randn(SHAPES[RANK[name]], dtype=torch.float64, device=device)
    assert layer(x).dtype == torch.float64
    meta = _layer(fnn, name, affine=True, device="meta")
    y = meta(x.float().to("meta"))
    assert (y.device.type, y.shape) == ("meta", x.shape)
    materialized = meta.to_empty(device=device)
    materialized.reset_parameters()
    assert_near(materialized(x.float()), _layer(torch.nn, name, affine=True).to(device)(x.float()))


@some_modules
def test_conversions_move_a_layer_as_they_move_torchs(name, device, path):
    options = {} if name == "GroupNorm" else {"track_running_stats": True}
    for convert in (torch.nn.Module.double, torch.nn.Module.half, torch.nn.Module.bfloat16):
        layer, stock = (
            convert(_layer(nn, name, affine=True, **options).to(device)) for nn in (fnn, torch.nn)
        )
        assert [t.dtype for t in layer.state_dict().values()] == [
            t.dtype for t in stock.state_dict().values()
        ]
        x = torch.randn(SHAPES[RANK[name]], device=device).to(layer.weight.dtype)
        assert layer(x).dtype == x.dtype


@some_modules
def test_fused_layers_are_activation_of_norm_plus_residual(name, device, path):
    options = {} if name == "GroupNorm" else {"track_running_stats": True}
    layer = _layer(fnn, name, affine=True, activation="gelu", **options).to(device)
    stock = _layer(torch.nn, name, affine=True, **options).to(device).double()
    randomize(layer)
    stock.load_state_dict(layer.state_dict())
    x, residual = torch.randn(2, *SHAPES[RANK[name]], device=device)
    for training in (True, False):
        layer.train(training)
        stock.train(training)
        assert_near(layer(x, residual=residual), F.gelu(stock(x.double()) + residual))
        assert_near(layer(x), F.gelu(stock(x.double())))
    for key, value in stock.state_dict().items():
        assert_near(layer.state_dict()[key].double(), value.double(), 1e9)  # 1e9 fp64 ulps: fp32 statistics
    if name in INSTANCE_NORMS:
        assert_near(layer(x[0], residual=residual[0]), F.gelu(stock(x[0].double()) + residual[0]))


@some_modules
def test_layers_train_in_a_sequential(name, device, path):
    shape = SHAPES[RANK[name]]

    def model(nn):
        torch.manual_seed(2)
        return torch.nn.Sequential(
            torch.nn.Linear(shape[-1], 4), _layer(nn, name, affine=True), torch.nn.Linear(4, 2)
        ).to(device)

    mine, theirs = model(fnn), model(torch.nn)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    x = torch.randn(shape, device=device)
    for m in (mine, theirs):
        m(x).square().sum().backward()
    for p, expected in zip(mine.parameters(), theirs.parameters(), strict=True):
        # The bias in front of batch normalization has gradient 0, of terms as large as those of the weight.
        assert_near(p.grad, expected.grad, 20.0)
    assert_near(mine.eval()(x), theirs.eval()(x))


# --- running statistics -----------------------------------------------------------------------------------


@on_both(
    "name momentum dtype",
    (*BATCH_NORMS, *INSTANCE_NORMS),
    (0.1, None, 0.0, 1.0, 0.7),
    (torch.float64, torch.float32),
    fast=lambda name, momentum, dtype: (
        (name, momentum, dtype)
        in [
            ("BatchNorm1d", None, torch.float32),
            ("BatchNorm2d", None, torch.float64),
            ("BatchNorm2d", 0.7, torch.float64),
            ("BatchNorm3d", 0.1, torch.float32),
            ("InstanceNorm2d", 0.1, torch.float32),
        ]
    ),
)
def test_running_statistics_after_several_steps(name, momentum, dtype, device, path):
    layer, stock = (
        _layer(nn, name, momentum=momentum, track_running_stats=True).to(device, dtype)
        for nn in (fnn, torch.nn)
    )
    places = [buffer.data_ptr() for buffer in layer.buffers()]
    close = assert_same if path == "aten" else assert_near
    for step in range(4):
        # fp64 shows a momentum that went through fp32.
        x = 3 * torch.randn((step + 2, *SHAPES[RANK[name]][1:]), dtype=dtype, device=device) + step
        layer(x)
        stock(x)
        close(layer.running_mean, stock.running_mean)
        close(layer.running_var, stock.running_var)
        assert layer.num_batches_tracked == stock.num_batches_tracked
    assert [buffer.data_ptr() for buffer in layer.buffers()] == places
    close(layer.eval()(x), stock.eval()(x))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(x)
    assert_same(dict(layer.state_dict()), before)
    layer.reset_running_stats()
    stock.reset_running_stats()
    assert_same(dict(layer.state_dict()), dict(stock.state_dict()))


@on_both("name", ("BatchNorm2d", "InstanceNorm2d"), fast="BatchNorm2d".__eq__)
def test_settings_changed_after_construction_are_honoured(name, device, path):
    """``update_bn`` of torch sets ``momentum = None``; others switch tracking, or take the buffers away."""
    x = torch.randn(SHAPES[4], device=device) + 1
    changes = [
        lambda layer: setattr(layer, "momentum", None),
        lambda layer: setattr(layer, "momentum", 1.0),
        lambda layer: setattr(layer, "eps", 0.5),
        lambda layer: setattr(layer, "track_running_stats", False),
        lambda layer: setattr(layer, "num_batches_tracked", None),
        lambda layer: (setattr(layer, "num_batches_tracked", None), setattr(layer, "momentum", None)),
        lambda layer: (setattr(layer, "running_mean", None), setattr(layer, "running_var", None)),
        lambda layer: setattr(layer, "bias", None),
    ]
    close = assert_same if path == "aten" else assert_near
    for change in changes:
        layer, stock = (
            _layer(nn, name, affine=True, track_running_stats=True).to(device) for nn in (fnn, torch.nn)
        )
        for m in (layer, stock):
            m(x)
            change(m)
        for training in (True, False):
            (actual, y), (expected, expected_y) = (
                outcome(lambda m=m, training=training: m.train(training)(x)) for m in (layer, stock)
            )
            assert actual == expected
            if expected_y is not None:
                close(y, expected_y)
        assert_states_agree(layer, stock, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", ["fp32", "same"])
def test_16_bit_training_keeps_statistics_in_their_own_dtype(parameters, dtype, device, path):
    layer = fnn.BatchNorm2d(CHANNELS).to(device, dtype if parameters == "same" else torch.float32)
    stock = copy.deepcopy(layer).double()
    x = (torch.randn(SHAPES[4], device=device) + 0.5).to(dtype)
    y, expected = layer(x), stock(x.double())
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    # ATen keeps scale and shift in 16 bits: three more roundings of values up to 3.
    tolerance = (
        {"rtol": 1.01 * eps, "atol": 1e-6} if path == "kernels" else {"rtol": 4 * eps, "atol": 4 * eps}
    )
    assert_close(y.double(), expected, **tolerance)
    for buffer in ("running_mean", "running_var"):
        mine, exact = getattr(layer, buffer), getattr(stock, buffer)
        assert mine.dtype == (dtype if parameters == "same" else torch.float32)
        # Rounded after the product and after the sum.
        assert_close(mine.double(), exact, rtol=2 * torch.finfo(mine.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("given", ["mean", "var"])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_one_statistic_alone_is_updated_alone(name, given, device, path):
    x = torch.randn(SHAPES[4], device=device) + 1
    for f in (FF, F):
        statistic = torch.linspace(0, 1, CHANNELS, device=device)
        arguments = (statistic, None) if given == "mean" else (None, statistic)
        result, _ = outcome(
            lambda f=f, arguments=arguments: getattr(f, name)(x, *arguments, None, None, True)
        )
        if f is FF:
            mine, my_result = statistic, result
    assert my_result == result
    assert_near(mine, statistic)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_statistics_are_not_touched_by_evaluation_or_by_the_backward_pass(name, device, path):
    x, weight, bias, _ = tensors(SHAPES[4], device, torch.float32)
    mean, var = _statistics(x)
    before = mean.clone(), var.clone()
    x.requires_grad_()
    getattr(FF, name)(x, mean, var, weight, bias, False).sum().backward()
    assert_same((mean, var), before)
    y = getattr(FF, name)(x, mean, var, weight, bias, True)
    after = mean.clone(), var.clone()
    y.sum().backward()
    assert_same((mean, var), after)


def test_update_bn_works_on_our_layers(device, path):
    def model(nn):
        torch.manual_seed(4)
        layers = [
            torch.nn.Linear(5, CHANNELS),
            nn.BatchNorm1d(CHANNELS),
            torch.nn.ReLU(),
            nn.BatchNorm1d(CHANNELS),
        ]
        return torch.nn.Sequential(*layers).to(device)

    batches = [torch.randn(n, 5, device=device) for n in (4, 7, 3)]
    mine, theirs = model(fnn), model(torch.nn)
    for m in (mine, theirs):
        m(batches[0] + 5)  # statistics that have to be forgotten
        torch.optim.swa_utils.update_bn(batches, m, device=device)
        assert m[1].momentum == 0.1
    for key, value in theirs.state_dict().items():
        assert_near(mine.state_dict()[key].double(), value.double(), 1e9)  # fp32 statistics
    assert mine[1].num_batches_tracked == 3


def test_tools_that_look_for_torchs_classes_find_ours(device, path):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, CHANNELS, 3), fnn.BatchNorm2d(CHANNELS)).to(device)
    x = torch.randn(4, 2, 6, 5, device=device)
    model(x)
    model.eval()
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(*model)
    # A convolution and a product in another order: some ulps of sums of 18 terms.
    assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    synchronized = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert type(synchronized[1]) is torch.nn.SyncBatchNorm
    frozen = torch.func.replace_all_batch_norm_modules_(copy.deepcopy(model).train())
    assert frozen[1].running_mean is None
    assert_near(frozen(x), torch.nn.BatchNorm2d(CHANNELS).to(device)(frozen[0](x)))


# --- derivatives ------------------------------------------------------------------------------------------


def check_derivatives(function, inputs, **options):
    """First and second derivatives, in fast mode (random projections of the Jacobians), at torch's tolerances."""
    inputs = tuple(t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs)
    assert gradcheck(function, inputs, fast_mode=True, **options)
    assert gradgradcheck(function, inputs, fast_mode=True, **options)


def derivatives(function, inputs, dy, directions):
    """Value, first derivatives, and the derivatives of those along ``directions``, by the inputs and by dy."""
    inputs, (dy,) = leaves(*inputs), leaves(dy)
    y = function(*inputs)
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
    second = torch.autograd.grad(along, [*inputs, dy], allow_unused=True, materialize_grads=True)
    return y, *first, *second


COMBINATIONS = {
    "plain": ("x",),
    "affine": ("x", "weight", "bias"),
    "weight": ("x", "weight"),
    "bias": ("x", "bias"),
    "residual": ("x", "residual"),
    "all": ("x", "weight", "bias", "residual"),
}


def fused_function(kind, names, activation):
    def function(*values):
        given = dict(zip(names, values, strict=True))
        x = given.pop("x")
        return KINDS[kind](FF, x, activation=activation, **given)

    return function


@on_both(
    "kind combination activation",
    KINDS,
    COMBINATIONS,
    (None, "silu"),
    fast=lambda kind, combination, activation: (
        (kind, combination, activation) == ("group_norm", "all", "silu")
    ),
)
def test_gradcheck_and_gradgradcheck_of_every_combination(kind, combination, activation, device, path):
    names = COMBINATIONS[combination]
    if path == "aten" and combination == "bias":
        pytest.skip(
            "torch's own second derivatives are wrong there: the bias gradient is cut off, or they crash"
        )
    values = dict(zip(("x", "weight", "bias", "residual"), tensors((3, 6, 2, 2), device), strict=True))
    check_derivatives(fused_function(kind, names, activation), [values[name] for name in names])


@slow
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@all_kinds
def test_gradcheck_and_gradgradcheck_of_every_activation(kind, activation, residual, device, path):
    """No value is near a kink: finite differences step by 1e-6, and there are 72 values."""
    names = COMBINATIONS["all" if residual else "affine"]
    values = dict(zip(("x", "weight", "bias", "residual"), tensors((3, 6, 2, 2), device), strict=True))
    check_derivatives(fused_function(kind, names, activation), [values[name] for name in names])


@on_both(
    "kind combination activation layout",
    KINDS,
    COMBINATIONS,
    (None, *ACTIVATIONS),
    ("contiguous", "channels_last"),
    only=lambda kind, combination, activation, layout: (
        combination == "all" or (activation in (None, "relu") and layout == "contiguous")
    ),
    fast=lambda kind, combination, activation, layout: (
        (kind in ("batch_norm", "group_norm") and combination == "all" and layout == "channels_last")
        or (combination in ("bias", "residual") and activation in (None, "relu") and layout == "contiguous")
    ),
)
def test_second_derivatives_are_those_of_the_definition(kind, combination, activation, layout, device, path):
    """Of torch's function, activation and sum, all in fp64, which gradgradcheck has tried above (and torch itself)."""
    names = COMBINATIONS[combination]
    if path == "aten" and combination == "bias":
        pytest.skip(
            "torch's own second derivatives are wrong there: the bias gradient is cut off, or they crash"
        )
    values = dict(zip(("x", "weight", "bias", "residual"), tensors((3, 6, 2, 4), device), strict=True))
    values = {name: LAYOUTS[layout](t) if t.dim() == 4 else t for name, t in values.items() if name in names}
    dy = torch.randn((3, 6, 2, 4), dtype=torch.float64, device=device)
    directions = [torch.randn_like(t) for t in values.values()]

    def definition(*given):
        given = {"weight": torch.ones(CHANNELS, dtype=torch.float64, device=device)} | dict(
            zip(names, given, strict=True)
        )
        return reference(kind, activation=activation, **given)

    results = derivatives(fused_function(kind, names, activation), values.values(), dy, directions)
    expected = derivatives(definition, values.values(), dy, directions)
    # fp64: sums of at most 72 terms, of some hundreds in second derivatives.
    assert_close(results, expected, rtol=1e-10, atol=1e-9)


@on_both(
    "kind activation dtype",
    KINDS,
    (None, *ACTIVATIONS),
    (torch.float32, torch.bfloat16, torch.float16),
    fast=lambda kind, activation, dtype: (
        (kind == "batch_norm" and dtype == torch.bfloat16)
        or (activation == "gelu" and dtype == torch.float16)
        or (kind == "group_norm" and activation in ("relu", "tanh") and dtype == torch.float32)
    ),
)
def test_gradients_in_every_dtype(kind, activation, dtype, device, path):
    """Against fp64 from the same rounded input; parameters in fp32, as under autocast and in mixed precision."""
    if path == "aten" and dtype != torch.float32:
        pytest.skip("rounds after every operation: that is torch's business")
    x, weight, bias, residual = tensors(SHAPES[4], device, torch.float32)
    # The fast gelu and sigmoid of the kernels are good to some 1e-6: below the bound of assert_near, 8e-6 and more.
    given = (x.to(dtype), weight, bias, residual.to(dtype))
    check_gradients(kind, given, torch.randn_like(x).to(dtype), path, activation=activation)


@on_both(
    "kind activation needed",
    KINDS,
    (None, "relu", "mish"),
    ("x", "weight", "bias", "residual"),
    fast=lambda kind, activation, needed: (
        (kind, activation)
        in [("batch_norm", "relu"), ("batch_norm_evaluation", None), ("group_norm", "mish")]
    ),
)
def test_derivatives_of_one_input_alone(kind, activation, needed, device, path):
    """Frozen parameters, or a frozen network in front: the others then ask for nothing."""
    values = dict(zip(("x", "weight", "bias", "residual"), tensors((3, 6, 2, 2), device), strict=True))
    all_needed = [value.clone().requires_grad_() for value in values.values()]
    function = fused_function(kind, tuple(values), activation)
    dy = torch.randn(3, 6, 2, 2, dtype=torch.float64, device=device)
    expected = torch.autograd.grad(function(*all_needed), all_needed[list(values).index(needed)], dy)
    values[needed].requires_grad_()
    y = function(*values.values())
    y.backward(dy)
    # fp64: the same terms, perhaps summed by another kernel.
    assert_close(values[needed].grad, expected[0], rtol=1e-12, atol=1e-12)
    assert all(value.grad is None for name, value in values.items() if name != needed)


@on_both("kind", KINDS, fast=("batch_norm", "group_norm").__contains__)
def test_nothing_is_kept_where_nothing_asks_for_gradients(kind, device, path):
    x, weight, bias, residual = tensors(SHAPES[4], device)
    assert not KINDS[kind](FF, x, weight, bias, residual=residual).requires_grad
    weight.requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = KINDS[kind](FF, x, weight, bias, residual=residual, activation="relu")
        assert not y.requires_grad
        assert y.grad_fn is None
    assert y.is_inference()


@on_both(
    "kind activation changed",
    KINDS,
    (None, "silu"),
    ("x", "weight", "y"),
    fast=lambda kind, activation, changed: (activation is None) != (kind == "group_norm"),
)
def test_a_tensor_changed_before_the_backward_pass_is_noticed(kind, activation, changed, device, path):
    """Silently wrong gradients are worse than an error. What torch does not need may be changed here too."""

    def run(f):
        x, weight, bias, _ = (t.requires_grad_() for t in tensors(SHAPES[4], device))
        weight = weight * 1
        y = KINDS[kind](f, x, weight, bias, **({"activation": activation} if f is FF else {}))
        with torch.no_grad():
            {"x": x, "weight": weight, "y": y}[changed].add_(1)
        y.sum().backward()

    mine, theirs = outcome(lambda: run(FF))[0], outcome(lambda: run(F))[0]
    if changed == "y":
        assert mine == theirs == []
    elif changed == "x" or not kind.startswith("instance_norm"):
        assert mine[0] is theirs[0] is RuntimeError
        assert "inplace" in mine[1]
    else:
        # Torch keeps a copy of an instance normalization's weight; the kernels keep the weight.
        assert theirs == []
        assert mine == [] or (mine[0] is RuntimeError and "inplace" in mine[1])


@on_both(
    "kind activation",
    KINDS,
    (None, "gelu"),
    fast=lambda kind, activation: (kind, activation) in [("batch_norm", "gelu"), ("group_norm", None)],
)
def test_the_graph_is_freed_and_can_be_kept(kind, activation, device, path):
    x, weight, bias, residual = (t.requires_grad_() for t in tensors(SHAPES[4], device))
    y = KINDS[kind](FF, x, weight, bias, residual=residual, activation=activation)
    first = torch.autograd.grad(y.sum(), (x, weight, bias, residual), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, weight, bias, residual))
    assert_same(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "kind", [kind if kind == "batch_norm" else pytest.param(kind, marks=slow) for kind in KINDS]
)
def test_memory_kept_for_the_backward_pass(kind, residual, activation, device):
    """The input and a few values a channel: no normalized copy, no mask; a sign a bit, or the residual."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    shape = (4, 6, 16, 8)
    x, weight, bias, r = (t.requires_grad_() for t in tensors(shape, device, torch.float32))
    # Not leaves, so that the input is kept in any case.
    x, r = x * 1, r * 1 if residual else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = KINDS[kind](FF, x, weight, bias, residual=r, activation=activation)
    size = x.numel() * x.element_size()
    allowed = size
    if residual and activation == "relu":
        allowed += size // 32
    elif residual and activation:
        allowed += size
    # Weight, bias, mean and variance of at most 24 instances.
    assert sum(saved.values()) <= allowed + 4 * 24 * 4 + 64
    assert y.grad_fn is not None


@on_both(
    "kind activation",
    KINDS,
    (None, "gelu"),
    fast=lambda kind, activation: activation and "instance" not in kind,
)
def test_batched_gradients(kind, activation, device, path):
    """``is_grads_batched`` (vectorized Jacobians) runs the backward pass under vmap."""
    given = [t.requires_grad_() for t in tensors((3, 6, 2, 2), device)]
    y = fused_function(kind, COMBINATIONS["all"], activation)(*given)
    dy = torch.randn(3, *y.shape, dtype=torch.float64, device=device)
    expected = [torch.autograd.grad(y, given, row, retain_graph=True) for row in dy]
    batched = torch.autograd.grad(y, given, dy, retain_graph=True, is_grads_batched=True)
    for result, rows in zip(batched, zip(*expected, strict=True), strict=True):
        # fp64: the same function in another order of summation.
        assert_close(result, torch.stack(rows), rtol=1e-12, atol=1e-12)


# --- torch.func and forward-mode AD -----------------------------------------------------------------------


@on_both("kind activation", KINDS, (None, "silu"), fast=lambda kind, activation: activation)
def test_func_transforms_agree_with_autograd(kind, activation, device, path):
    given = tensors((3, 6, 2, 2), device)
    tangents = tuple(torch.randn_like(t) for t in given)
    cotangent = torch.randn_like(given[0])
    function = fused_function(kind, COMBINATIONS["all"], activation)
    inputs = leaves(*given)
    y = function(*inputs)
    gradients = torch.autograd.grad(y, inputs, cotangent)
    # fp64: kernels and ATen sum in another order.
    close = functools.partial(assert_close, rtol=1e-11, atol=1e-11)
    close(
        torch.func.grad(lambda *t: (function(*t) * cotangent).sum(), argnums=(0, 1, 2, 3))(*given), gradients
    )
    value, pullback = torch.func.vjp(function, *given)
    close(value, y.detach())
    close(pullback(cotangent), gradients)
    value, derivative = torch.func.jvp(function, given, tangents)
    close(value, y.detach())
    # <cotangent, J tangent> = <J^T cotangent, tangent>
    products = [(g * t).sum() for g, t in zip(gradients, tangents, strict=True)]
    close((derivative * cotangent).sum(), sum(products))
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(t, d) for t, d in zip(given, tangents, strict=True)))
        close(forward_ad.unpack_dual(dual).tangent, derivative)


@all_kinds
def test_vmap_is_a_loop(kind, device, path):
    x, weight, bias, residual = tensors((3, 6, 2, 2), device)
    x, residual = torch.randn(2, 4, *x.shape, dtype=torch.float64, device=device)

    def function(x, r):
        return KINDS[kind](FF, x, weight, bias, residual=r, activation="gelu")

    def gradient(x, r):
        return torch.func.grad(lambda x: function(x, r).square().sum())(x)

    for f in (function, gradient):
        expected = torch.stack([f(example, r) for example, r in zip(x, residual, strict=True)])
        assert_close(
            torch.vmap(f)(x, residual), expected, rtol=1e-11, atol=1e-11
        )  # fp64, another order of sums
    assert_close(
        torch.vmap(lambda x: KINDS[kind](FF, x, weight, bias), in_dims=1, out_dims=1)(x.transpose(0, 1)),
        torch.stack([KINDS[kind](FF, example, weight, bias) for example in x], 1),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_vmap_with_running_statistics_ends_as_in_torch(name, device, path):
    x = torch.randn(3, *SHAPES[4], device=device)

    def run(f):
        mean, var = torch.zeros(CHANNELS, device=device), torch.ones(CHANNELS, device=device)
        return torch.vmap(lambda x: getattr(f, name)(x, mean, var, None, None, True))(x)

    assert outcome(lambda: run(FF))[0] == outcome(lambda: run(F))[0]
    assert outcome(lambda: run(F))[0][0] is RuntimeError

    def batched(f):
        mean, var = torch.zeros(3, CHANNELS, device=device), torch.ones(3, CHANNELS, device=device)
        y = torch.vmap(lambda x, m, v: getattr(f, name)(x, m, v, None, None, True))(x, mean, var)
        return y, mean, var

    assert_near(batched(FF)[0], batched(F)[0])
    assert_near(torch.stack(batched(FF)[1:]), torch.stack(batched(F)[1:]))


@some_modules
def test_functional_call_of_a_layer(name, device, path):
    options = {} if name == "GroupNorm" else {"track_running_stats": True}
    layer, stock = (_layer(nn, name, affine=True, **options).to(device).double() for nn in (fnn, torch.nn))
    x = torch.randn(SHAPES[RANK[name]], dtype=torch.float64, device=device)
    state = {key: value.detach().clone() for key, value in stock.state_dict().items()}
    state["weight"] = torch.linspace(0.5, 2, CHANNELS, dtype=torch.float64, device=device)

    def loss(weight, layer, state):
        return torch.func.functional_call(layer, {**state, "weight": weight}, (x,)).sin().sum()

    mine, theirs = copy.deepcopy(state), copy.deepcopy(state)
    result = torch.func.grad(loss)(mine.pop("weight"), layer, mine)
    expected = torch.func.grad(loss)(theirs.pop("weight"), stock, theirs)
    assert_close(result, expected, rtol=1e-12, atol=1e-12)  # fp64
    assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    # The layer itself has not learned from it.
    assert_same(
        dict(layer.state_dict()),
        dict(_layer(torch.nn, name, affine=True, **options).to(device).double().state_dict()),
    )


def test_per_sample_gradients_of_group_norm(device, path):
    """vmap over grad, as differential privacy does it: why such models have group normalization."""
    layer = fnn.GroupNorm(3, CHANNELS, activation="relu").to(device).double()
    parameters = {key: value.detach() for key, value in layer.named_parameters()}
    x = torch.randn(4, *SHAPES[4][1:], dtype=torch.float64, device=device)

    def loss(parameters, example):
        return torch.func.functional_call(layer, parameters, (example.unsqueeze(0),)).square().sum()

    result = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, example in enumerate(x):
        expected = torch.func.grad(loss)(parameters, example)
        assert_close({k: v[i] for k, v in result.items()}, expected, rtol=1e-12, atol=1e-12)  # fp64


# --- autocast, checkpointing, determinism, fake and meta tensors, subclasses ------------------------------


@on_both(
    "name dtype",
    MODULES,
    (torch.float32, torch.bfloat16),
    fast=lambda name, dtype: name == "GroupNorm" or (name, dtype) == ("BatchNorm2d", torch.bfloat16),
)
def test_autocast_gives_the_dtypes_of_torch(name, dtype, device, path):
    shape = SHAPES[RANK[name]]
    linear = torch.nn.Linear(shape[-1], shape[-1], device=device)
    options = {} if name == "GroupNorm" else {"track_running_stats": True}
    layer, stock = (_layer(nn, name, affine=True, **options).to(device) for nn in (fnn, torch.nn))
    x = torch.randn(shape, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(x.to(dtype)).dtype == stock(x.to(dtype)).dtype
        y, expected = layer(linear(x)), stock(linear(x))
        assert y.dtype == expected.dtype
        fused = F.gelu(expected + x)
        residual = _layer(fnn, name, affine=True, activation="gelu").to(device)(linear(x), residual=x)
        assert residual.dtype == fused.dtype
    tolerance = bf16(4 * torch.finfo(torch.bfloat16).eps)  # both are bf16, torch with more roundings
    assert_close(y.float(), expected.float(), rtol=tolerance, atol=tolerance)
    (y.float().sum() + residual.float().sum()).backward()
    assert linear.weight.grad.dtype == layer.weight.grad.dtype == torch.float32


@on_both(
    "name use_reentrant",
    MODULES,
    (True, False),
    fast=lambda name, use_reentrant: name == "BatchNorm2d" or (name == "GroupNorm" and use_reentrant),
)
def test_checkpointing_acts_as_with_torchs_layers(name, use_reentrant, device, path):
    """Statistics are updated twice, as by torch's layers, which are computed twice too."""
    shape = SHAPES[RANK[name]]
    options = {} if name == "GroupNorm" else {"track_running_stats": True}
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    results = []
    for nn in (fnn, torch.nn):
        layer = _layer(nn, name, affine=True, **options).to(device).double()
        y = checkpoint(lambda x, layer=layer: layer(x).sin(), x, use_reentrant=use_reentrant)
        x.grad = None
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.weight.grad, dict(layer.state_dict())))
    assert_close(*results, rtol=1e-11, atol=1e-11)  # fp64


@on_both(
    "kind layout shape",
    KINDS,
    ("contiguous", "channels_last"),
    ((3, 6, 5, 7), (2, 3, 97, 101)),
    fast=lambda kind, layout, shape: (
        (kind, layout, shape[1])
        in [
            ("batch_norm", "contiguous", 3),
            ("batch_norm", "channels_last", 3),
            ("group_norm", "contiguous", 3),
            ("group_norm", "channels_last", 6),
        ]
    ),
)
def test_the_same_input_gives_the_same_bits(kind, layout, shape, device, path):
    """Large: a channel is spread over several programs."""
    x, weight, bias, residual = tensors(shape, device, torch.float32)
    x, residual = LAYOUTS[layout](x), LAYOUTS[layout](residual)
    dy = torch.randn(shape, device=device)

    def run():
        given = leaves(x, weight, bias, residual)
        y = KINDS[kind](FF, *given[:3], residual=given[3], activation="relu")
        return (y.detach(), *torch.autograd.grad(y, given, dy))

    first = run()
    assert_same(run(), first)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@all_kinds
def test_fake_and_meta_tensors_give_shapes_without_data(kind, layout, device, path):
    x, weight, bias, residual = tensors(SHAPES[4], device, torch.float32)
    x = LAYOUTS[layout](x)
    expected = KINDS[kind](F, x, weight, bias)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, weight, bias, residual)]
        y = KINDS[kind](FF, *fakes[:3])
        fused = KINDS[kind](FF, *fakes[:3], residual=fakes[3].double(), activation="gelu")
    assert (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, expected.device)
    assert fused.dtype == torch.float64
    y = KINDS[kind](FF, *(t.to("meta") for t in (x, weight, bias)))
    assert (y.shape, y.dtype, y.device.type) == (expected.shape, expected.dtype, "meta")


class _Marked(torch.Tensor):
    """A tensor subclass that passes through every function."""


@pytest.mark.parametrize("marked", ["x", "weight"])
@all_kinds
def test_tensor_subclasses_stay_what_they_are(kind, marked, device, path):
    x, weight, bias, _ = tensors(SHAPES[4], device, torch.float32)
    if marked == "x":
        x = x.as_subclass(_Marked)
    else:
        weight = weight.as_subclass(_Marked)
    expected = KINDS[kind](F, x, weight, bias)
    y = KINDS[kind](FF, x, weight, bias)
    assert type(y) is type(expected) is _Marked
    assert_near(y.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    assert type(KINDS[kind](FF, x, weight, bias, activation="gelu")) is _Marked


@some_modules
def test_hooks_and_parametrizations_work(name, device, path):
    layer = _layer(fnn, name, affine=True).to(device)
    seen = []
    layer.register_forward_hook(lambda module, arguments, result: seen.append(result.shape))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append(dx[0].shape))
    x = torch.randn(SHAPES[RANK[name]], device=device, requires_grad=True)
    layer(x).sum().backward()
    assert seen == [x.shape, x.shape]
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Softplus())
    layer(x).square().sum().backward()
    assert layer.parametrizations.weight.original.grad is not None

"""Batch, group and instance normalization in odd calls and with wrong arguments: they end as torch's."""

import pytest
import torch
import torch.nn.functional as F
from norm_cases import (
    FUNCTIONS,
    MODULES,
    _layer,
    all_modules,
    assert_computed_alike,
    assert_states_agree,
    on_both,
)
from shared import assert_same, outcome
from torch.testing import assert_close

import fastreg.functional as FF
import fastreg.nn as fnn

all_functions = pytest.mark.parametrize("name", FUNCTIONS)


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
    close = assert_same if exact else assert_computed_alike
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
    assert_computed_alike(y, exact)


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
        close = assert_same if path == "aten" else assert_computed_alike
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

"""Numbers of every kind as arguments: taken where torch takes them, and refused in torch's words where it does not."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fastreg.functional as F
import fastreg.nn as fnn
from fastreg.ops.norms import sync_batch_norm

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
PARAMETERS = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))


def _norm(name, **arguments):
    def call(functions, x):
        statistics = torch.zeros(6, device=x.device), torch.ones(6, device=x.device)
        y = getattr(functions, name)(x, *statistics, *PARAMETERS.to(x.device), **arguments)
        return y, *statistics

    return call


def _call(name, *before, **arguments):
    return lambda functions, x: getattr(functions, name)(x, *before, **arguments)


COUNTERPARTS = {  # an argument of a function of torch: a value that it takes, and a call with a value
    "dropout p": (0.5, lambda v: _call("dropout", p=v)),
    "dropout p in evaluation": (0.5, lambda v: _call("dropout", p=v, training=False)),
    "dropout p = 0": (0, lambda v: _call("dropout", p=v)),
    "dropout p = 1": (1, lambda v: _call("dropout", p=v)),
    "dropout training": (1, lambda v: _call("dropout", p=0.5, training=v)),
    "dropout1d p": (0.5, lambda v: _call("dropout1d", p=v)),
    "alpha_dropout p": (0.5, lambda v: _call("alpha_dropout", p=v, training=True)),
    "feature_alpha_dropout p": (0.5, lambda v: _call("feature_alpha_dropout", p=v, training=True)),
    "batch_norm momentum": (0.5, lambda v: _norm("batch_norm", training=True, momentum=v)),
    "batch_norm eps": (0.5, lambda v: _norm("batch_norm", training=True, eps=v)),
    "batch_norm eps = 1": (1, lambda v: _norm("batch_norm", training=True, eps=v)),
    "batch_norm eps in evaluation": (0.5, lambda v: _norm("batch_norm", eps=v)),
    "batch_norm training": (1, lambda v: _norm("batch_norm", training=v)),
    "group_norm num_groups": (2, lambda v: _call("group_norm", v)),
    "group_norm num_groups = 1": (1, lambda v: _call("group_norm", v)),
    "group_norm num_groups = 0": (0, lambda v: _call("group_norm", v)),
    "group_norm num_groups = 4": (4, lambda v: _call("group_norm", v)),
    "group_norm eps": (0.5, lambda v: _call("group_norm", 2, eps=v)),
    "instance_norm momentum": (0.5, lambda v: _norm("instance_norm", momentum=v)),
    "instance_norm eps": (0.5, lambda v: _norm("instance_norm", eps=v)),
    "instance_norm use_input_stats": (1, lambda v: _norm("instance_norm", use_input_stats=v)),
    "layer_norm normalized_shape": (8, lambda v: _call("layer_norm", v)),
    "layer_norm (normalized_shape,)": (8, lambda v: _call("layer_norm", (v,))),
    "layer_norm [6, normalized_shape]": (8, lambda v: _call("layer_norm", [6, v])),
    "layer_norm eps": (0.5, lambda v: _call("layer_norm", (8,), eps=v)),
    "local_response_norm size": (3, lambda v: _call("local_response_norm", v)),
    "local_response_norm alpha": (0.5, lambda v: _call("local_response_norm", 3, alpha=v)),
    "local_response_norm beta": (0.5, lambda v: _call("local_response_norm", 3, beta=v)),
    "local_response_norm k": (0.5, lambda v: _call("local_response_norm", 3, k=v)),
}

KINDS = {
    "int": int,
    "float": float,
    "bool": bool,
    "int64": np.int64,
    "uint8": np.uint8,
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bool_": np.bool_,
    "array": np.array,
    "array of one": lambda v: np.array([v]),
    "tensor": lambda v: torch.tensor(float(v)),
    "bf16 tensor": lambda v: torch.tensor(v, dtype=torch.bfloat16),
    "int tensor": lambda v: torch.tensor(int(v)),
    "bool tensor": lambda v: torch.tensor(bool(v)),
    "tensor with a gradient": lambda v: torch.tensor(float(v), requires_grad=True),
    "meta tensor": lambda v: torch.tensor(v, device="meta"),
    "tensor of one": lambda v: torch.tensor([v]),
    "tensor of two": lambda v: torch.tensor([v, v]),
    "Fraction": Fraction,
    "Decimal": Decimal,
    "complex": complex,
    "str": str,
    "None": lambda v: None,
    "list": lambda v: [v],
    "negative": lambda v: -v,
    "nan": lambda v: float("nan"),
    "inf": lambda v: float("inf"),
}
# A momentum of one element stays on its device: documented, for averages over all batches.
OURS_ALONE = {("batch_norm momentum", "tensor of one"), ("instance_norm momentum", "tensor of one")}


def _outcome(call):
    torch.manual_seed(0)
    try:
        found = call()
    except Exception as error:
        return type(error), str(error)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", COUNTERPARTS)
def test_numbers_are_taken_as_torch_takes_them(argument, kind, path, device):
    if (argument, kind) in OURS_ALONE:
        return
    value, call = COUNTERPARTS[argument]
    value = KINDS[kind](value)
    x = X.to(device)
    expected = _outcome(lambda: call(value)(nn.functional, x))
    found = _outcome(lambda: call(value)(F, x))
    if isinstance(expected[0], type):
        assert found == expected
        return
    assert not isinstance(found[0], type), found
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.requires_grad == theirs.requires_grad
        if "drop" in argument:
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        else:
            assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


WEIGHT = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


def _linear(name, **arguments):
    return lambda x: getattr(F, name)(x, WEIGHT.to(x.device), **arguments)


OURS = {  # the same for what torch has no counterpart of: also whether the argument is an int
    "drop_path p": (0.5, float, lambda v: lambda x: F.drop_path(x, v, seed=1)),
    "dropout_add_layer_norm p": (
        0.5, float, lambda v: lambda x: F.dropout_add_layer_norm(x, x, (8,), p=v, seed=1),
    ),
    "dropout_add_layer_norm eps": (
        0.5, float, lambda v: lambda x: F.dropout_add_layer_norm(x, x, (8,), eps=v, seed=1),
    ),
    "dropout_add_layer_norm normalized_shape": (
        8, int, lambda v: lambda x: F.dropout_add_layer_norm(x, x, (*x.shape[1:2], v), seed=1),
    ),
    "gaussian_noise std": (0.5, float, lambda v: lambda x: F.gaussian_noise(x, v, seed=1)),
    "drop_connect p": (0.5, float, lambda v: _linear("drop_connect_linear", p=v, seed=1)),
    "drop_connect p in evaluation": (
        0.5, float, lambda v: _linear("drop_connect_linear", p=v, training=False, activation="relu"),
    ),
    "drop_connect group_size": (
        2, int, lambda v: _linear("drop_connect_linear", mode="group", group_size=v, seed=1),
    ),
    "drop_connect samples": (
        4, int, lambda v: _linear("drop_connect_linear", training=False, activation="silu", samples=v, seed=1),
    ),
    "noisy_linear sigma": (0.5, float, lambda v: _linear("noisy_linear", sigma=v, seed=1)),
    "noisy_linear sigma multiplicative": (
        0.5, float, lambda v: _linear("noisy_linear", sigma=v, mode="multiplicative", seed=1),
    ),
    "noisy_linear bias_sigma": (0.5, float, lambda v: _linear("noisy_linear", bias_sigma=v, seed=1)),
    "seed": (7, int, lambda v: lambda x: F.dropout(x, 0.5, seed=v)),
    "sync_batch_norm eps": (
        0.5, float, lambda v: lambda x: sync_batch_norm.sync_batch_norm(x, None, None, training=True, eps=v),
    ),
}  # fmt: skip
NUMBERS = ("int64", "uint8", "float64", "float32", "float16", "tensor", "int tensor")
NO_NUMBERS = ("array", "array of one", "Fraction", "Decimal", "complex", "str", "list")


@pytest.mark.parametrize("kind", [*NUMBERS, *NO_NUMBERS])
@pytest.mark.parametrize("argument", OURS)
def test_numbers_of_functions_that_torch_has_not(argument, kind, path, device):
    value, expects, call = OURS[argument]
    x = X.to(device)
    number = KINDS[kind](value)
    whole = not isinstance(number, (float, np.floating)) and kind != "tensor"
    if (kind in NO_NUMBERS and not (kind == "array" and "shape" in argument)) or (
        expects is int and not whole
    ):
        with pytest.raises((TypeError, ValueError), match=r"number|int|float|not supported"):
            call(number)(x)
    elif argument == "seed" and kind == "int tensor":  # is one that stays on its device
        assert_close(call(number.to(device))(x), call(value)(x))
    elif expects is float and whole:  # 0.5 becomes 0
        found, expected = (_outcome(lambda v=v: call(v)(x)) for v in (number, 0))
        assert str(found) == str(expected)
    else:
        assert_close(call(number)(x), call(value)(x), rtol=1e-5, atol=1e-5)


def test_numpys_bool_is_no_int_and_no_seed():
    with pytest.raises(TypeError, match="seed has to be an int"):
        F.dropout(X, 0.5, seed=np.True_)
    with pytest.raises(TypeError, match="group_size has to be an int"):
        F.drop_connect_linear(X, WEIGHT, mode="group", group_size=np.True_)


def test_a_learned_deviation_keeps_its_gradient(path, device):
    sigma = torch.tensor(0.5, device=device, requires_grad=True)
    F.noisy_linear(X.to(device), WEIGHT.to(device), sigma=sigma).sum().backward()
    assert sigma.grad is not None
    with pytest.raises(TypeError, match="std has to be a number, but got Tensor"):
        F.gaussian_noise(X.to(device), sigma)


# --- layers ---------------------------------------------------------------------------------------------------

MADE = {  # layers as code makes them that computes sizes with numpy
    "GroupNorm": lambda layers: layers.GroupNorm(np.gcd(32, 6), 6, np.float32(1e-3)),
    "GroupNorm of a tensor": lambda layers: layers.GroupNorm(torch.tensor(2), 6, torch.tensor(1e-3)),
    "LayerNorm": lambda layers: layers.LayerNorm(np.int64(8), eps=np.float32(1e-3)),
    "LayerNorm of two": lambda layers: layers.LayerNorm([np.int32(6), np.int64(8)]),
    "BatchNorm1d": lambda layers: layers.BatchNorm1d(np.int64(6), np.float64(1e-3), np.float32(0.25)),
    "BatchNorm1d of tensors": lambda layers: layers.BatchNorm1d(6, torch.tensor(1e-3), torch.tensor(0.25)),
    "InstanceNorm1d": lambda layers: layers.InstanceNorm1d(6, np.float32(1e-3), np.float64(0.5), True, True),
    "LocalResponseNorm": lambda layers: layers.LocalResponseNorm(np.int64(3), np.float32(0.5)),
    "Dropout": lambda layers: layers.Dropout(np.float32(0)),
}


@pytest.mark.parametrize("name", MADE)
def test_layers_made_with_numbers_of_other_kinds(name, path, device):
    ours, theirs = (MADE[name](layers).to(device) for layers in (fnn, nn))
    assert repr(ours) == repr(theirs)
    x = X.to(device)
    for _ in range(2):
        assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_our_own_layers_with_numbers_of_numpy(compiled, path, device):
    """(torch's layers keep such numbers, which torch.compile takes for arrays.)"""
    for layer in (
        fnn.DropConnectLinear(8, 4, p=np.float32(0.5), mode="group", group_size=np.int64(2)),
        fnn.NoisyLinear(8, 4, sigma=np.float32(0.5)),
        fnn.GaussianNoise(np.float64(0.5)),
    ):
        layer = layer.to(device)
        if compiled:
            torch._dynamo.reset()
            layer = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert not layer(X.to(device)).equal(layer(X.to(device)))

"""Which tensors go to the kernels, and which to ATen."""

import pytest
import torch

import fastreg.functional as F
from fastreg.ops.backend import ATEN_BELOW

PLAIN = {
    "dropout": (F.dropout, ATEN_BELOW["dropout"]),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, training=True), ATEN_BELOW["dropout"]),
    "dropout2d": (lambda x: F.dropout2d(x.view(1, -1, 2, 2)), ATEN_BELOW["dropout"]),
    "drop_path": (F.drop_path, ATEN_BELOW["dropout"]),
    "gaussian_noise": (F.gaussian_noise, ATEN_BELOW["noise"]),
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[1:]), ATEN_BELOW["layer_norm"]),
    "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), ATEN_BELOW["channel_norm"]),
    "group_norm": (lambda x: F.group_norm(x, 4), ATEN_BELOW["channel_norm"]),
    "instance_norm": (lambda x: F.instance_norm(x.view(4, 4, -1)), ATEN_BELOW["channel_norm"]),
}
MORE = {
    "dropout": lambda x: F.dropout(x, activation="relu"),
    "dropout, seed": lambda x: F.dropout(x, seed=1),
    "noise, seed": lambda x: F.gaussian_noise(x, seed=1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:], residual=x),
    "layer_norm, fp32 parameters": lambda x: F.layer_norm(x.half(), x.shape[1:], torch.ones_like(x[0])),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True, activation="relu"),
    "group_norm, fp32 parameters": lambda x: F.group_norm(
        x.half(), 4, torch.ones_like(x[0]), torch.ones_like(x[0])
    ),
    "local_response_norm": lambda x: F.local_response_norm(x.view(4, 4, -1), 3),  # has no kernel in ATen
}


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize("name", PLAIN)
def test_small_plain_tensors_go_to_aten(gpu, name):
    call, least = PLAIN[name]
    call(torch.ones(least // 64 - 4, 64, device="cuda"))
    assert gpu.launches == []
    call(torch.ones(least // 64, 64, device="cuda"))
    assert gpu.launches


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize("name", MORE)
def test_what_aten_has_not_goes_to_the_kernels_at_any_size(gpu, name):
    MORE[name](torch.ones(4, 64, device="cuda"))
    assert gpu.launches


@pytest.mark.parametrize("name", PLAIN)
def test_tests_have_the_kernels_at_any_size(gpu, name):
    PLAIN[name][0](torch.ones(4, 64, device="cuda"))
    assert gpu.launches

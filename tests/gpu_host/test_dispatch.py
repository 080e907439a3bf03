"""Which tensors go to the kernels, and which to ATen."""

import pytest
import torch

import fastreg.functional as F
from fastreg.ops import dropout
from fastreg.ops.norms import channel_norm, layer_norm

PLAIN = {
    "dropout": (F.dropout, dropout.ATEN_BELOW),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, training=True), dropout.ATEN_BELOW),
    "dropout2d": (lambda x: F.dropout2d(x.view(1, -1, 2, 2)), dropout.ATEN_BELOW),
    "drop_path": (F.drop_path, dropout.ATEN_BELOW),
    "gaussian_noise": (F.gaussian_noise, dropout.ATEN_BELOW),
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[1:]), layer_norm.ATEN_BELOW),
    "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), channel_norm.ATEN_BELOW),
    "group_norm": (lambda x: F.group_norm(x, 4), channel_norm.ATEN_BELOW),
    "instance_norm": (lambda x: F.instance_norm(x.view(4, 4, -1)), channel_norm.ATEN_BELOW),
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

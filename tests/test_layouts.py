"""Inputs that are not strided go where they go on the CPU: to ATen, which refuses most of them in its own words."""

import pytest
import torch
from torch.testing import assert_close

import fastreg.functional as F
import fastreg.nn as fnn
from fastreg.ops import backend

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")

LAYERS = {
    "BatchNorm1d": lambda: fnn.BatchNorm1d(8),
    "SyncBatchNorm": lambda: fnn.SyncBatchNorm(8),
    "InstanceNorm1d": lambda: fnn.InstanceNorm1d(8),
    "GroupNorm": lambda: fnn.GroupNorm(2, 8),
    "LayerNorm": lambda: fnn.LayerNorm(8),
    "LocalResponseNorm": lambda: fnn.LocalResponseNorm(3),
    "Dropout": fnn.Dropout,
    "Dropout1d": fnn.Dropout1d,
    "AlphaDropout": fnn.AlphaDropout,
    "DropPath": fnn.DropPath,
    "DropoutAddLayerNorm": lambda: _with_residual(fnn.DropoutAddLayerNorm(8)),
    "GaussianNoise": fnn.GaussianNoise,
    "NoisyLinear": lambda: fnn.NoisyLinear(8, 4),
    "DropConnectLinear": lambda: fnn.DropConnectLinear(8, 4),
    "DropConnectConv2d": lambda: fnn.DropConnectConv2d(8, 4, 1),
}
LAYOUTS = {"coo": torch.Tensor.to_sparse, "csr": torch.Tensor.to_sparse_csr, "mkldnn": torch.Tensor.to_mkldnn}


def _with_residual(layer):
    return lambda x: layer(x, x)


def _outcome(layer, x):
    """The result, or the error's type and words."""
    torch.manual_seed(0)
    try:
        return layer()(x)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_inputs_that_are_not_strided_go_to_aten(name, layout, monkeypatch):
    if layout == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("needs mkldnn")
    images = layout == "coo" and name in ("LocalResponseNorm", "DropConnectConv2d")
    x = torch.randn(4, 8, 3, 3) if images else torch.randn(4, 8)
    x = LAYOUTS[layout](x)
    found = _outcome(LAYERS[name], x)
    monkeypatch.setattr(backend, "runs_kernels", lambda x: False)
    expected = _outcome(LAYERS[name], x)
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.layout == expected.layout
        assert_close(found.to_dense(), expected.to_dense())
    else:
        assert found == expected


def test_other_tensors_that_are_not_strided_go_to_aten(monkeypatch):
    x = torch.randn(4, 8)
    calls = {
        "layer_norm": lambda: F.layer_norm(x, (8,), torch.rand(8).to_sparse()),
        "group_norm": lambda: F.group_norm(x, 2, torch.rand(8).to_sparse()),
        "batch_norm": lambda: F.batch_norm(x, None, None, torch.rand(8).to_sparse(), training=True),
        "dropout bias": lambda: F.dropout(x, bias=torch.rand(8).to_sparse()),
        "dropout residual": lambda: F.dropout(x, residual=torch.rand(4, 8).to_sparse()),
        "drop_connect": lambda: F.drop_connect_linear(x, torch.rand(4, 8).to_sparse(), None),
        "noisy": lambda: F.noisy_linear(x, torch.rand(4, 8).to_sparse(), None),
    }
    found = {name: _outcome(lambda call=call: lambda _: call(), None) for name, call in calls.items()}
    monkeypatch.setattr(backend, "runs_kernels", lambda x: False)
    for name, call in calls.items():
        expected = _outcome(lambda call=call: lambda _: call(), None)
        if isinstance(expected, torch.Tensor):
            assert isinstance(found[name], torch.Tensor), (name, found[name], expected)
        else:
            assert found[name] == expected, name

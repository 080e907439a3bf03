"""GPUs below compute capability 8.0 take ATen, in eager calls and when compiled."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastreg.functional as F
from fastreg import optim
from fastreg.ops import backend

N = 512
CALLS = {
    "dropout": lambda x: F.dropout(x, 0.5, activation="gelu"),
    "noise": lambda x: F.gaussian_noise(x),
    "layer_norm": lambda x: F.layer_norm(x, (N,), activation="relu"),
    "dropout_add_layer_norm": lambda x: F.dropout_add_layer_norm(x, x, (N,)),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True, activation="relu"),
    "group_norm": lambda x: F.group_norm(x, 4, activation="relu"),
    "local_response_norm": lambda x: F.local_response_norm(x.unsqueeze(2), 5),
    "drop_connect": lambda x: F.drop_connect_linear(x[:8], x),
    "flipout": lambda x: F.drop_connect_linear(x, x, mode="flipout"),
    "expectation": lambda x: F.drop_connect_linear(x[:2], x, training=False, activation="tanh"),
    "noisy_linear": lambda x: F.noisy_linear(x, x),
}


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 0)])
@pytest.mark.parametrize("name", CALLS)
def test_eager_calls_ask_the_capability(gpu, name, capability):
    gpu.capability = capability
    CALLS[name](torch.ones(N, N, device="cuda"))
    assert bool(gpu.launches) == (capability >= (8, 0))


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_optimizers_ask_the_capability(gpu, capability):
    gpu.capability = capability
    p = torch.ones(N, N, device="cuda", requires_grad=True)
    p.grad = torch.ones_like(p)
    optim.SGD([p], lr=0.1).step()
    assert bool(gpu.launches) == (capability >= (8, 0))


# Without CUDA a tensor that is only traced cannot be indexed, as in ATen's form of the last two; the operator of
# DropConnect is there for all devices, and asks when it runs.
TRACED = [name for name in CALLS if name not in ("drop_connect", "expectation", "noisy_linear")]


def operators(call) -> set[str]:
    """Ours, in the graph that is traced for a CUDA tensor."""
    found = []

    def collect(module, inputs):
        found.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.compile(call, backend=collect, fullgraph=True)(torch.empty(N, N, device="cuda:0"))
    return {target for target in found if target.startswith("fastreg")}


@pytest.mark.parametrize("name", TRACED)
def test_compiled_calls_ask_the_capability(monkeypatch, name):
    monkeypatch.setattr(backend, "_capability", lambda index: (7, 5))
    assert operators(CALLS[name]) == set()


def test_a_gpu_that_is_not_there_may_be_compiled_for(recwarn):
    backend._capability.cache_clear()
    assert operators(CALLS["dropout"])
    assert not [one for one in recwarn if "Dynamo" in str(one.message)]

"""Masks under torch.compile: each element has its own, and the backward pass has those of the forward pass.

torch's dropout fails both: pytorch#190717 with an activation memory budget, pytorch#198333 on a GPU.
"""

import contextlib

import pytest
import torch
from torch._functorch import config
from torch.utils.checkpoint import checkpoint

import fastreg.functional as F
import fastreg.nn as fnn

LAYERS = {
    "Dropout": lambda: fnn.Dropout(0.2),
    "DropPath": lambda: fnn.DropPath(0.5),
    "DropConnectLinear": lambda: fnn.DropConnectLinear(8, 8, bias=False),
    "DropConnectLinear of the batch": lambda: fnn.DropConnectLinear(8, 8, bias=False, mode="batch"),
    "NoisyLinear": lambda: fnn.NoisyLinear(8, 8, bias=False),
}
TORCHS = pytest.param(
    lambda: torch.nn.Dropout(0.2),
    id="torch.nn.Dropout",
    marks=pytest.mark.xfail(strict=True, reason="pytorch#190717"),
)


# Two ways to ask for a graph that saves less and computes more.
BUDGETS = [pytest.param(budget, contextlib.nullcontext, id=f"{budget} of all") for budget in (0.5, 0.0)]
if hasattr(torch.autograd.graph, "region_activation_memory_budget"):  # since torch 2.13
    region = torch.autograd.graph.region_activation_memory_budget
    BUDGETS += [pytest.param(1.0, lambda: region(0.0), id="0.0 of a region")]


@pytest.mark.parametrize(("budget", "around"), BUDGETS)
@pytest.mark.parametrize("make", [pytest.param(LAYERS["Dropout"], id="Dropout"), TORCHS])
def test_what_is_computed_again_is_drawn_as_before(make, budget, around, device, path):
    """For a linear function f, the gradient of the sum over f(x), times x, is that sum."""
    torch._dynamo.reset()
    layer = make().to(device)
    x = torch.rand(6, 5, 8, device=device, requires_grad=True)

    def network(x):
        with around():
            for _ in range(2):
                x = layer(x * torch.exp(0 * x.detach()))
            return x

    with config.patch(activation_memory_budget=budget):
        y = torch.compile(network, backend="aot_eager_decomp_partition")(x)
        y.sum().backward()
    torch.testing.assert_close((x.grad * x).sum(), y.sum(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.equal(y, torch.compile(network, backend="aot_eager")(x))  # each call draws anew


@pytest.mark.parametrize("name", LAYERS)
def test_all_layers_draw_as_before(name, device, path):
    test_what_is_computed_again_is_drawn_as_before(LAYERS[name], 0.0, contextlib.nullcontext, device, path)


@pytest.mark.parametrize("name", LAYERS)
def test_without_gradients_nothing_is_kept_for_later(name, device, path):
    torch._dynamo.reset()
    x = torch.rand(6, 5, 8, device=device)
    with config.patch(activation_memory_budget=0.5), torch.no_grad():
        compiled = torch.compile(LAYERS[name]().to(device), backend="aot_eager")
        assert not torch.equal(compiled(x), compiled(x))


def test_without_a_budget_the_seed_is_saved(device):
    """One number is cheaper to keep than to draw once more, with the state of a generator."""
    torch._dynamo.reset()
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.rand(6, 8, device=device, requires_grad=True)
    torch.compile(lambda x: F.dropout(x, 0.5), backend=look)(x)
    assert "checkpoint" not in graphs[0].code


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "dropout",
    [
        pytest.param(F.dropout, id="fastreg"),
        pytest.param(
            torch.nn.functional.dropout,
            id="torch",
            marks=pytest.mark.xfail(strict=False, reason="pytorch#198333, in torch 2.13 and 2.14"),
        ),
    ],
)
def test_behind_a_transposition_each_channel_has_its_own_mask(dropout, checkpointed):
    torch._dynamo.reset()
    x = torch.ones(8, 64, 4096, device="cuda", requires_grad=True)

    def block(x):
        return dropout(x.transpose(1, 2).contiguous(), 0.5, True)

    def network(x):
        return checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)

    y = torch.compile(network)(x)
    y.sum().backward()
    kept = (y != 0).transpose(1, 2)
    assert torch.equal(kept, x.grad != 0)
    assert abs(kept.double().mean().item() - 0.5) < 6 * 0.5 / kept.numel() ** 0.5
    same = (kept[:, 1:] == kept[:, :-1]).double().mean((0, 2))  # of one channel and the next
    assert (same - 0.5).abs().max() < 6 * 0.5 / (8 * 4096) ** 0.5

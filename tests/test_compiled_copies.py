"""What Inductor generates for our operations: calls of their operators, and no kernel of its own around them."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import fastreg.functional as F
from fastreg.ops import backend

pytestmark = pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")

SHAPE = 5, 8, 3, 4

OPERATIONS = {
    "dropout": lambda x, r, w: F.dropout(x, 0.3),
    "bias_gelu_dropout": lambda x, r, w: F.dropout(x, 0.3, bias=w, activation="gelu"),
    "layer_norm": lambda x, r, w: F.layer_norm(x, (4,), w, w),
    "layer_norm_gelu": lambda x, r, w: F.layer_norm(x, (4,), activation="gelu"),
    "seam": lambda x, r, w: F.dropout_add_layer_norm(x, r, (4,), p=0.3),
    "local_response_norm": lambda x, r, w: F.local_response_norm(x, 3),
    "gaussian_noise": lambda x, r, w: F.gaussian_noise(x, 0.3, mode="multiplicative"),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_graph_copies_nothing(name, channels_last, device):
    """Twice, as in a network: of equal calls in a graph, the compiler makes one where it can."""
    if channels_last and name in ("layer_norm", "layer_norm_gelu", "seam"):
        pytest.skip("what is normalized has to lie together")
    torch._dynamo.reset()
    operation = OPERATIONS[name]
    x, r = (torch.randn(SHAPE, device=device, dtype=torch.float32) for _ in range(2))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x, w = x.requires_grad_(), torch.randn(4, device=device, dtype=torch.float32)

    @torch.compile(fullgraph=True)
    def network(x, r, w):
        return operation(operation(x, r, w), r, w)

    def step():
        y = network(x, r, w)
        torch.autograd.grad(y, x, torch.ones_like(y))

    _, codes = run_and_get_code(step)
    torch._dynamo.reset()
    assert len(codes) == 2  # forward and backward
    for code in codes:
        assert code.count("torch.ops.fastreg.") >= 2
        assert "_fused_" not in code

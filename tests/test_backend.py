"""Which of torch's settings and modes decide where an operation runs, and how."""

import pytest
import torch

import fastreg.nn as fnn
from fastreg.ops import backend


def _set(owner, value):
    return lambda: setattr(owner, "fp32_precision", value)


SWITCHES = {  # what is set, and whether fp32 products may then take TF32
    "none": ((), False),
    "matmul precision high": ((lambda: torch.set_float32_matmul_precision("high"),), True),
    "matmul precision medium": ((lambda: torch.set_float32_matmul_precision("medium"),), True),
    "allow_tf32": ((lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),), True),
    "of products": ((_set(torch.backends.cuda.matmul, "tf32"),), True),
    "of products, ieee": ((_set(torch.backends.cuda.matmul, "ieee"),), False),
    "of everything": ((_set(torch.backends, "tf32"),), True),
    "of everything, ieee": ((_set(torch.backends, "ieee"),), False),
    "of everything but products": (
        (_set(torch.backends, "tf32"), _set(torch.backends.cuda.matmul, "ieee")),
        False,
    ),
    "of convolutions": ((_set(torch.backends.cudnn.conv, "tf32"),), False),
}


@pytest.fixture
def switches():
    """Puts back what a test sets, which importing torch.testing._internal forbids for all that come after."""
    owners = (torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.cudnn.conv)
    before = [owner.fp32_precision for owner in owners]
    with torch.backends.__allow_nonbracketed_mutation():
        yield
        torch.set_float32_matmul_precision("highest")
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_for_tf32_is_read(name, switches, device):
    """Reading ``allow_tf32`` raises where one of the newer switches was used."""
    settings, allowed = SWITCHES[name]
    for setting in settings:
        setting()
    assert backend.allows_tf32() == allowed
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 8, device=device, dtype=dtype)
        for layer in (
            fnn.DropConnectLinear(8, 4, device=device, dtype=dtype),
            fnn.DropConnectLinear(8, 4, mode="gaussian", device=device, dtype=dtype),
            fnn.NoisyLinear(8, 4, mode="factorised", device=device, dtype=dtype),
        ):
            layer(x).sum().backward()

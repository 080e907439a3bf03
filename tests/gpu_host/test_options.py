"""Options that every launch is compiled with, whatever the version of Triton takes for granted."""

import pytest
import torch
import triton
from torch import nn

import fastreg.functional as F
from fastreg import ExponentialMovingAverage, optim, penalties


@pytest.fixture
def unfused(monkeypatch):
    """Triton as from 3.10 on, where a product and a sum are one instruction only if that is said."""
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)


def work(x, w, model, optimizer, average):
    y = F.layer_norm(F.dropout(x, activation="gelu"), x.shape[-1:], w)
    F.batch_norm(y[..., None], None, None, training=True).sum().backward()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    penalties.l2(model.parameters(), 0.1).backward()
    optimizer.step()
    average.update()


def test_products_and_sums_are_fused(gpu, unfused):
    x, w = torch.ones(512, 512, device="cuda", requires_grad=True), torch.ones(512, device="cuda")
    model = nn.Linear(64, 64, device="cuda")
    optimizer, average = (
        optim.AdamW(model.parameters(), capturable=True),
        ExponentialMovingAverage(model, 0.9),
    )
    with torch.cuda.stream(torch.cuda.Stream()):
        work(x, w, model, optimizer, average)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # here the seed of dropout is in memory: another kernel
        work(x, w, model, optimizer, average)
    assert len(set(gpu.names())) >= 6
    assert {one.name for one in gpu.launches if not one.options["enable_fp_fusion"]} == set()


def test_inspection_compiles_what_is_launched(unfused):
    from fastreg.bench import averages
    from fastreg.bench.sass import compile_for

    kernel = next(iter(averages.kernels()))
    assert "FFMA" in compile_for(kernel, 90).sass

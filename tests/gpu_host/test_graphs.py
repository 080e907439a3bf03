"""What has been warmed up can be recorded: nothing is loaded, nothing waits, and a replay launches the same again."""

import pytest
import torch

import fastreg.functional as F
from fastreg import ExponentialMovingAverage, penalties
from fastreg import nn as fnn

CHANNELS = 64


def images(**more):
    return torch.randn(8, CHANNELS, 16, 16, device="cuda", **more).requires_grad_()


def layer(make, x=images):
    def build():
        module, input = make().cuda(), x()
        return lambda: module(input).sum().backward()

    return build


def fused(name, **options):
    def build():
        x, residual = images(), images()
        return lambda: getattr(F, name)(x, residual=residual, activation="relu", **options).sum().backward()

    return build


def penalty():
    parameters = [torch.randn(100, 30, device="cuda", requires_grad=True) for _ in range(3)]
    return lambda: penalties.elastic_net(parameters, 1e-3, 1e-3).backward()


def projection():
    parameters = [torch.randn(100, 30, device="cuda", requires_grad=True) for _ in range(3)]
    return lambda: penalties.max_norm_(parameters, 1.0)


def average():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).cuda()
    kept = ExponentialMovingAverage(model, 0.9)
    return lambda: kept.update()


WORK = {
    "batch_norm": layer(lambda: fnn.BatchNorm2d(CHANNELS)),
    "batch_norm, average of all": layer(lambda: fnn.BatchNorm2d(CHANNELS, momentum=None)),
    "batch_norm, channels last": layer(
        lambda: fnn.BatchNorm2d(CHANNELS),
        lambda: images().detach().to(memory_format=torch.channels_last).requires_grad_(),
    ),
    "batch_norm, large": layer(
        lambda: fnn.BatchNorm1d(4), lambda: torch.randn(1 << 18, 4, device="cuda", requires_grad=True)
    ),
    "group_norm": layer(lambda: fnn.GroupNorm(8, CHANNELS)),
    "group_norm, fused": fused("group_norm", num_groups=4),
    "instance_norm": layer(lambda: fnn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True)),
    "local_response_norm": layer(lambda: fnn.LocalResponseNorm(5)),
    "layer_norm": layer(
        lambda: fnn.LayerNorm(512), lambda: torch.randn(1024, 512, device="cuda", requires_grad=True)
    ),
    "layer_norm, long": layer(
        lambda: fnn.LayerNorm(40000), lambda: torch.randn(16, 40000, device="cuda", requires_grad=True)
    ),
    "penalty": penalty,
    "projection": projection,
    "average": average,
}


@pytest.mark.parametrize("name", WORK)
def test_a_warm_up_is_enough_for_a_graph(gpu, name):
    work = WORK[name]()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    gpu.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    assert gpu.compiled == gpu.races == []
    recorded = gpu.names()
    assert recorded
    gpu.forget()
    graph.replay()
    assert gpu.names() == recorded

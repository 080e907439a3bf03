"""Pairs of our optimizers and torch's, with every buffer, and steps of both."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fastreg import optim

# Configurations with every buffer, by class: (ours, torch's, arguments). The decay is large, so that a wrong kind of
# it shows.
CONFIGURATIONS = {
    "sgd": (optim.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    "momentum": (
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.3},
    ),
    "nesterov": (
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ),
    "adam": (optim.Adam, torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.3, "amsgrad": True}),
    "adamw": (optim.AdamW, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.3}),
    "amsgrad": (
        optim.AdamW,
        torch.optim.AdamW,
        {"lr": 0.05, "weight_decay": 0.3, "amsgrad": True, "betas": (0.8, 0.9)},
    ),
}
configurations = pytest.mark.parametrize("configuration", CONFIGURATIONS)
some = pytest.mark.parametrize("configuration", ["momentum", "adamw"])  # where more would say the same

# A few steps in fp32: roundings of 6e-8 each, magnified by Adam's quotient of two moments.
STEPS = {"rtol": 1e-5, "atol": 1e-6}
SAME = {"rtol": 0, "atol": 0}


def make(configuration: str, parameters, ours: bool = True, **more):
    cls, theirs, arguments = CONFIGURATIONS[configuration]
    arguments = {**arguments, **more}
    return cls(parameters, **arguments) if ours else theirs(parameters, foreach=False, **arguments)


def parameters_of(device, dtype=torch.float32, shapes=((5, 3), (7,), ())) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def gradient_of(p: Tensor, step: int, place: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + place)
    return torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def step(optimizer, i: int, absent=()) -> None:
    """Step ``i`` with that step's gradients, but for the parameters in ``absent``."""
    place = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None if place in absent else gradient_of(p, i, place)
            place += 1
    optimizer.step()


def flat(optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def compare(ours, theirs, tolerance=STEPS) -> None:
    for i, (p, q) in enumerate(zip(flat(ours), flat(theirs), strict=True)):
        assert_close(p, q, msg=f"parameter {i}: {{}}".format, **tolerance)
        for key, value in theirs.state.get(q, {}).items():
            if value is None:
                continue
            assert_close(ours.state[p][key].cpu(), value.cpu(), msg=f"{key} of {i}: {{}}".format, **tolerance)


def pair(configuration, device, ours=None, theirs=None, **more):
    ours = parameters_of(device) if ours is None else ours
    theirs = [nn.Parameter(p.detach().clone()) for p in ours] if theirs is None else theirs
    return make(configuration, ours, **more), make(configuration, theirs, ours=False, **more)


def copies_of(parameters) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in parameters]

"""Inputs of PyTorch's own optimizer tests (``optim_db``), and models that are stepped."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.testing._internal.common_optimizers import optim_db

from fastreg import optim


class DecayedSGD(torch.optim.SGD):
    """SGD with decoupled decay, as AdamW decays: p <- (1 - lr wd) p, then torch's SGD without decay."""

    def step(self, closure=None):
        kept = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.detach().mul_(1 - float(group["lr"]) * group["weight_decay"])
            group["weight_decay"] = 0
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, kept, strict=True):
                group["weight_decay"] = decay


INFOS = {
    info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in ("SGD", "Adam", "AdamW")
}
INFOS["SGDW"] = INFOS["SGD"]
CLASSES = {
    "SGD": (optim.SGD, torch.optim.SGD),
    "SGDW": (optim.SGDW, DecayedSGD),
    "Adam": (optim.Adam, torch.optim.Adam),
    "AdamW": (optim.AdamW, torch.optim.AdamW),
}


def inputs_of(name: str, dtype: torch.dtype) -> dict:
    """What torch tries the class with, by description; without what needs a GPU to be asked for."""
    return {found.desc: found.kwargs for found in INFOS[name].optim_inputs_func("cpu", dtype)}


def each(names=tuple(CLASSES), dtype=torch.float32):
    """Each input of each class, in fp32, as the arguments ``name, kwargs``."""
    found = [(name, desc, kwargs) for name in names for desc, kwargs in inputs_of(name, dtype).items()]
    return pytest.mark.parametrize(
        ("name", "kwargs"), [pytest.param(n, k, id=f"{n}-{d}".replace(" ", "_")) for n, d, k in found]
    )


names = pytest.mark.parametrize("name", CLASSES)


def make(name: str, parameters, kwargs=None, ours: bool = True, **more):
    cls = CLASSES[name][0 if ours else 1]
    kwargs = copy.deepcopy({**(kwargs or {}), **more})  # a tensor lr of their own
    kwargs.setdefault("lr", 1e-3)
    return cls(parameters, **kwargs if ours else {"foreach": False, **kwargs})


class Model(nn.Module):
    """As torch's: small layers and a parameter without dimensions."""

    def __init__(self, dtype, device, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
        self.scale = nn.Parameter(torch.tensor(1.5))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.7)
        self.to(device, dtype)

    def forward(self, x):
        return self.layers(x) * self.scale


def batch(dtype, device):
    return torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype, device=device).reshape(3, 2)


def walk(model: Model, optimizer, i: int, dtype, device) -> None:
    """Step ``i`` of seven: the third without a backward pass, the fourth and fifth with a frozen layer."""
    if i == 3:
        model.layers[2].requires_grad_(False)
    if i == 5:
        model.layers[2].requires_grad_(True)
    optimizer.zero_grad()
    if i != 2:
        model(batch(dtype, device)).sum().backward()
    optimizer.step()


def tensors_of(optimizer) -> dict:
    """Parameters and state by their place."""
    found = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(parameters):
        found[i, "parameter"] = p
        found |= {
            (i, key): value for key, value in optimizer.state.get(p, {}).items() if torch.is_tensor(value)
        }
    return found


def compare(ours, theirs, tolerance, resynchronize: bool = False) -> None:
    found, expected = tensors_of(ours), tensors_of(theirs)
    for place, value in expected.items():
        assert place in found, f"no {place}"
        assert found[place].dtype == value.dtype, place
        assert found[place].shape == value.shape, place
        assert_close(found[place].to(value.device), value, msg=f"{place}: {{}}".format, **tolerance)
        if resynchronize:
            with torch.no_grad():
                value.copy_(found[place])


# --- state dictionaries, copies, pickles ------------------------------------------------------------------


def stepped(name, kwargs, device, ours=True, steps=2, dtype=torch.float32, named=False):
    model = Model(dtype, device)
    parameters = model.named_parameters() if named else model.parameters()
    optimizer = make(name, parameters, kwargs, ours=ours)
    for i in range(steps):
        walk(model, optimizer, i, dtype, device)
    return model, optimizer

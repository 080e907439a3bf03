"""What ``help`` shows: torch's own parameters in torch's order, then ours by keyword, each of them documented."""

import inspect
import re

import pytest
import torch

import fastreg.functional as F
import fastreg.nn as fnn
import fastreg.optim

PUBLIC = {
    **{f"nn.{name}": getattr(fnn, name) for name in fnn.__all__},
    **{f"functional.{name}": getattr(F, name) for name in F.__all__},
    **{f"optim.{name}": getattr(fastreg.optim, name) for name in fastreg.optim.__all__},
}
THEIRS = {"nn": torch.nn, "functional": torch.nn.functional, "optim": torch.optim}


def parameters(function) -> dict[str, inspect.Parameter]:
    found = inspect.signature(function.__init__ if inspect.isclass(function) else function).parameters
    return {name: parameter for name, parameter in found.items() if name != "self"}


def documentation(function) -> str:
    """Its own, and of what it says its arguments are as in."""
    text = function.__doc__
    for name in re.findall(r":(?:class|func):`(?:fastreg\.\w+\.)?(\w+)`", text):
        for module in (fnn, F, fastreg.optim):
            other = getattr(module, name, None)
            if other is not None and other is not function:
                text += other.__doc__
    return text


@pytest.mark.parametrize("name", PUBLIC)
def test_no_parameter_hides(name):
    hidden = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = parameters(PUBLIC[name])
    assert [p for p in found.values() if p.kind in hidden] == []
    text = documentation(PUBLIC[name])
    assert [p for p in found if not re.search(rf"\b{p}\b", text)] == []


def test_every_parameter_has_a_type():
    found = {(name, p.name): p for name, function in PUBLIC.items() for p in parameters(function).values()}
    assert [key for key, parameter in found.items() if parameter.annotation is parameter.empty] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_torchs_parameters_come_first(name):
    module, own = name.split(".")
    counterpart = getattr(THEIRS[module], own, None)
    if counterpart is None:
        pytest.skip("torch has none")
    ours, theirs = parameters(PUBLIC[name]), parameters(counterpart)
    theirs = {
        key: parameter for key, parameter in theirs.items() if parameter.kind is not parameter.VAR_KEYWORD
    }
    shared = [key for key in ours if key in theirs]
    assert shared == list(theirs)
    for key in shared:
        assert ours[key].kind == theirs[key].kind, key
        assert ours[key].default == theirs[key].default, key
    added = [parameter for key, parameter in ours.items() if key not in theirs]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in added)

"""What ``help`` shows: torch's own parameters in torch's order, then ours by keyword, each of them documented."""

import inspect
import re

import pytest
import torch

import fastreg.averages
import fastreg.functional as F
import fastreg.nn as fnn
import fastreg.optim
import fastreg.penalties
import fastreg.random
from fastreg.optim.options import OPTIONS

pytestmark = pytest.mark.smoke

PUBLIC = {
    **{f"nn.{name}": getattr(fnn, name) for name in fnn.__all__},
    **{f"functional.{name}": getattr(F, name) for name in F.__all__ if name != "ACTIVATIONS"},
    **{f"optim.{name}": getattr(fastreg.optim, name) for name in fastreg.optim.__all__},
}
THEIRS = {"nn": torch.nn, "functional": torch.nn.functional, "optim": torch.optim}


def parameters(function) -> dict[str, inspect.Parameter]:
    made = inspect.isclass(function) and not issubclass(function, tuple)
    found = inspect.signature(function.__init__ if made else function).parameters
    return {name: parameter for name, parameter in found.items() if name != "self"}


def documentation(function, seen=()) -> str:
    """Its own, and of what it says its arguments are as in."""
    text = function.__doc__
    for name in re.findall(r":(?:class|func):`(?:fastreg\.\w+\.)?(\w+)`", text):
        for module in (fnn, F, fastreg.optim):
            other = getattr(module, name, None)
            if other is not None and other not in (function, *seen):
                text += documentation(other, (function, *seen))
    return text


def all_functions():
    """All that is public, and the public methods of its classes."""
    modules = (fastreg, fnn, F, fastreg.optim, fastreg.penalties, fastreg.averages, fastreg.random)
    for module in modules:
        for name in getattr(module, "__all__", vars(module)):
            found = getattr(module, name)
            if name.startswith("_") or not callable(found):
                continue
            if not found.__module__.startswith("fastreg"):
                continue
            yield found
            if inspect.isclass(found):
                yield from (f for key, f in vars(found).items() if key[0] != "_" and inspect.isfunction(f))


def test_no_option_hides():
    hidden = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    functions = set(all_functions())
    assert len(functions) > 80
    assert [f for f in functions if any(p.kind in hidden for p in parameters(f).values())] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_documentation_is_whole_and_public(name):
    found = parameters(PUBLIC[name])
    assert "fastreg.ops" not in PUBLIC[name].__doc__
    text = documentation(PUBLIC[name])
    assert [p for p in found if not re.search(rf"\b{p}\b", text)] == []


WITH_P = [name for name in PUBLIC if "p" in parameters(PUBLIC[name])]
OF_DROPOUT = ("input", "p", "training", "inplace")
TORCHS = {  # torch's layers that have no p
    fnn.DropConnectLinear: torch.nn.Linear,
    fnn.DropConnectConv2d: torch.nn.Conv2d,
    fnn.DropoutAddLayerNorm: torch.nn.LayerNorm,
}


@pytest.mark.parametrize("name", WITH_P)
def test_p_is_behind_torchs_parameters(name):
    """It comes first in dropout, as in torch, and else behind the rest: device and dtype are keywords then."""
    function = PUBLIC[name]
    found = parameters(function)
    positional = [key for key, parameter in found.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    if function in TORCHS:
        torchs = [key for key in parameters(TORCHS[function]) if key not in ("device", "dtype")]
        assert positional == [*torchs, "p"]
    elif inspect.isclass(function):
        assert positional == ["p", "inplace"]
    else:
        assert tuple(positional) == OF_DROPOUT or positional[-2:] == ["p", "training"]


@pytest.mark.parametrize("name", fastreg.optim.__all__)
def test_optimizers_have_the_same_options(name):
    """Typed as the options of any other, with the defaults that groups have."""
    found, of_adam = parameters(getattr(fastreg.optim, name)), parameters(fastreg.optim.Adam)
    for key, default in OPTIONS.items():
        assert repr(found[key].default) == repr(default)
        assert found[key] == of_adam[key]
    assert list(found)[-len(OPTIONS) :] == list(OPTIONS)


def takes(function, name: str) -> bool:
    return name in parameters(function.forward if inspect.isclass(function) else function)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.startswith(("nn.", "functional."))])
def test_a_residual_is_the_same_everywhere(name):
    function = PUBLIC[name]
    if takes(function, "residual"):
        text = " ".join(documentation(function).split())
        assert (
            "residual: added to what the operation itself gives: after the dropout, or before the activation"
            in text
        )
        assert not takes(function, "skip")


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

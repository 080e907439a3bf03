"""State dictionaries, copies and pickles of the optimizers, beside torch's."""

import copy
import io
import pickle

import pytest
import torch
from optim_inputs import CLASSES, INFOS, Model, batch, compare, each, make, names, stepped, walk
from torch import nn
from torch.testing import assert_close

from fastreg import optim


def assert_continue_alike(first, second, device, steps=(4, 5, 6)):
    """Two models with their optimizers take the same steps from here on."""
    for i in steps:
        for model, optimizer in (first, second):
            walk(model, optimizer, i, torch.float32, device)
    compare(first[1], second[1], {"rtol": 0, "atol": 0})


@each()
def test_state_dict_is_deterministic_and_loads(name, kwargs, path, device):
    """Torch's test_state_dict_deterministic."""
    model, optimizer = stepped(name, kwargs, device)
    clone = Model(torch.float32, device)
    clone.load_state_dict(model.state_dict())
    second = make(name, clone.parameters(), kwargs)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_continue_alike((model, optimizer), (clone, second), device)
    assert_same_dictionaries(optimizer.state_dict(), second.state_dict())


def assert_same_dictionaries(found, expected):
    assert_close(found["state"], expected["state"], rtol=0, atol=0)
    for group, other in zip(found["param_groups"], expected["param_groups"], strict=True):
        assert group.keys() == other.keys()
        for key in group:
            assert torch.as_tensor(group[key] == other[key]).all(), key


@each()
def test_older_state_dictionaries_load(name, kwargs, aten, device):
    """Torch's test_can_load_older_state_dict: without the flags that came later, and without ours."""
    model, optimizer = stepped(name, kwargs, device)
    old = copy.deepcopy(optimizer.state_dict())
    known = set(make(name, Model(torch.float32, device).parameters(), kwargs, ours=False).param_groups[0])
    for group in old["param_groups"]:
        for key in set(group):
            if key in INFOS[name].not_og_supported_flags or key not in known:
                del group[key]
    assert "lr" in old["param_groups"][0]
    optimizer.load_state_dict(old)
    model(batch(torch.float32, device)).sum().backward()
    optimizer.step()
    assert make(name, model.parameters(), kwargs).param_groups[0].keys() == optimizer.param_groups[0].keys()


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_steps_that_are_numbers_load(name, path, device):
    """Torch's test_load_nontensor_step: the state of old versions."""
    first, second = (stepped(name, {}, device) for _ in range(2))
    old = copy.deepcopy(second[1].state_dict())
    for state in old["state"].values():
        state["step"] = state["step"].item()
    second[1].load_state_dict(old)
    assert_continue_alike(first, second, device)


@names
def test_named_parameters(name, path, device):
    """Torch's test_can_load_from_to_named_state_dict: each of the two loads the other."""
    kwargs = {"weight_decay": 0.1}
    for named, target in ((True, False), (False, True), (True, True)):
        model, optimizer = stepped(name, kwargs, device, named=named)
        clone = Model(torch.float32, device)
        clone.load_state_dict(model.state_dict())
        second = make(name, clone.named_parameters() if target else clone.parameters(), kwargs)
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        reference = make(name, clone.named_parameters() if target else clone.parameters(), ours=False)
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert second.param_groups[0].get("param_names") == reference.param_groups[0].get("param_names")
        assert_continue_alike((model, optimizer), (clone, second), device, steps=(0, 1))


@names
def test_names_are_there_for_hooks(name, device):
    """Torch's test_load_state_dict_hook with names: a subset of the parameters, in another order, by name."""
    model, optimizer = stepped(name, {"momentum": 0.9} if "SGD" in name else {}, device, named=True)
    clone = Model(torch.float32, device)
    clone.load_state_dict(model.state_dict())
    second = make(name, reversed(list(clone.named_parameters())), {"momentum": 0.9} if "SGD" in name else {})

    def by_name(optimizer, state_dict):
        source = state_dict["param_groups"][0]
        place = dict(zip(source["param_names"], source["params"], strict=True))
        wanted = optimizer.param_groups[0]["param_names"]
        state = {i: state_dict["state"][place[n]] for i, n in enumerate(wanted)}
        groups = [{**source, "params": list(range(len(wanted))), "param_names": wanted}]
        return {"state": state, "param_groups": groups}

    second.register_load_state_dict_pre_hook(by_name)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in (4, 5):
        for m, o in ((model, optimizer), (clone, second)):
            walk(m, o, i, torch.float32, device)
    for p, q in zip(model.parameters(), clone.parameters(), strict=True):
        assert torch.equal(p, q)


@each()
def test_saved_with_weights_only(name, kwargs, aten, device):
    """Torch's test_save_load_equality_with_weights_only."""
    _, optimizer = stepped(name, kwargs, device)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_same_dictionaries(loaded, optimizer.state_dict())
    second = make(name, Model(torch.float32, device).parameters(), kwargs)
    second.load_state_dict(loaded)
    assert_same_dictionaries(second.state_dict(), optimizer.state_dict())


@each()
def test_copies_and_pickles_go_on_alike(name, kwargs, path, device):
    first = stepped(name, kwargs, device)
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert type(copied[1]) is type(first[1])
        assert repr(copied[1]) == repr(first[1])
        assert not {p.data_ptr() for p in copied[0].parameters()} & {
            p.data_ptr() for p in first[0].parameters()
        }
        reference = copy.deepcopy(first)
        assert_continue_alike(reference, copied, device)
        moved = not all(
            torch.equal(p, q) for p, q in zip(first[0].parameters(), copied[0].parameters(), strict=True)
        )
        assert moved  # and the first stayed where it was


@each()
def test_deepcopy_copies_all_public_attributes(name, kwargs, device):
    """Torch's test of that name."""
    optimizer = make(name, Model(torch.float32, device).parameters(), kwargs)
    copied = copy.deepcopy(optimizer)

    def public(obj):
        return {k for k in vars(obj) if not k.startswith("_")}

    assert public(optimizer) == public(copied)


def test_repr_reads_like_torch(device):
    for name, (ours, theirs) in CLASSES.items():
        parameters = [nn.Parameter(torch.ones(2))]
        text = repr(ours(parameters, lr=0.1))
        assert text.startswith(f"{name} (\nParameter Group 0\n")
        for line in repr(theirs(parameters, lr=0.1, foreach=None)).splitlines()[1:]:
            assert line in text.splitlines(), line


def test_adamw_is_decoupled_whatever_is_loaded(path, device):
    """Torch's test_adamw_serialization: a state of Adam does not make it one."""
    model, adam = stepped("Adam", {"weight_decay": 0.5}, device)
    clone = Model(torch.float32, device)
    clone.load_state_dict(model.state_dict())
    second, third = optim.AdamW(clone.parameters()), copy.deepcopy(clone)
    second.load_state_dict(copy.deepcopy(adam.state_dict()))
    reference = torch.optim.AdamW(third.parameters(), foreach=False)
    reference.load_state_dict(copy.deepcopy(adam.state_dict()))
    for group in reference.param_groups:
        group["foreach"] = False
    for i in (0, 1):
        walk(clone, second, i, torch.float32, device)
        walk(third, reference, i, torch.float32, device)
    compare(second, reference, {"rtol": 1e-5, "atol": 1e-7})

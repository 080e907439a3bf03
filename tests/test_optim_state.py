"""What an optimizer remembers, and what may happen between two steps: the checks that are not about one step's numbers.

The reference is torch's own class, in its loop over the parameters (``foreach=False``): its fused step keeps an
uninitialised buffer if the first step is skipped, and refuses a first gradient that comes late.
"""

import copy
import io
import pickle

import pytest
import torch
from machine_option import rounding
from optim_cases import (
    SAME,
    STEPS,
    compare,
    configurations,
    copies_of,
    flat,
    gradient_of,
    make,
    pair,
    parameters_of,
    some,
    step,
)
from torch import nn
from torch.testing import assert_close

from fastreg import optim

# --- to torch and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["ours", "torch"])
@configurations
def test_training_goes_on_in_the_other_class(configuration, first, path, device):
    """Two steps here, two there, two here again: the numbers of six in one class."""
    _, alone = pair(configuration, device)
    parameters, optimizer = parameters_of(device), None
    for i in range(6):
        step(alone, i)
        if i % 2 == 0:
            ours = (i // 2 % 2 == 0) == (first == "ours")
            state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
            optimizer = make(configuration, parameters, ours=ours)
            if state is not None:
                optimizer.load_state_dict(state)
                optimizer.param_groups[0]["foreach"] = False
        step(optimizer, i)
        compare(optimizer, alone)


@configurations
def test_a_checkpoint_through_a_file(configuration, path, device):
    ours, theirs = pair(configuration, device)
    for i in range(2):
        step(ours, i)
        step(theirs, i)
    file = io.BytesIO()
    torch.save({"optimizer": ours.state_dict(), "parameters": flat(ours)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location="cpu")
    resumed = make(configuration, [nn.Parameter(p.to(device)) for p in saved["parameters"]])
    resumed.load_state_dict(saved["optimizer"])
    for i in range(2, 4):
        for optimizer in (ours, resumed, theirs):
            step(optimizer, i)
    compare(resumed, ours, SAME)
    compare(resumed, theirs)
    for p in flat(resumed):
        assert all(value.device == p.device for value in resumed.state[p].values() if torch.is_tensor(value))


@configurations
def test_loading_goes_around_what_was_cached(configuration, path, device):
    """Going back to an earlier checkpoint in the middle of training, parameters and state."""
    ours, _ = pair(configuration, device)
    step(ours, 0)
    kept = copy.deepcopy(ours.state_dict()), [p.detach().clone() for p in flat(ours)]
    step(ours, 1)
    once = [p.detach().clone() for p in flat(ours)]
    step(ours, 2)
    ours.load_state_dict(copy.deepcopy(kept[0]))
    with torch.no_grad():
        for p, value in zip(flat(ours), kept[1], strict=True):
            p.copy_(value)
    step(ours, 1)
    for p, value in zip(flat(ours), once, strict=True):
        assert torch.equal(p, value)


@pytest.mark.parametrize("master", [False, True])
@some
def test_state_keeps_its_dtype_beside_bf16_parameters(configuration, master, path, device):
    """Torch casts all state but the step to the dtype of the parameter: moments in fp32 would lose 16 of their bits."""
    parameters = parameters_of(device, torch.bfloat16)
    ours = make(configuration, parameters, master_weights=master)
    for i in range(2):
        step(ours, i)
    state = copy.deepcopy(ours.state_dict())
    if not master:  # fp32 moments from elsewhere
        for values in state["state"].values():
            for key in values:
                values[key] = values[key].float() * (1 + 2**-12)
    kept = copy.deepcopy(state)
    clones = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = make(configuration, clones, master_weights=master)
    resumed.load_state_dict(state)
    for i, p in enumerate(clones):
        floating = [k for k, v in kept["state"][i].items() if torch.is_tensor(v) and v.is_floating_point()]
        assert floating
        for key in floating:
            assert resumed.state[p][key].dtype == kept["state"][i][key].dtype == torch.float32, key
            assert torch.equal(resumed.state[p][key], kept["state"][i][key])
    if master:
        for i in range(2, 4):
            step(ours, i)
            step(resumed, i)
        compare(resumed, ours, SAME)
    else:
        step(resumed, 2)
        assert all(torch.isfinite(p).all() for p in clones)


@some
def test_a_checkpoint_without_masters_is_loaded_into_one_with(configuration, path, device):
    """The master starts from the parameter, and what came before is not lost: the moments."""
    plain = make(configuration, parameters_of(device, torch.bfloat16))
    step(plain, 0)
    clones = [nn.Parameter(p.detach().clone()) for p in flat(plain)]
    ours = make(configuration, clones, master_weights=True)
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    ours.param_groups[0]["master_weights"] = True  # groups are loaded too
    theirs = make(configuration, [nn.Parameter(p.detach().float()) for p in clones], ours=False)
    theirs.load_state_dict(copy.deepcopy(plain.state_dict()))
    theirs.param_groups[0]["foreach"] = False
    for i in range(1, 4):
        for place, (p, q) in enumerate(zip(clones, flat(theirs), strict=True)):
            p.grad = gradient_of(p, i, place)
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    for p, q in zip(clones, flat(theirs), strict=True):
        # parameters of bf16 are the rounded masters
        assert_close(p.float(), q, rtol=1.01 * rounding(torch.bfloat16), atol=1e-5)


# --- state of our own -------------------------------------------------------------------------------------

EXTRAS = {
    "sgdw": (
        optim.SGDW,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "l1": 0.02, "max_norm": 1.5, "max_grad_norm": 1.0,
         "ema_decay": 0.8},
    ),
    "adamw": (
        optim.AdamW,
        {"lr": 0.05, "weight_decay": 0.2, "l1": 0.02, "max_norm": 0.7, "max_norm_dim": 0, "max_grad_norm": 1.0,
         "ema_decay": 0.8, "cautious": True, "decouple_lr": True},
    ),
    "bf16": (optim.AdamW, {"lr": 0.05, "weight_decay": 0.2, "ema_decay": 0.8, "master_weights": True}),
    "rounded": (optim.AdamW, {"lr": 0.05, "weight_decay": 0.2, "stochastic_rounding": True}),
}  # fmt: skip
extras = pytest.mark.parametrize("extra", EXTRAS)


def dtype_of(extra: str) -> torch.dtype:
    return torch.bfloat16 if extra in ("bf16", "rounded") else torch.float32


@extras
def test_our_own_state_is_saved_and_loaded(extra, path, device):
    """The rest of training is that of one which was not interrupted, to the bit: averages, masters, random bits."""
    cls, arguments = EXTRAS[extra]
    ours = cls(parameters_of(device, dtype_of(extra)), **arguments)
    for i in range(2):
        step(ours, i)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    resumed = cls(copies_of(flat(ours)), lr=1.0)  # groups are loaded with their options
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied, pickled = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    for i in range(2, 4):
        for optimizer in (ours, resumed, copied, pickled):
            step(optimizer, i)
    for other in (resumed, copied, pickled):
        compare(other, ours, SAME)
        assert other.param_groups[0].keys() == ours.param_groups[0].keys()


@extras
def test_torch_loads_our_state_and_we_load_its(extra, path, device):
    """What it does not know does not disturb it; what we miss starts anew."""
    cls, arguments = EXTRAS[extra]
    ours = cls(parameters_of(device, dtype_of(extra)), **arguments)
    step(ours, 0)
    base = torch.optim.SGD if extra == "sgdw" else torch.optim.AdamW
    theirs = base(copies_of(flat(ours)))
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    step(theirs, 1)
    back = cls(copies_of(flat(theirs)), **arguments)
    state = base(copies_of(flat(theirs)))
    step(state, 1)
    kept = {key: back.param_groups[0][key] for key in arguments if key not in state.param_groups[0]}
    back.load_state_dict(copy.deepcopy(state.state_dict()))
    assert kept.items() <= back.param_groups[0].items()  # options that torch has no word for
    step(back, 2)
    assert all(torch.isfinite(p).all() for p in flat(back))


@pytest.mark.parametrize("tensor", [False, True])
@extras
def test_a_step_with_lr_0_changes_no_parameter(extra, tensor, path, device):
    """How a distributed checkpoint makes state: no projection, no l1, no average, no random bit. And the first steps of
    a warm-up from 0."""
    cls, arguments = EXTRAS[extra]
    ours = cls(parameters_of(device, dtype_of(extra)), **arguments)
    kept = copies_of(flat(ours))
    ours.param_groups[0]["lr"] = torch.tensor(0.0) if tensor else 0.0
    for p in flat(ours):
        p.grad = torch.zeros_like(p)
    ours.step()
    for p, k in zip(flat(ours), kept, strict=True):
        assert torch.equal(p, k)
        for key, value in ours.state[p].items():
            if torch.is_tensor(value) and key != "step":
                assert not value.any() or torch.equal(value.to(p.dtype), p), key


@extras
def test_copies_take_part_in_gradient_scaling(extra, path, device):
    """Attributes that torch does not copy are there all the same."""
    cls, arguments = EXTRAS[extra]
    ours = cls(parameters_of(device, dtype_of(extra)), **arguments)
    step(ours, 0)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
        scaler.scale(torch.ones((), device=device))
        kept = copies_of(flat(copied))
        for p in flat(copied):
            p.grad = torch.full_like(p, torch.inf)
        scaler.step(copied)
        assert all(torch.equal(p, k) for p, k in zip(flat(copied), kept, strict=True))
        assert all(p.grad.isinf().all() for p in flat(copied))  # the step has taken what was found


def test_clipping_after_unscaling(path, device):
    """In one pass what torch does in three: unscale, clip, step."""
    ours = optim.AdamW(parameters_of(device), lr=0.1, max_grad_norm=0.5)
    theirs = torch.optim.AdamW(parameters_of(device), lr=0.1, foreach=False)
    scalers = [torch.amp.GradScaler(device.type, init_scale=16.0) for _ in range(2)]
    for i in range(3):
        for optimizer, scaler in zip((ours, theirs), scalers, strict=True):
            for place, p in enumerate(flat(optimizer)):
                p.grad = scaler.scale(gradient_of(p, i, place))
            if optimizer is theirs:
                scaler.unscale_(theirs)
                norm = nn.utils.clip_grad_norm_(flat(theirs), 0.5)
            scaler.step(optimizer)
            scaler.update()
        assert_close(ours.grad_norm.to(norm), norm)
        assert norm > 0.5
    compare(ours, theirs, {"rtol": 1e-4, "atol": 1e-5})  # torch divides by the norm plus 1e-6


# --- gradients that are late, absent, infinite ------------------------------------------------------------


@configurations
def test_parameters_and_gradients_come_later(configuration, path, device):
    """A late first gradient, a group that is added, a gradient that stays away: each parameter counts its own steps."""
    ours, theirs = pair(configuration, device)
    absent = {0: (1,), 1: (1, 2), 2: (), 3: (0,), 4: ()}
    for i in range(5):
        if i == 2:
            for optimizer in (ours, theirs):
                late = parameters_of(device, shapes=((4, 2),))
                optimizer.add_param_group({"params": late, "lr": 0.02})
        for optimizer in (ours, theirs):
            step(optimizer, i, absent[i])
        compare(ours, theirs)


def test_a_late_first_gradient_is_not_dampened(path, device):
    """The recipe with which torch's fused SGD raises a TypeError."""
    parameters = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    ours = optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5)
    for given in (parameters[:1], parameters):
        ours.zero_grad()
        for p in given:
            p.grad = torch.ones_like(p)
        ours.step()
    # 1 - 0.1 - 0.1 (0.9 + 0.5), and the first step of the other
    assert_close([p.mean().item() for p in parameters], [0.76, 0.9], rtol=1e-6, atol=0)


@configurations
def test_an_infinite_first_gradient_leaves_no_trace(configuration, path, device):
    """GradScaler's overflow in the first step, after which torch's fused SGD goes on from uninitialised memory."""
    ours, theirs = pair(configuration, device)
    kept = [p.detach().clone() for p in flat(ours)]
    for scale in (torch.tensor(4.0, device=device), None):
        ours.grad_scale, ours.found_inf = scale, torch.tensor(1.0, device=device)
        for place, p in enumerate(flat(ours)):
            p.grad = torch.full_like(p, torch.inf) if place else torch.ones_like(p)
        ours.step()
        del ours.grad_scale, ours.found_inf
        for p, value in zip(flat(ours), kept, strict=True):
            assert torch.equal(p, value)
            for key, state in ours.state[p].items():
                assert torch.is_tensor(state)
                assert key == "step" or torch.isfinite(state).all()
                if key == "step":
                    assert state.item() == 0
    for i in range(3):
        step(ours, i)
        step(theirs, i)
    compare(ours, theirs)


@pytest.mark.parametrize("found", [2.0, 1.0])
def test_infinities_are_counted_over_devices(found, path, device):
    """``found_inf`` is a sum: two devices with one give 2, which torch's fused steps take for none."""
    p = nn.Parameter(torch.ones(3, device=device))
    ours = optim.AdamW([p])
    p.grad = torch.ones_like(p)
    ours.grad_scale, ours.found_inf = None, torch.tensor(found, device=device)
    ours.step()
    assert p.tolist() == [1.0] * 3


@configurations
def test_grad_scaler(configuration, path, device):
    """Gradients are scaled by 2^k, which is exact: the numbers of training without, and the gradients stay scaled."""
    ours, theirs = pair(configuration, device)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0, growth_interval=2)
    i = 0
    for attempt in range(5):
        for place, (p, q) in enumerate(zip(flat(ours), flat(theirs), strict=True)):
            q.grad = gradient_of(q, i, place)
            p.grad = q.grad * scaler.scale(torch.ones((), device=device))
        if attempt in (0, 3):
            flat(ours)[1].grad[0] = torch.inf
        kept = [p.grad.clone() for p in flat(ours)]
        scaler.step(ours)
        scaler.update()
        assert all(torch.equal(p.grad, g) for p, g in zip(flat(ours), kept, strict=True))
        assert not hasattr(ours, "grad_scale")
        if attempt not in (0, 3):
            theirs.step()
            i += 1
        compare(ours, theirs)
    assert scaler.get_scale() == 8 / 2 * 2 / 2  # backed off, grown after two good steps, backed off


@pytest.mark.parametrize("unscale", [False, True])
@some
def test_a_scale_of_the_user_is_multiplied(configuration, unscale, path, device):
    """``optimizer.grad_scale`` set beforehand, torch's way to fold a factor in: GradScaler multiplies it."""
    ours, theirs = pair(configuration, device)
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
    scaler.scale(torch.ones((), device=device))
    for i in range(2):
        for place, (p, q) in enumerate(zip(flat(ours), flat(theirs), strict=True)):
            q.grad = gradient_of(q, i, place)
            p.grad = q.grad * 8 * 4
        ours.grad_scale = torch.tensor(8.0, device=device)
        if unscale:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        theirs.step()
    compare(ours, theirs)


def test_a_scale_without_a_scaler(path, device):
    for scale in (4.0, torch.tensor(4.0, device=device)):
        p = nn.Parameter(torch.ones(3, device=device))
        ours = optim.SGD([p], lr=0.5)
        p.grad = torch.full_like(p, 4.0)
        ours.grad_scale = scale
        ours.step()
        assert p.tolist() == [0.5] * 3


def test_a_scaler_meets_an_optimizer_without_gradients(path, device):
    ours = optim.AdamW(parameters_of(device))
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(torch.ones((), device=device))
    kept = [p.detach().clone() for p in flat(ours)]
    scaler.step(ours)
    assert all(torch.equal(p, k) for p, k in zip(flat(ours), kept, strict=True))


@some
def test_nan_is_not_hidden(configuration, path, device):
    ours, theirs = pair(configuration, device)
    for optimizer in (ours, theirs):
        for place, p in enumerate(flat(optimizer)):
            p.grad = gradient_of(p, 0, place)
        flat(optimizer)[0].grad[2, 1] = torch.nan
        flat(optimizer)[1].grad[3] = torch.inf
        optimizer.step()
    for p, q in zip(flat(ours), flat(theirs), strict=True):
        assert_close(p, q, equal_nan=True, **STEPS)
    assert torch.isnan(flat(ours)[0]).sum() == 1

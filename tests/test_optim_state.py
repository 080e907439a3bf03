"""What an optimizer remembers, and what may happen between two steps: the checks that are not about one step's numbers.

The reference is torch's own class, in its loop over the parameters (``foreach=False``): its fused step keeps an
uninitialised buffer if the first step is skipped, and refuses a first gradient that comes late.
"""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from machine_option import rounding
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
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


def copies_of(parameters) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in parameters]


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


# --- memory that changes between two steps ----------------------------------------------------------------


@pytest.mark.parametrize("to_none", [True, False])
@some
def test_gradients_are_kept_or_allocated_anew(configuration, to_none, path, device):
    ours, theirs = pair(configuration, device)
    kept = []
    for i in range(4):
        for optimizer in (ours, theirs):
            optimizer.zero_grad(set_to_none=to_none)
            for place, p in enumerate(flat(optimizer)):
                if i == 2:
                    continue  # zeros, or none
                p.grad = gradient_of(p, i, place) if p.grad is None else p.grad.add_(gradient_of(p, i, place))
                kept.append(p.grad)  # so that the next one lies elsewhere
            optimizer.step()
        compare(ours, theirs)
    assert len({g.data_ptr() for g in kept}) == (18 if to_none else 6)


def unaligned(x: Tensor) -> Tensor:
    """The same values one element further in memory than an allocation starts."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


OTHER_GRADIENTS = {
    "strides": lambda g: g.T.contiguous().T,
    "a gap": lambda g: torch.stack([g, 9 * g], dim=2)[..., 0],
    "differentiable": lambda g: g.clone().requires_grad_() * 1,
    "none": lambda g: None,
    "shared": lambda g: g,
}


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("kind", OTHER_GRADIENTS)
@some
def test_a_new_gradient_may_be_of_another_kind(configuration, kind, after, path, device):
    """At first, and when gradients have been of one kind for some steps."""
    params = (parameters_of(device, shapes=((5, 3), (5, 3))) for _ in range(2))
    ours, theirs = pair(configuration, device, *params)
    for i in range(after + 2):
        for optimizer in (ours, theirs):
            params = flat(optimizer)
            for place, p in enumerate(params):
                p.grad = gradient_of(p, i, place)
            if i == after:
                params[0].grad = OTHER_GRADIENTS[kind](params[1].grad)
            optimizer.step()
        compare(ours, theirs)


@some
def test_everything_may_move(configuration, path, device):
    """Data, gradients and state at another address, with other strides, aligned or not: after any step."""
    shapes = ((4, 8), (8, 8), (2, 3, 4, 4))
    ours, theirs = pair(configuration, device, ours=parameters_of(device, shapes=shapes))
    keep = []
    for i in range(7):
        for optimizer in (ours, theirs):
            a, b, c = flat(optimizer)
            for place, p in enumerate((a, b, c)):
                p.grad = gradient_of(p, i, place)
            if optimizer is ours:
                keep += [p.data for p in (a, b, c)] + [dict(ours.state[p]) for p in (a, b, c) if i]
                if i == 1:
                    a.data = a.data.clone()
                if i == 2:
                    a.grad, b.grad = unaligned(a.grad), unaligned(b.grad)
                if i == 3:
                    a.data, b.grad = unaligned(a.data), b.grad.t().contiguous().t()
                if i == 4:
                    for key, value in ours.state[b].items():
                        if value.dim():
                            ours.state[b][key] = unaligned(value)
                if i == 5:
                    c.grad = c.grad.contiguous(memory_format=torch.channels_last)
                if i == 6:
                    c.data = c.data.contiguous(memory_format=torch.channels_last)
            optimizer.step()
        compare(ours, theirs)
    assert not flat(ours)[2].is_contiguous()


@some
def test_state_may_be_replaced_by_hand(configuration, path, device):
    """And nothing else has moved: gradients lie where they lay."""
    ours, theirs = pair(configuration, device)
    for i in range(4):
        for optimizer in (ours, theirs):
            for place, p in enumerate(flat(optimizer)):
                value = gradient_of(p, i, place)
                p.grad = value if p.grad is None else p.grad.copy_(value)
            if i == 2:
                for p in flat(optimizer):
                    for key, value in optimizer.state[p].items():
                        optimizer.state[p][key] = value.clone() if value.dim() == 0 else value * 0.5
            optimizer.step()
        compare(ours, theirs)


@pytest.mark.parametrize("cls", [optim.SGD, optim.Adam])
def test_a_gradient_may_become_sparse(cls, path, device):
    """As torch: SGD takes it, Adam refuses it, and nothing is stepped."""
    theirs = getattr(torch.optim, cls.__name__)
    ends = []
    for each in (cls, theirs):
        p = nn.Parameter(torch.ones(4, 2, device=device))
        optimizer = each([p], lr=0.1)
        p.grad = torch.ones_like(p)
        optimizer.step()
        p.grad = torch.ones(4, 2, device=device).to_sparse(1)
        try:
            optimizer.step()
            ends.append(p.detach().clone())
        except RuntimeError as error:
            ends.append((p.detach().clone(), str(error)))
    if cls is optim.SGD:
        assert torch.equal(*ends)
    else:
        assert ends[0][1] == ends[1][1]
        assert_close(ends[0][0], ends[1][0], **STEPS)


def test_options_meet_a_gradient_that_becomes_sparse(path, device):
    """An error, and nothing has changed: not the other parameter either."""
    params = parameters_of(device, shapes=((3,), (4, 2)))
    optimizer = optim.SGD(params, lr=0.1, l1=0.1, l1_mode="subgradient")
    step(optimizer, 0)
    kept = copies_of(params)
    params[0].grad, params[1].grad = torch.ones_like(params[0]), torch.ones(4, 2, device=device).to_sparse(1)
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()
    assert all(torch.equal(p, k) for p, k in zip(params, kept, strict=True))


CHANGES = {
    "sgd": [("lr", 0.3), ("weight_decay", 0.0), ("weight_decay", 0.7), ("maximize", True), ("momentum", 0.8)],
    "momentum": [
        ("lr", 0.3),
        ("momentum", 0.5),
        ("dampening", 0.1),
        ("weight_decay", 0.0),
        ("maximize", True),
    ],
    "nesterov": [
        ("lr", 0.3),
        ("momentum", 0.5),
        ("nesterov", False),
        ("maximize", False),
        ("weight_decay", 0.4),
    ],
    "adam": [("lr", 0.3), ("betas", (0.5, 0.6)), ("eps", 0.1), ("weight_decay", 0.0), ("maximize", True)],
    "adamw": [("lr", 0.3), ("betas", (0.5, 0.6)), ("eps", 0.1), ("weight_decay", 0.0), ("maximize", True)],
    "amsgrad": [("lr", 0.3), ("betas", (0.5, 0.6)), ("eps", 0.1), ("weight_decay", 0.0), ("maximize", True)],
}


@configurations
def test_numbers_of_a_group_may_change_before_any_step(configuration, path, device):
    pairs = []
    for ours in (True, False):
        a, b, c = parameters_of(device)
        pairs.append(make(configuration, [{"params": [a, c]}, {"params": [b]}], ours=ours))
    for i in range(6):
        for optimizer in pairs:
            if i:
                key, value = CHANGES[configuration][i - 1]
                optimizer.param_groups[0][key] = value
            step(optimizer, i)
        compare(*pairs)


@some
def test_no_memory_is_held(configuration, path, device):
    """Not a gradient after ``zero_grad``, and nothing once the optimizer is gone."""
    ours = make(configuration, parameters_of(device), ours=True, ema_decay=0.9)
    for i in range(2):
        step(ours, i)
    gradients = [weakref.ref(p.grad) for p in flat(ours)]
    ours.zero_grad()
    assert [g() for g in gradients] == [None] * 3
    # Nor state that has been replaced, as by those who take it to another device between two phases.
    tensors = [(s, key, weakref.ref(v)) for s in ours.state.values() for key, v in s.items() if v.dim()]
    for state, key, tensor in tensors:
        state[key] = tensor().clone()
    assert [tensor() for _, _, tensor in tensors] == [None] * len(tensors)
    assert len(tensors) >= 4
    del state, tensors
    rest = [weakref.ref(p) for p in flat(ours)]
    rest += [weakref.ref(v) for s in ours.state.values() for v in s.values() if torch.is_tensor(v)]
    assert len(rest) > 3
    del ours
    gc.collect()
    assert [r() for r in rest] == [None] * len(rest)


# --- kinds of parameters ----------------------------------------------------------------------------------


@configurations
def test_empty_parameters_have_state_and_no_work(configuration, path, device):
    shapes = ((0,), (3, 2), (2, 0, 4))
    ours, theirs = pair(configuration, device, ours=parameters_of(device, shapes=shapes))
    for i in range(2):
        step(ours, i)
        step(theirs, i)
    compare(ours, theirs)
    resumed = make(configuration, [nn.Parameter(p.detach().clone()) for p in flat(ours)])
    resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer in (resumed, ours):
        step(optimizer, 2)
    compare(resumed, ours, SAME)
    nothing = make(configuration, parameters_of(device, shapes=((0, 3),)))
    step(nothing, 0)  # and nothing else


@some
def test_tied_parameters_are_stepped_once(configuration, path, device):
    def model():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4))
        layers[2].weight = layers[0].weight
        return layers.to(device)

    models = model(), model()
    optimizers = (
        make(configuration, models[0].parameters()),
        make(configuration, models[1].parameters(), ours=False),
    )
    for i in range(3):
        for one, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            one(torch.full((2, 4), 0.1 * i, device=device)).square().sum().backward()
            optimizer.step()
    compare(*optimizers)
    assert models[0][0].weight is models[0][2].weight


@some
def test_parameters_that_share_memory(configuration, path, device):
    """Views of one buffer, next to each other: none writes into its neighbour."""
    memory = torch.randn(64, device=device)
    whole = [memory[1:6], memory[6:13], memory[16:48].view(4, 8)]
    ours, theirs = pair(configuration, device, ours=[nn.Parameter(v) for v in whole])
    assert flat(ours)[2].data_ptr() == whole[2].data_ptr()
    kept = memory.clone()
    for i in range(2):
        step(ours, i)
        step(theirs, i)
    compare(ours, theirs)
    outside = torch.ones(64, dtype=torch.bool, device=device)
    for span in (slice(1, 13), slice(16, 48)):
        outside[span] = False
    assert torch.equal(memory[outside], kept[outside])


# --- beside the rest of torch -----------------------------------------------------------------------------

SCHEDULERS = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.2, total_steps=6
    ),  # moves momentum and betas, too
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "warmup": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: epoch / 3),  # from 0
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    "swa": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=3),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@some
def test_schedulers(configuration, scheduler, tensor, path, device):
    more = {"lr": torch.tensor(0.1)} if tensor else {}
    pairs = []
    for ours in (True, False):
        optimizer = make(configuration, parameters_of(device), ours=ours, **copy.deepcopy(more))
        pairs.append((optimizer, SCHEDULERS[scheduler](optimizer)))
    rates = []
    for i in range(5):
        for optimizer, schedule in pairs:
            step(optimizer, i)
            schedule.step()
        rates.append(float(pairs[0][0].param_groups[0]["lr"]))
    assert len(set(rates)) > 1
    compare(pairs[0][0], pairs[1][0])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(
            nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
        )

    def forward(self, x):
        return self.layers(x)


def data(i: int, device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(8, 4, generator=generator).to(device), torch.randn(8, 2, generator=generator).to(
        device
    )


def train(model, optimizer, device, steps=range(4), after=lambda: None) -> list[float]:
    losses = []
    for i in steps:
        x, y = data(i, device)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


@some
def test_weight_averages_of_torch(configuration, path, device):
    """AveragedModel with an equal and an exponential average, and update_bn, beside our step."""
    ends = []
    for ours in (True, False):
        model = Net().to(device)
        optimizer = make(configuration, model.parameters(), ours=ours)
        averages = [
            swa_utils.AveragedModel(model),
            swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)),
        ]

        def update(averages=averages, model=model):
            for average in averages:
                average.update_parameters(model)

        losses = train(model, optimizer, device, after=update)
        for average in averages:
            swa_utils.update_bn([data(9, device)[0]], average)
        ends.append((losses, [average.state_dict() for average in averages]))
    assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)  # through a batch norm of eight samples


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@some
def test_a_compiled_model_beside_an_eager_step(configuration, path, device):
    ends = []
    for compiled in (True, False):
        model = Net().to(device)
        optimizer = make(configuration, model.parameters())
        call = torch.compile(model, backend="aot_eager") if compiled else model
        ends.append((train(call, optimizer, device), optimizer.state_dict()["state"]))
    assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("whole", [True, False])
@some
def test_a_compiled_step_falls_back(configuration, whole, path, device):
    """Of a compiled function that calls step, and of a compiled step: the same numbers, and no error."""
    ours, theirs = pair(configuration, device)

    def some_function(i):
        ours.step()
        return i * 2

    call = torch.compile(some_function if whole else ours.step, backend="eager")
    for i in range(3):
        for place, (p, q) in enumerate(zip(flat(ours), flat(theirs), strict=True)):
            p.grad, q.grad = gradient_of(p, i, place), gradient_of(q, i, place)
        if whole:
            assert call(torch.tensor(i)).item() == 2 * i
        else:
            call()
        theirs.step()
    compare(ours, theirs)


@some
def test_a_step_in_the_backward_pass(configuration, path, device):
    """An optimizer a parameter, stepped by a hook as soon as its gradient is there, which is freed at once."""
    ends = []
    for inside in (True, False):
        model = Net().to(device)
        optimizers = {p: make(configuration, [p]) for p in model.parameters()}

        def finish(p, optimizers=optimizers):
            optimizers[p].step()
            optimizers[p].zero_grad()

        if inside:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(finish)
        losses = []
        for i in range(3):
            x, y = data(i, device)
            loss = (model(x) - y).square().mean()
            loss.backward()
            losses.append(loss.item())
            for p in model.parameters():
                if not inside:
                    finish(p)
                assert p.grad is None
        ends.append((losses, list(model.parameters())))
    assert_close(ends[0], ends[1], **SAME)


def test_clipping_of_torch_beside_a_step(path, device):
    ours, theirs = pair("adamw", device)
    for i in range(3):
        norms = []
        for optimizer in (ours, theirs):
            for place, p in enumerate(flat(optimizer)):
                p.grad = gradient_of(p, i, place)
            norms.append(nn.utils.clip_grad_norm_(flat(optimizer), 0.5))
            optimizer.step()
        assert norms[0] == norms[1]
    compare(ours, theirs)


def test_gradients_in_inference_mode_and_without_it(path, device):
    """A step under ``inference_mode`` is one: torch's loop allows it, for parameters from outside."""
    ours, theirs = pair("momentum", device)
    for i in range(2):
        for optimizer in (ours, theirs):
            with torch.inference_mode():
                step(optimizer, i)
    compare(ours, theirs)


OUT_OF_RANGE = {
    "l1": (-5, "Invalid l1 value"),
    "l1_mode": ("other", "Invalid l1_mode"),
    "max_norm": (float("nan"), "Invalid max_norm value"),
    "max_norm_dim": (1, "Invalid max_norm_dim"),
    "max_grad_norm": (0, "Invalid max_grad_norm value"),
    "ema_decay": (2.0, "Invalid ema_decay value"),
    "cautious": (True, "decoupled weight decay"),
    "decouple_lr": (True, "decoupled weight decay"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_options_that_change_between_steps_are_checked_before_anything_changes(kind, name, device, path):
    p = nn.Parameter(torch.randn(3, 2, device=device))
    optimizer = getattr(optim, kind)([p], lr=0.1, l1=0.1, max_norm=10.0)
    good = optimizer.param_groups[0][name]
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    value, words = OUT_OF_RANGE[name]
    optimizer.param_groups[0][name] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            optimizer.step()
    assert_close(p.detach(), before, **SAME)
    assert_close(optimizer.state_dict()["state"], state, **SAME)
    optimizer.param_groups[0][name] = good
    optimizer.step()
    assert not torch.equal(p.detach(), before)


@pytest.mark.parametrize("later", [False, True], ids=["constructor", "add_param_group"])
def test_max_norm_dim_of_a_group_needs_a_max_norm(later):
    p, q = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 2))
    if later:
        optimizer = optim.AdamW([q])
        with pytest.raises(ValueError, match="max_norm_dim"):
            optimizer.add_param_group({"params": [p], "max_norm_dim": 0})
        assert len(optimizer.param_groups) == 1
    else:
        with pytest.raises(ValueError, match="max_norm_dim"):
            optim.AdamW([{"params": [p], "max_norm_dim": 0}])
    for groups, arguments in (
        ([{"params": [p], "max_norm_dim": 0}], {"max_norm": 1.0}),
        ([{"params": [p], "max_norm": 1.0}, {"params": [q]}], {"max_norm_dim": 0}),
        ([{"params": [p], "max_norm": 1.0, "max_norm_dim": 0}], {}),
    ):
        if later:
            optimizer = optim.AdamW([nn.Parameter(torch.randn(3, 2))], **{**arguments, "max_norm": 1.0})
            optimizer.add_param_group(groups[0])
        else:
            optim.AdamW(groups, **arguments)


NUMBERS = ("l1", "max_norm", "max_grad_norm", "ema_decay")


@pytest.mark.parametrize("name", NUMBERS)
def test_options_become_numbers_of_python(name):
    for value in (torch.tensor(0.5), np.float32(0.5), np.array(0.5)[()]):
        for where in ("argument", "group", "later"):
            p = nn.Parameter(torch.randn(3, 2))
            groups = [{"params": [p], name: value}] if where == "group" else [p]
            optimizer = optim.SGD(groups, lr=0.1, **({name: value} if where == "argument" else {}))
            if where == "later":
                optimizer.param_groups[0][name] = value
            p.grad = torch.ones_like(p)
            optimizer.step()
            found = optimizer.param_groups[0][name]
            assert type(found) is float
            assert found == 0.5
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", NUMBERS)
def test_options_that_are_no_numbers_are_refused_by_name(name):
    p, q = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 2))
    optimizer = optim.SGD([p], lr=0.1)
    for value in ("1", [1.0], torch.ones(2), torch.tensor(0.5, requires_grad=True)):
        with pytest.raises(TypeError, match=f"{name} has to be a number"):
            optim.SGD([p], lr=0.1, **{name: value})
        with pytest.raises(TypeError, match=f"{name} has to be a number"):
            optimizer.add_param_group({"params": [q], name: value})
        assert len(optimizer.param_groups) == 1

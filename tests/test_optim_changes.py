"""What may change between two steps of an optimizer: memory, parameters, options; and what it stands beside.

The reference is torch's class in its loop over the parameters (``foreach=False``)."""

import copy
import gc
import io
import weakref

import numpy as np
import pytest
import torch
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
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.testing import assert_close

from fastreg import optim

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


@pytest.mark.usefixtures("fresh_compiler")
@some
def test_a_compiled_model_beside_an_eager_step(configuration, path, device):
    ends = []
    for compiled in (True, False):
        model = Net().to(device)
        optimizer = make(configuration, model.parameters())
        call = torch.compile(model, backend="aot_eager") if compiled else model
        ends.append((train(call, optimizer, device), optimizer.state_dict()["state"]))
    assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("whole", [True, False])
@some
def test_a_compiled_step_falls_back(configuration, whole, path, device):
    """A compiled function that calls step, and a compiled step, give the same numbers, and no error."""
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

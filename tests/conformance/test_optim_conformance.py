"""The optimizers under PyTorch's own optimizer inputs and error inputs (``optim_db``).

Torch's test_optim.py is not in its wheel: the inputs are, and these are tests of our own over them, in its spirit. The
reference is torch's
class with ``foreach=False, fused=False``, its loop over the parameters. On ATen all inputs run, in four dtypes; on the
kernels those in fp32, and one a class in the other dtypes.
"""

import copy
import inspect
import itertools
import re
import warnings

import pytest
import torch
from machine_option import bf16
from optim_inputs import (
    CLASSES,
    INFOS,
    Model,
    batch,
    compare,
    each,
    inputs_of,
    make,
    names,
    stepped,
    tensors_of,
    walk,
)
from torch import nn
from torch.optim import optimizer as hooks_of_all
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing import assert_close
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
)

from fastreg import optim
from fastreg.ops import backend

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


CASES = [
    (name, dtype, desc) for name in CLASSES for dtype in DTYPES for desc in inputs_of(name, dtype)
]  # all of them
SAMPLE = {
    # on the kernels: everything in fp32, and in the other dtypes what has the most terms
    (name, dtype, desc)
    for name, dtype, desc in CASES
    if dtype == torch.float32 or desc in ("nesterov", "amsgrad")
}


def runs(cases):
    """Each case on ATen, and those of the sample on the kernels too."""
    found = []
    for case, path in itertools.product(cases, ("aten", "kernels")):
        if path == "aten" or case in SAMPLE:
            words = [path, *(str(part).removeprefix("torch.") for part in case)]
            found.append(pytest.param(*case, path, id="-".join(words).replace(" ", "_")))
    return pytest.mark.parametrize(("name", "dtype", "desc", "path"), found, indirect=["path"])


# One step from equal state: some roundings of the result, of the size of the dtype's. The interpreter truncates to
# bf16, which is a rounding more each time.
CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 2e-6, "atol": 1e-7},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": bf16(2e-2), "atol": bf16(2e-2)},
}


# --- the same steps as torch's ----------------------------------------------------------------------------


@runs(CASES)
def test_inputs_of_torch_give_the_steps_of_torch(name, dtype, desc, path, device):
    """Torch's test_fused_matches_forloop: from equal state in each step, so that errors do not add up."""
    kwargs = inputs_of(name, dtype)[desc]
    models = Model(dtype, device), Model(dtype, device)
    ours, theirs = (make(name, models[i].parameters(), kwargs, ours=i == 0) for i in range(2))
    for i in range(7):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            walk(model, optimizer, i, dtype, device)
        compare(ours, theirs, CLOSE[dtype], resynchronize=True)


@names
def test_state_has_the_keys_of_torch(name, path, device):
    for kwargs in inputs_of(name, torch.float32).values():
        models = [Model(torch.float32, device) for _ in range(2)]
        pair = [make(name, models[i].parameters(), kwargs, ours=i == 0) for i in range(2)]
        for model, optimizer in zip(models, pair, strict=True):
            walk(model, optimizer, 0, torch.float32, device)
        ours, theirs = (optimizer.state_dict() for optimizer in pair)
        assert ours["state"].keys() == theirs["state"].keys()
        for i in theirs["state"]:
            assert ours["state"][i].keys() >= theirs["state"][i].keys()
        for group, expected in zip(ours["param_groups"], theirs["param_groups"], strict=True):
            for key in expected.keys() - {"foreach"}:
                assert_close(group[key], expected[key])
            assert group.keys() >= expected.keys()


@names
def test_the_signature_extends_that_of_torch(name):
    ours, theirs = (list(inspect.signature(cls).parameters.values()) for cls in CLASSES[name])
    extra = {p.name for p in ours} - {p.name for p in theirs}
    shared = [p for p in ours if p.name not in extra]
    for p, q in zip(shared, theirs, strict=True):
        assert (p.name, p.default, p.kind) == (q.name, q.default, q.kind)
    assert all(p.kind == p.KEYWORD_ONLY for p in ours if p.name in extra)
    assert issubclass(CLASSES[name][0], torch.optim.SGD if name == "SGDW" else getattr(torch.optim, name))


@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable"])
@names
def test_flags_of_torch_are_accepted(name, flag, path, device):
    if flag == "capturable" and (name.startswith("SGD") or path == "aten"):
        pytest.skip("torch has no such flag there")
    kwargs = {"weight_decay": 0.1, flag: True}
    models = [Model(torch.float32, device) for _ in range(2)]
    ours = make(name, models[0].parameters(), kwargs)
    theirs = make(name, models[1].parameters(), {"weight_decay": 0.1}, ours=False)
    for i in range(3):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            walk(model, optimizer, i, torch.float32, device)
        compare(ours, theirs, CLOSE[torch.float32], resynchronize=True)


@names
def test_differentiable_steps_carry_gradients(name, device):
    def loss(cls, lr):
        p = torch.ones(3, device=device, requires_grad=True)
        w = p.clone()  # no leaf: what a differentiable step is for
        w.retain_grad()
        optimizer = cls([w], lr=0.1, weight_decay=0.5, differentiable=True)
        w.grad = (lr * p).cos()
        optimizer.step()
        return torch.autograd.grad(w.square().sum(), [lr, p])

    cls = CLASSES[name][0]
    if name == "SGDW":
        pytest.skip("torch has none to compare with")
    lr = torch.tensor(0.3, device=device, requires_grad=True)
    assert_close(loss(cls, lr), loss(CLASSES[name][1], lr), rtol=0, atol=0)  # it is torch's own step


@names
def test_dtypes_may_be_mixed(name, path, device):
    def parameters():
        generator = torch.Generator().manual_seed(1)
        return [nn.Parameter(torch.randn(5, 3, generator=generator).to(device, dtype)) for dtype in DTYPES]

    ours, theirs = (make(name, parameters(), {"weight_decay": 0.1}, ours=own) for own in (True, False))
    for step in range(3):
        for optimizer in (ours, theirs):
            generator = torch.Generator().manual_seed(step)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            optimizer.step()
        for place, value in tensors_of(theirs).items():
            assert_close(tensors_of(ours)[place], value, **CLOSE[DTYPES[place[0]]])
            with torch.no_grad():
                value.copy_(tensors_of(ours)[place])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@each()
def test_tensor_lr_of_any_shape_is_that_number(name, kwargs, shape, aten, device):
    """Torch's test_tensor_lr; on the kernels the input with a tensor lr is among those above."""
    models = [Model(torch.float32, device) for _ in range(2)]
    lr = torch.full(shape, 0.0123)
    ours = make(name, models[0].parameters(), kwargs, lr=lr.clone())
    theirs = make(name, models[1].parameters(), kwargs, ours=False, lr=lr.item())
    for i in range(3):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            walk(model, optimizer, i, torch.float32, device)
    compare(ours, theirs, CLOSE[torch.float32])
    assert_close(ours.param_groups[0]["lr"], lr, rtol=0, atol=0)


def test_tensor_lr_is_read_in_each_step(path, device):
    p = nn.Parameter(torch.ones(4, device=device))
    lr = torch.tensor(0.5, device=device)
    optimizer = optim.SGD([p], lr=lr)
    p.grad = torch.ones_like(p)
    optimizer.step()
    lr.fill_(0.25)
    optimizer.step()
    assert p.tolist() == [0.25] * 4


# --- what torch refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.optimizer_error_input.desc}".replace(" ", "_"))
        for name in CLASSES
        for case in INFOS[name].optim_error_inputs_func("cpu", torch.float32)
    ],
)
def test_error_inputs_of_torch(name, case, path):
    wrong = case.optimizer_error_input
    params = [nn.Parameter(torch.randn(2, 3))] if wrong.params is None else wrong.params
    cls = CLASSES[name][0]
    assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            cls(params, **wrong.kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            cls(params, **wrong.kwargs)


def result_or_error(call):
    try:
        return call()
    except Exception as error:
        return type(error), re.sub(r"0x[0-9a-f]+", "", str(error))


CONSTRUCTIONS = {
    "negative lr": {"lr": -1.0},
    "negative decay": {"weight_decay": -0.5},
    "negative tensor lr": {"lr": torch.tensor(-1.0)},
    "fused and differentiable": {"fused": True, "differentiable": True},
    "fused and foreach": {"fused": True, "foreach": True},
    "unknown": {"momentums": 1.0},
    "nesterov without momentum": {"nesterov": True},
    "nesterov with dampening": {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    "eps": {"eps": -1e-8},
    "second beta": {"betas": (0.9, 1.5)},
    "beta of many": {"betas": (torch.ones(2), torch.ones(2))},
}


@pytest.mark.parametrize("desc", CONSTRUCTIONS)
@pytest.mark.parametrize("name", INFOS)
def test_wrong_arguments_are_refused_as_by_torch(name, desc):
    ours, theirs = CLASSES[name]

    def construct(cls):
        cls([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **CONSTRUCTIONS[desc]})

    found, expected = result_or_error(lambda: construct(ours)), result_or_error(lambda: construct(theirs))
    if expected is None:
        assert found is None
    else:
        assert found[0] is expected[0]
        assert found[1].replace(ours.__name__, "") == expected[1].replace(theirs.__name__, "").replace(
            "SGDW", ""
        )


def test_no_parameters_are_refused_as_by_torch():
    for ours, theirs in CLASSES.values():
        assert result_or_error(lambda: ours([])) == result_or_error(lambda: theirs([]))  # noqa: B023
        assert result_or_error(lambda: ours(3)) == result_or_error(lambda: theirs(3))  # noqa: B023


def sparse(p):
    values = torch.ones(2, *p.shape[1:], dtype=p.dtype)
    return torch.sparse_coo_tensor([[0, 2]], values, p.shape, check_invariants=True)


STEPS = {
    "sparse": (lambda: torch.ones(4, 2), sparse),
    "complex": (lambda: torch.ones(4, 2, dtype=torch.complex64), torch.ones_like),
    "half": (lambda: torch.ones(4, 2, dtype=torch.float16), torch.ones_like),
    "strided": (lambda: torch.ones(4, 6)[:, ::3], torch.ones_like),
    "expanded": (lambda: torch.ones(4, 2), lambda p: torch.ones(1, 1).expand(4, 2)),
    "of a view": (lambda: torch.ones(4, 2), lambda p: torch.ones(4, 4)[:, ::2]),
    "transposed": (lambda: torch.ones(4, 2), lambda p: torch.arange(8.0).view(2, 4).t()),
    "meta": (lambda: torch.ones(4, 2, device="meta"), torch.ones_like),
}


@pytest.mark.parametrize("desc", STEPS)
@pytest.mark.parametrize("momentum", [False, True])
@names
def test_unusual_tensors_fare_as_in_torch(name, desc, momentum, path, device):
    """The same numbers where torch's loop takes them, and the same error where it does not."""
    kwargs = {"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9} if momentum and "SGD" in name else {})
    if desc == "sparse" and name == "SGD":
        kwargs["weight_decay"] = 0  # torch has no coupled decay of sparse gradients

    def steps(ours):
        data, gradient = STEPS[desc]
        data = data()
        p = nn.Parameter(data if data.is_meta else data.to(device))
        if desc == "strided":
            p = nn.Parameter(torch.ones(4, 6, device=device)[:, ::3])
            assert p.stride() == (6, 3)
        optimizer = make(name, [p], kwargs, ours=ours)
        p.grad = gradient(p.detach().cpu() if desc == "sparse" else p.detach()).to(p.device)
        optimizer.step()
        optimizer.step()
        return p.detach()

    found, expected = result_or_error(lambda: steps(True)), result_or_error(lambda: steps(False))
    if isinstance(expected, tuple):
        assert found == expected
    else:
        assert torch.is_tensor(found), found
        assert found.stride() == expected.stride()
        if not found.is_meta:
            assert_close(found, expected, rtol=1e-3 if desc == "half" else 1e-6, atol=1e-6)


# --- what a step leaves alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_gradients_are_never_written(name, path, device):
    every = _get_optim_inputs_including_global_cliquey_kwargs(
        "cpu", torch.float32, INFOS[name], skip=("differentiable",)
    )
    if path == "kernels":
        every = every[::3]
    for case in every:
        model = Model(torch.float32, device)
        optimizer = make(name, model.parameters(), case.kwargs)
        model(batch(torch.float32, device)).sum().backward()
        gradients = [p.grad for p in model.parameters()]
        kept = [g.clone() for g in gradients]
        for _ in range(2):
            optimizer.step()
        assert [g._version for g in gradients] == [0] * len(gradients), case.desc
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        assert all(torch.equal(g, k) for g, k in zip(gradients, kept, strict=True)), case.desc


@names
def test_parameters_and_averages_are_marked_as_written(name, path, device):
    """Autograd sees that a tensor it has saved is not what it was. (Of the moments it saves none.)"""
    kwargs = {"momentum": 0.9} if "SGD" in name else {}
    p = nn.Parameter(torch.ones(4, device=device))
    optimizer = make(name, [p], kwargs, ema_decay=0.5)
    loss = (p.exp() * p).sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    version = optimizer.state[p]["ema"]._version
    optimizer.step()
    assert optimizer.state[p]["ema"]._version > version


@each()
def test_without_gradients_a_step_does_nothing(name, kwargs, path, device):
    model = Model(torch.float32, device)
    optimizer = make(name, model.parameters(), kwargs)
    kept = copy.deepcopy(model.state_dict())
    optimizer.step()
    for p, k in zip(model.state_dict().values(), kept.values(), strict=True):
        assert torch.equal(p, k)
    assert all(not state for state in optimizer.state.values())


@each()
def test_zero_gradients_move_nothing_but_by_decay(name, kwargs, path, device):
    p = nn.Parameter(torch.linspace(-1, 1, 10, device=device).view(5, 2))
    kept = p.detach().clone()
    optimizer = make(name, [p], {**kwargs, "weight_decay": 0})
    p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    assert torch.equal(p, kept)


# --- groups, hooks, closures, schedulers ------------------------------------------------------------------


@pytest.mark.parametrize("key", ["lr", "weight_decay", "maximize"])
@each()
def test_groups_have_their_own_values(name, kwargs, key, aten, device):
    """Torch's test_param_groups_lr and _weight_decay: as if each group had an optimizer of its own."""
    check_groups(name, kwargs, key, device)


@pytest.mark.parametrize("key", ["lr", "weight_decay", "maximize"])
@names
def test_groups_on_the_kernels(name, key, device):
    check_groups(name, {"weight_decay": 0.1}, key, device)


def check_groups(name, kwargs, key, device):
    own = {"lr": 0.3, "weight_decay": 0.4, "maximize": True}[key]
    models = [Model(torch.float32, device) for _ in range(2)]

    def parts(model):
        parameters = list(model.parameters())
        return parameters[::2], parameters[1::2]

    first, second = parts(models[0])
    together = make(name, [{"params": first}, {"params": second, key: own}], kwargs)
    first, second = parts(models[1])
    apart = make(name, first, kwargs, ours=False), make(name, second, {**kwargs, key: own}, ours=False)
    for i in range(3):
        walk(models[0], together, i, torch.float32, device)
        for optimizer in apart:
            optimizer.zero_grad()
        if i != 2:
            models[1](batch(torch.float32, device)).sum().backward()
        for optimizer in apart:
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)  # three steps


@names
def test_groups_may_be_added(name, path, device):
    models = [Model(torch.float32, device) for _ in range(2)]
    pair = []
    for model, ours in zip(models, (True, False), strict=True):
        optimizer = make(name, model.layers[0].parameters(), ours=ours)
        walk(model, optimizer, 0, torch.float32, device)
        optimizer.add_param_group({"params": model.layers[2].parameters(), "lr": 0.1})
        optimizer.add_param_group({"params": model.scale})
        pair.append(optimizer)
    for i in range(1, 4):
        for model, optimizer in zip(models, pair, strict=True):
            walk(model, optimizer, i, torch.float32, device)
    compare(*pair, {"rtol": 1e-5, "atol": 1e-6})


@names
def test_hooks_run_in_the_order_of_torch(name, path, device):
    def protocol(cls):
        model, events = Model(torch.float32, device), []
        optimizer = cls(model.parameters(), lr=0.1)
        value = model.scale.item()

        def note(word):
            def hook(optimizer, *arguments):
                events.append((word, len(arguments), model.scale.item() == value))

            return hook

        handles = [
            optimizer.register_step_pre_hook(note("step pre")),
            optimizer.register_step_post_hook(note("step post")),
            hooks_of_all.register_optimizer_step_pre_hook(note("any pre")),
            hooks_of_all.register_optimizer_step_post_hook(note("any post")),
            optimizer.register_state_dict_pre_hook(note("state pre")),
            optimizer.register_state_dict_post_hook(note("state post")),
            optimizer.register_load_state_dict_pre_hook(note("load pre")),
            optimizer.register_load_state_dict_post_hook(note("load post")),
        ]
        model(batch(torch.float32, device)).sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
        optimizer.step()
        return events

    found = protocol(CLASSES[name][0])
    assert found == protocol(torch.optim.SGD if name == "SGDW" else CLASSES[name][1])
    assert len(found) == 8


@names
def test_a_hook_may_change_the_arguments_and_the_gradients(name, path, device):
    p = nn.Parameter(torch.ones(2, device=device))
    optimizer = make(name, [p], {"lr": 0.1})
    p.grad = torch.full_like(p, torch.nan)

    def zero(optimizer, arguments, keywords):
        p.grad.zero_()
        return arguments, {"closure": lambda: torch.tensor(7.0)}

    optimizer.register_step_pre_hook(zero)
    assert optimizer.step() == 7
    assert torch.isfinite(p).all()


@names
def test_a_closure_is_called_once_with_gradients_enabled(name, path, device):
    model = Model(torch.float32, device)
    optimizer, calls = make(name, model.parameters()), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(batch(torch.float32, device)).sum()
        loss.backward()
        return loss

    before = model.scale.item()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert_close(loss, Model(torch.float32, device)(batch(torch.float32, device)).sum())
    assert model.scale.item() != before
    assert optimizer.step() is None


@pytest.mark.parametrize("name", CLASSES)
def test_it_goes_the_right_direction_with_schedulers(name, aten, device):
    """Torch's test_forloop_goes_right_direction_with_lrsched, over its schedulers: the same way as torch."""
    for makers, (desc, kwargs) in itertools.product(
        INFOS[name].scheduler_inputs, inputs_of(name, torch.float32).items()
    ):
        if torch.is_tensor(kwargs.get("lr")):
            continue  # schedulers fill it: those of torch's that do are in the test of the state
        ends = []
        for ours in (True, False):
            generator = torch.Generator().manual_seed(3)
            weight, x = (torch.randn(10, 5, generator=generator), torch.randn(5, generator=generator))
            p = nn.Parameter(weight.to(device))
            optimizer = make(name, [p], kwargs, ours=ours)
            schedulers = [build(optimizer) for build in makers]
            losses = []
            for _ in range(12):
                optimizer.zero_grad()
                loss = (p @ x.to(device)).square().sum()
                (-loss if kwargs.get("maximize") else loss).backward()
                loss = loss.detach()
                optimizer.step()
                for scheduler in schedulers:
                    scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))
                losses.append(loss.item())
            ends.append((losses, optimizer.param_groups[0]["lr"]))
        assert ends[0][0][-1] < ends[0][0][0], desc
        # twelve steps of fp32, whose differences do not shrink
        assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5, msg=f"{desc}: {{}}".format)


# --- around it --------------------------------------------------------------------------------------------


@names
def test_no_warnings_in_ordinary_use(name, path, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(name, {}, device)


@names
def test_steps_happen_without_recording_gradients(name, path, device):
    p = nn.Parameter(torch.ones(3, device=device))
    optimizer = make(name, [p], {"lr": torch.tensor(0.1)} | ({"momentum": 0.9} if "SGD" in name else {}))
    p.grad = torch.ones_like(p)
    with torch.enable_grad():
        optimizer.step()
    assert p.grad_fn is None
    assert p.requires_grad
    assert all(not s.requires_grad for s in optimizer.state[p].values() if torch.is_tensor(s))


def test_profiler_and_subclasses_find_the_step(path, device):
    """Torch wraps step of each class: for profiles and for hooks, also in classes derived from ours."""

    class Own(optim.AdamW):
        @torch.no_grad()
        def step(self, closure=None):
            return super().step(closure)

    p = nn.Parameter(torch.ones(3, device=device))
    optimizer, calls = Own([p]), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    p.grad = torch.ones_like(p)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert calls
    assert any(event.key == "Optimizer.step#Own.step" for event in profile.key_averages())
    assert p[0] < 1


def test_the_path_of_a_test_is_the_one_it_names(path, device):
    assert backend.runs_kernels(torch.ones(1, device=device)) == (path == "kernels")

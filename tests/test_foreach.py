"""Lists of CPU tensors: torch's fused steps and foreach functions, as our optimizers and averages use them."""

import copy
import itertools
import math
import random

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastreg import ExponentialMovingAverage, optim, penalties
from fastreg.averages import get_ema_multi_avg_fn
from fastreg.ops.multi_tensor import foreach
from fastreg.ops.multi_tensor.optimizers import Member, Numbers, Rule, define
from fastreg.ops.multi_tensor.penalties import project_by_definition_

pytestmark = pytest.mark.usefixtures("aten")

SHAPES = [(5, 7), (3, 4, 2, 2), (6,), (), (0, 3), (3, 0), (1, 9), (40, 3)]
TOLERANCE = {
    torch.float64: 1e-12,  # products and sums in another order, a few roundings of 1e-16
    torch.float32: 1e-5,  # the same, of 6e-8; weights and gradients of one sign and size cancel by two digits
    torch.bfloat16: 2**-6,  # state is rounded before it is used, and weights before they are projected
}


def drawn_rule(draw: random.Random, plain: bool) -> Rule:
    """plain: of 16 bits, without what changes gradients or weights before torch's step."""
    adam = plain or draw.random() < 0.6
    momentum = adam or draw.random() < 0.7
    return Rule(
        adam=adam,
        momentum=momentum,
        nesterov=not adam and momentum and draw.random() < 0.5,
        amsgrad=adam and draw.random() < 0.4,
        cautious=not plain and draw.random() < 0.4,
        rows=draw.choice([None, True, False]),
        average=draw.random() < 0.5,
    )


def drawn_numbers(draw: random.Random, rule: Rule, plain: bool) -> Numbers:
    coupled = not rule.cautious and draw.random() < 0.4
    decay = draw.choice([0.0, 0.1])
    return Numbers(
        lr=draw.choice([0.0, 1e-2, 0.1, torch.tensor(0.1)]),
        lr_0=draw.choice([0.0, 0.2]),
        l2=decay if coupled else 0.0,
        decay=0.0 if coupled else decay,
        beta_1=0.9 if rule.momentum else 0.0,
        beta_2=0.99 if rule.adam else 0.0 if rule.nesterov else draw.choice([0.0, 0.3]),
        eps=1e-3,
        sign=draw.choice([1.0, -1.0]),
        l1_subgradient=0.0 if plain else draw.choice([0.0, 0.05]),
        l1_proximal=draw.choice([0.0, 0.5]),
        max_norm=draw.choice([0.5, 2.0, 1e9]) if rule.rows is not None else math.inf,
        follow=draw.choice([0.0, 0.1, 1.0]) if rule.average else 0.0,
    )


def drawn_member(draw: random.Random, rule: Rule, dtype: torch.dtype) -> Member:
    shape = draw.choice(
        [x for x in SHAPES if len(x) >= 2 or not rule.rows]
    )  # vectors have no rows, and another rule
    last = len(shape) == 4 and draw.random() < 0.5

    def tensor() -> torch.Tensor:
        x = torch.randn(shape).to(dtype)
        return x.to(memory_format=torch.channels_last) if last else x

    counts = rule.adam or rule.momentum
    return Member(
        tensor(),
        tensor(),
        tensor() if rule.momentum else None,
        tensor().square() if rule.adam else None,
        tensor().square() if rule.amsgrad else None,
        average=tensor() if rule.average else None,
        step=torch.tensor(float(draw.choice([0, 1, 5]))) if counts else None,
    )


def lists_of(members: list[Member]) -> foreach.Lists:
    names = ("parameter", "gradient", "first", "second", "largest", "average", "step")
    columns = ([getattr(m, name) for m in members] for name in names)
    return foreach.Lists(*([x for x in column if x is not None] for column in columns))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(60))
def test_lists_take_the_step_of_the_definition(monkeypatch, dtype, seed):
    draw, plain = random.Random(seed), dtype == torch.bfloat16
    torch.manual_seed(seed)
    monkeypatch.setattr(foreach, "PORTION", draw.choice([8, 50, 1 << 20]))
    rule = drawn_rule(draw, plain)
    if plain:
        rule = rule._replace(average=False)  # which would be of another dtype
    numbers = drawn_numbers(draw, rule, plain)
    gain = 1.0 if plain else draw.choice([1.0, 0.3])
    members = [drawn_member(draw, rule, dtype) for _ in range(7)]
    # Where nothing moves, averages do not meet a NaN; and where AMSGrad's maximum loses one, the weights have it.
    odd = draw.random() < 0.3 and float(numbers.lr) and not rule.amsgrad
    if odd and members[0].gradient.numel():
        members[0].gradient[(0,) * members[0].gradient.dim()] = draw.choice([math.inf, math.nan])
    assert all(foreach.walks(member, rule) for member in members)
    expected = copy.deepcopy(members)
    before = [member.gradient.clone() for member in members]
    foreach.step_(lists_of(members), rule, numbers, gain)
    for member, wanted, g in zip(members, expected, before, strict=True):
        define(wanted, rule, numbers, gain)
        assert_close(member.gradient, g, rtol=0, atol=0, equal_nan=True)
        for name in ("parameter", "first", "second", "largest", "average", "step"):
            found, right = getattr(member, name), getattr(wanted, name)
            if found is not None:
                tolerance = TOLERANCE[dtype]
                assert_close(found, right, rtol=tolerance, atol=tolerance, equal_nan=True)


# --- where optimizers take lists ---------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "clip": {"max_grad_norm": 0.5},
    "cautious": {"cautious": True, "weight_decay": 0.1},
    "l1": {"l1": 0.01},
    "subgradient": {"l1": 0.01, "l1_mode": "subgradient"},
    "rows": {"max_norm": 0.5, "max_norm_dim": 0},
    "whole": {"max_norm": 0.5},
    "average": {"ema_decay": 0.9},
}


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    found = [nn.Parameter(torch.randn(shape)) for shape in SHAPES if shape]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


def by_definition(monkeypatch, make, change=lambda params: None) -> list[torch.Tensor]:
    """What two steps give where nothing walks."""
    params = weights()
    with monkeypatch.context() as patch:
        patch.setattr("fastreg.optim.base.walks", lambda member, rule: False)
        optimizer = make(params)
        optimizer.step()
        change(params)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGDW])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_take_lists(monkeypatch, cls, options):
    def make(params):
        return cls(params, lr=0.1, **options)

    params = weights()
    optimizer, versions = make(params), [p._version for p in params]
    gradients = [p.grad.clone() for p in params]
    optimizer.step()
    optimizer.step()
    assert optimizer._plan.lists
    assert not optimizer._plan.rest
    assert not optimizer._plan.torch
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
    for p, g in zip(params, gradients, strict=True):
        assert_close(p.grad, g, rtol=0, atol=0)
    for p, right in zip(params, by_definition(monkeypatch, make), strict=True):
        assert_close(p.detach(), right, rtol=1e-5, atol=1e-5)


def cut(params):
    """Another layout, with gaps."""
    p = params[0]
    p.data = torch.stack([p.data, p.data], -1)[..., 0]


def turn(params):
    p = params[0]
    p.data = p.data.t().contiguous().t()


def turn_gradient(params):
    p = params[0]
    p.grad = p.grad.t().contiguous().t()


def narrow(params):
    """The parameter has another dtype than its state."""
    p = params[0]
    p.data, p.grad = p.data.double(), None
    p.grad = torch.ones_like(p)


@pytest.mark.parametrize("change", [cut, turn, turn_gradient, narrow])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}], ids=["plain", "max_norm"])
def test_what_changes_between_two_steps_is_seen(monkeypatch, change, options):
    def make(params):
        return optim.SGD(params, lr=0.1, momentum=0.9, **options)

    params = weights()
    optimizer = make(params)
    for _ in range(3):  # gradients that are replaced are asked in another way from the third step on
        optimizer.step()
        for p in params:
            p.grad = p.grad.clone()
    with torch.no_grad():
        for p, start in zip(params, weights(), strict=True):
            p.copy_(start)
            optimizer.state[p]["momentum_buffer"].zero_()
    optimizer.step()
    change(params)
    optimizer.step()
    for p, right in zip(params, by_definition(monkeypatch, make, change), strict=True):
        assert_close(p.detach(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scaled_gradients(dtype):
    """As without a scale, but for what overflows, which is left out."""
    found = []
    for scale in (None, 1024.0):
        p = nn.Parameter(torch.arange(1.0, 5.0).to(dtype))
        optimizer = optim.AdamW([p], lr=0.1, max_grad_norm=1.0)
        for value in (0.5, math.inf, -0.25):
            p.grad = torch.full_like(p, value * (scale or 1))
            if scale is None and math.isinf(value):
                continue
            if scale is not None:
                optimizer.grad_scale = torch.tensor(scale)
                optimizer.found_inf = torch.tensor(float(math.isinf(value)))
            optimizer.step()
        found.append(p.detach())
    assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sgd_of_16_bits_is_right(dtype):
    """Torch's fused one is not, before torch 2.14. (Another step of torch rounds the product before it adds it.)"""
    p, g = (torch.randn(64).to(dtype) for _ in range(2))
    right = p.float() - 0.1 * g.float()
    p = nn.Parameter(p)
    p.grad = g
    optim.SGD([p], lr=0.1, momentum=0.9).step()
    assert_close(p.detach(), right.to(dtype), rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_groups_of_several_dtypes():
    params = [nn.Parameter(torch.ones(3, 4, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    optimizer = optim.SGD(params, lr=0.5, max_grad_norm=1e9, max_norm=1.0)
    optimizer.step()
    assert len(optimizer._plan.lists) == 2
    assert_close(float(optimizer.grad_norm), math.sqrt(24 * 4.0))
    for p in params:
        assert_close(p.detach(), torch.zeros_like(p))


# --- norms and projections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [1 << 14, (1 << 14) + 1, (1 << 22) + 3])
def test_norms_of_long_tensors(numel):
    """Eight fp32 sums of 2^11 squares are off by 2^11 roundings of 2^-24; of 2^19 squares, by percents."""
    x = torch.full((numel,), 0.1)
    right = x.double().square().sum()
    assert_close(foreach.squares([x, torch.ones(3)]), right + 3, rtol=2**-13, atol=0)
    p = x.clone()
    foreach.project_([p], 1.0, rows=False)
    assert_close(p.double().norm(), torch.ones((), dtype=torch.float64), rtol=2**-14, atol=0)


def test_squares_beyond_fp32():
    x = torch.tensor([1e30, -1e30])
    assert_close(foreach.squares([x, torch.ones(2)]), x.double().square().sum(), rtol=1e-6, atol=0)
    assert foreach.squares([torch.tensor([math.inf])]) == math.inf
    assert foreach.squares([torch.tensor([math.nan, math.inf])]).isnan()


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_projections_are_those_of_the_definition(dtype, rows):
    ps = [torch.randn(shape).to(dtype) for shape in SHAPES if len(shape) >= 2]
    ps.append(torch.tensor([[math.inf, 1.0], [0.1, 0.1], [math.nan, 9.0]]).to(dtype))
    ps.append(torch.full((2, 3), 1e-3, dtype=dtype))
    ps.append(torch.randn(3, 4, 2, 2).to(dtype, memory_format=torch.channels_last))
    expected = [p.clone() for p in ps]
    before = [p._version for p in ps]
    penalties.max_norm_(ps, 1.5, dim=0 if rows else None)
    inside = 0
    for p, right, version in zip(ps, expected, before, strict=True):
        old = right.clone()
        if right.numel():
            project_by_definition_(right, 1.5, rows)
        # One rounding of the norm, and one of the product.
        assert_close(p, right, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
        if torch.equal(old, right):
            inside += 1
            assert p._version == version
    assert inside >= 3  # two empty ones and the small one


# --- averages ----------------------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.frozen = nn.Parameter(torch.tensor([-math.inf, 1.0]), requires_grad=False)
        self.register_buffer("mask", torch.tensor([0.5, -math.inf, math.inf]))
        self.register_buffer("count", torch.tensor(3))


def test_infinities_of_masks_stay():
    model = Masked()
    ema = ExponentialMovingAverage(model, 0.9)
    with torch.no_grad():
        model.weight += 1
        model.mask[0] = 1.5
        model.count += 1
    old = ema.tensors["weight"].clone()
    for _ in range(2):
        ema.update()
    assert_close(ema.tensors["mask"], torch.tensor([0.69, -math.inf, math.inf]))
    assert_close(ema.tensors["frozen"], model.frozen.detach())
    assert_close(ema.tensors["weight"], old.lerp(model.weight.detach(), 0.1).lerp(model.weight.detach(), 0.1))
    assert ema.tensors["count"] == 4


def test_a_parameter_may_be_frozen_between_two_updates():
    model = nn.Linear(2, 1, bias=False)
    ema = ExponentialMovingAverage(model, 0.9)
    ema.update()
    model.weight.requires_grad_(False).fill_(-math.inf)
    for _ in range(3):
        ema.update()
    assert (ema.tensors["weight"] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_averages_of_the_dtype_of_the_model(dtype):
    """To the bit the definition: in fp32 (fp64), rounded once."""
    ps = [torch.randn(50).to(dtype), torch.randn(3, 5).to(dtype).t()]
    averages = [torch.randn(50).to(dtype), torch.randn(5, 3).to(dtype)]
    wide = torch.promote_types(dtype, torch.float32)
    expected = [a.to(wide).lerp(p.to(wide), 1 - 0.9).to(dtype) for a, p in zip(averages, ps, strict=True)]
    get_ema_multi_avg_fn(0.9)(averages, ps, 1)
    for a, right in zip(averages, expected, strict=True):
        assert_close(a, right, rtol=0, atol=0)


def test_lists_of_other_shapes_are_refused():
    """Also after lists of as many tensors that fit."""
    average = get_ema_multi_avg_fn(0.9)
    average([torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.ones(3)], 1)
    a = [torch.zeros(2), torch.zeros(3)]
    with pytest.raises(ValueError, match="does not fit"):
        average(a, [torch.ones(2), torch.ones(1)], 1)
    assert not any(x.any() for x in a)


def test_another_model_of_the_same_kinds_has_its_own_tensors():
    """What is remembered of kinds holds none of them."""
    for value in itertools.islice(itertools.count(1.0), 3):
        model = nn.Linear(3, 2)
        ema = ExponentialMovingAverage(model, 0.5)
        start = model.weight.detach().clone()
        nn.init.constant_(model.weight, value)
        ema.update()
        assert_close(ema.tensors["weight"], start.lerp(torch.full((2, 3), value), 0.5))

"""DropConnect: statistics of its masks, memory, dense products, inference, layers and errors."""

import math

import pytest
import torch
from drop_connect_cases import (
    SEED,
    SHARING,
    TOLERANCE,
    small_tiles,  # noqa: F401
    tensors,
)
from shared import near
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg.functional as F
import fastreg.nn as fnn
from fastreg import random
from fastreg.ops.linear import drop_connect as ops
from fastreg.random import Stream

# --- the masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "keep", "digits"),
    [(0.5, 1, 1), (0.25, 3, 2), (0.75, 1, 2), (0.3, 179, 8), (0.0, 1, 0), (1.0, 0, 0), (0.01, 507, 9)],
)
def test_chance(p, keep, digits):
    assert random.chance(p) == (keep, digits)


@pytest.mark.parametrize("p", [0.001, 0.02, 0.1, 0.3, 0.5, 0.62, 0.9, 0.99])
def test_chance_is_close(p):
    chance = random.chance(p)
    assert abs(1 - chance.probability - p) <= min(2**-9, min(p, 1 - p) / 16)
    assert chance.digits <= 16


@pytest.mark.parametrize("p", [0.5, 0.25, 0.3, 0.9])
def test_keep_rate_and_independence(p):
    """Chi-square on 2^20 connections: rate, and pairs of neighbours in every index. 6 standard errors: one false
    alarm in 10^8."""
    chance = random.chance(p)
    mask = random.connection_mask(torch.arange(64), 128, 128, chance, Stream(7)).double()
    keep, count = chance.probability, mask.numel()
    assert abs(mask.mean().item() - keep) < 6 * math.sqrt(keep * (1 - keep) / count)
    centred = (mask - keep) / math.sqrt(keep * (1 - keep))
    for dim in range(3):
        for distance in (1, 2, 8, 16):
            length = mask.shape[dim] - distance
            product = centred.narrow(dim, 0, length) * centred.narrow(dim, distance, length)
            assert abs(product.mean().item()) < 6 / math.sqrt(product.numel()), (dim, distance)
    other = random.connection_mask(torch.arange(64), 128, 128, chance, Stream(8)).double()
    other = (other - keep) / math.sqrt(keep * (1 - keep))
    assert abs((centred * other).mean().item()) < 6 / math.sqrt(count)


def false_alarm(statistic: float, degrees: int) -> bool:
    """Whether a chi-square statistic is as far out, on either side, as one in 10^8."""
    above = torch.special.gammaincc(*(torch.tensor(x / 2, dtype=torch.float64) for x in (degrees, statistic)))
    return not 5e-9 < above.item() < 1 - 5e-9


def standardized(
    p: float, seed: int, examples: int = 4096, outputs: int = 8, inputs: int = 24
) -> torch.Tensor:
    """Masks, less their mean and divided by their deviation: float [examples, outputs, inputs]."""
    chance = random.chance(p)
    mask = random.connection_mask(torch.arange(examples), outputs, inputs, chance, Stream(seed)).double()
    return (mask - chance.probability) / math.sqrt(chance.probability * (1 - chance.probability))


@pytest.mark.parametrize(
    ("p", "examples"),
    [(0.5, 2048), (0.25, 1024), (0.3, 512), pytest.param(0.3, 8192, marks=pytest.mark.slow)],
)
def test_chi_square_of_masks(p, examples):
    """Every connection is kept at the rate of p, and independently of the next output, input, example and seed. The
    squared correlation of a pair, times its samples, is chi-square of one degree; disjoint pairs add up.

    Eight statistics a probability, each a false alarm once in 10^8.
    """
    x, other = standardized(p, 7, examples), standardized(p, 8, examples)
    rates = x.mean(0)
    assert not false_alarm(len(x) * rates.square().sum().item(), rates.numel())
    pairs = {
        "output": x[:, ::2] * x[:, 1::2],
        "input": x[:, :, ::2] * x[:, :, 1::2],
        "lane": x[:, :, :8] * x[:, :, 8:16],  # the same lane of the next call of Philox
        "diagonal": x[:, :-1:2, :-1:2] * x[:, 1::2, 1::2],
        "seed": x * other,
    }
    for name, products in pairs.items():
        r = products.mean(0)
        assert not false_alarm(len(x) * r.square().sum().item(), r.numel()), name
    cells = x[0].numel()
    for name, distance in (("example", 1), ("word", 16)):  # the next bit of the lane, and the next lane
        blocks = x.view(-1, 2, distance, cells)
        r = (blocks[:, 0] * blocks[:, 1]).mean(-1)
        assert not false_alarm(cells * r.square().sum().item(), r.numel()), name


def test_the_chi_square_sees_a_flaw():
    """Connections that are kept 5 % more often, or one of 192 that copies its neighbour."""
    x = standardized(0.5, 7)
    biased = x.clone()
    biased[: len(x) // 10] = 1.0
    assert false_alarm(len(x) * biased.mean(0).square().sum().item(), x[0].numel())
    x[:, 0, 0] = x[:, 1, 0]
    r = (x[:, ::2] * x[:, 1::2]).mean(0)
    assert false_alarm(len(x) * r.square().sum().item(), r.numel())


def test_a_connection_is_the_same_in_every_shape():
    chance = random.chance(0.3)
    large = random.connection_mask(torch.arange(40), 12, 30, chance, Stream(3))
    small = random.connection_mask(torch.tensor([39, 2]), 5, 7, chance, Stream(3))
    assert torch.equal(small, large[[39, 2], :5, :7])


@pytest.mark.usefixtures("aten")
@pytest.mark.parametrize("group_size", [1, 3])
def test_moments_are_those_of_the_paper(group_size):
    """E z = Wv, Var z = p / (1 - p) (W ∘ W)(v ∘ v), over 4,000 masks, within 6 standard errors; no covariance of
    outputs, nor of one mask with the next."""
    p, count = 0.3, 4_000
    torch.manual_seed(1)
    v, weight = torch.randn(1, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    options = {} if group_size == 1 else {"mode": "group", "group_size": group_size}
    z = F.drop_connect_linear(v.expand(count * group_size, -1), weight, p=p, seed=SEED, **options)
    z = z.view(count, group_size, 3)
    assert_close(z, z[:, :1].expand_as(z))
    z = z[:, 0]
    dropped = 1 - random.chance(p).probability
    variance = dropped / (1 - dropped) * v.square() @ weight.square().t()
    assert_close(z.mean(0), (v @ weight.t())[0], rtol=0, atol=6 * (variance.max() / count).sqrt().item())
    assert_close(z.var(0), variance[0], rtol=6 * math.sqrt(2.5 / count), atol=0)
    normal = (z - z.mean(0)) / z.std(0)
    for a, b in ((normal, normal), (normal[:-1], normal[1:])):
        r = a.t() @ b / count
        r = r - r.diag().diag() if a is b else r
        assert r.abs().max() < 6 / math.sqrt(count)
    unscaled = F.drop_connect_linear(v, weight, p=p, seed=SEED, inverted=False)
    assert_close(unscaled, z[:1] * (1 - dropped))


# --- memory -----------------------------------------------------------------------------------------------


class _Allocated(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.nbytes)
        return result


@pytest.mark.parametrize("sharing_name", ["example", "group", "batch"])
def test_no_tensor_has_all_masks(path, device, sharing_name, monkeypatch):
    """Forward and backward at 32 examples of 40 x 24 connections: nothing is larger than twice the output. All masks,
    and all masked weights, would be 6 and 24 times as large as it."""
    monkeypatch.setattr(ops, "BLOCK_ROWS", 64)
    examples, outputs, inputs = 32, 40, 24
    v, weight, bias, dz = tensors(device, examples, outputs, inputs)
    leaves = [t.requires_grad_() for t in (v, weight, bias)]
    with _Allocated() as allocated:
        z = F.drop_connect_linear(*leaves, seed=SEED, **SHARING[sharing_name])
        z.backward(dz)
    assert allocated.largest <= 2 * z.nbytes
    with _Allocated() as naive:
        random.connection_mask(torch.arange(examples), outputs, inputs, random.chance(0.5), Stream(SEED))
    assert naive.largest == examples * outputs * inputs  # what it would have seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_is_that_of_the_results():
    """At (256, 4096, 4096) the naive expression has a mask of 4.3e9 connections: 34 GB for it and the masked weights
    in bf16 alone. Ours has its results: z and dv of 2 MB each, dW of 34 MB; and partial sums no larger."""
    device = torch.device("cuda")
    v, weight, bias, dz = tensors(device, 256, 4096, 4096, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (v, weight, bias)]
    for options in SHARING.values():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            F.drop_connect_linear(*leaves, **options)
        # z, fp32 sums of at most 8 splits of it, and a masked copy of W where it is shared by all.
        limit = 17 * v.nbytes + (weight.nbytes if options else 0)
        assert torch.cuda.max_memory_allocated() - before <= limit
        torch.autograd.grad(F.drop_connect_linear(*leaves, **options), leaves, dz)
        assert torch.cuda.max_memory_allocated() - before <= 2 * limit + 2 * weight.nbytes


# --- all or nothing --------------------------------------------------------------------------------------


def test_nothing_and_everything_is_dropped(path, device):
    v, weight, bias, _ = tensors(device, 3, 4, 5)
    assert_close(F.drop_connect_linear(v, weight, bias, 0.0), torch.nn.functional.linear(v, weight, bias))
    assert_close(F.drop_connect_linear(v, weight, bias, 1.0), bias.expand(3, 4))


# --- by dense products ------------------------------------------------------------------------------------


def connections(examples, outputs, inputs, **options):
    """Which connections flipout keeps: bool [examples, outputs, inputs], asked for with one input at a time."""
    kept = []
    for k in range(inputs):
        v = torch.zeros(examples, inputs)
        v[:, k] = 1.0
        z = F.drop_connect_linear(v, torch.ones(outputs, inputs), mode="flipout", seed=SEED, **options)
        assert ((z == 0) | (z == 2)).all()
        kept.append(z == 2)
    return torch.stack(kept, -1)


@pytest.mark.usefixtures("aten")
def test_flipout_keeps_half_of_the_connections_independently():
    """Marginals, and pairs across examples, outputs and inputs, within 6 standard errors."""
    signs = connections(200, 16, 16).double() * 2 - 1
    assert abs(signs.mean().item()) < 6 / math.sqrt(signs.numel())
    # S is drawn once: over the examples alone, a connection is kept half of the time.
    assert (signs.mean(0).abs() < 6 / math.sqrt(200)).all()
    for dim in range(3):
        length = signs.shape[dim] - 1
        product = signs.narrow(dim, 0, length) * signs.narrow(dim, 1, length)
        assert abs(product.mean().item()) < 6 / math.sqrt(200 * 16), dim
    # What flipout has and independent masks have not: of two examples, the agreements at the corners of a rectangle.
    agree = signs[0] * signs[1]
    assert (agree[:-1, :-1] * agree[1:, :-1] * agree[:-1, 1:] * agree[1:, 1:] == 1).all()


def test_flipout_is_the_product_with_its_mask(path, device):
    mask = connections(3, 4, 5).double()
    v, weight, bias, dz = tensors(device, 3, 4, 5)
    leaves = [t.requires_grad_() for t in (v, weight, bias)]
    z = F.drop_connect_linear(*leaves, mode="flipout", seed=SEED)
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    expected = 2 * torch.einsum("bnk,nk,bk->bn", mask, *exact[1::-1]) + exact[2]
    near(z, expected, TOLERANCE[torch.float32])
    gradients = torch.autograd.grad(expected, exact, dz.cpu().double())
    for gradient, wanted in zip(torch.autograd.grad(z, leaves, dz), gradients, strict=True):
        near(gradient, wanted, TOLERANCE[torch.float32])
    unscaled = F.drop_connect_linear(v, weight, bias, mode="flipout", seed=SEED, inverted=False)
    near(unscaled, (expected - exact[2]) / 2 + exact[2], TOLERANCE[torch.float32])


@pytest.mark.usefixtures("aten")
@pytest.mark.parametrize("inverted", [True, False])
def test_gaussian_has_the_moments_of_the_paper(inverted):
    p, count = 0.3, 20_000
    torch.manual_seed(1)
    v, weight = torch.randn(1, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    z = F.drop_connect_linear(v.expand(count, -1), weight, p=p, mode="gaussian", inverted=inverted)
    factor = p / (1 - p) if inverted else p * (1 - p)
    variance = factor * v.square() @ weight.square().t()
    mean = v @ weight.t() * (1 if inverted else 1 - p)
    assert_close(z.mean(0), mean[0], rtol=0, atol=6 * (variance.max() / count).sqrt().item())
    assert_close(z.var(0), variance[0], rtol=6 * math.sqrt(2 / count), atol=0)
    other = F.drop_connect_linear(v.expand(count, -1), weight, p=p, mode="gaussian", inverted=inverted)
    assert not torch.equal(z, other)


@pytest.mark.parametrize("mode", ["gaussian", "flipout"])
def test_derivatives_of_dense_products(path, device, mode):
    v, weight, bias, _ = tensors(device, 3, 2, 4, torch.float64)
    inputs = [t.requires_grad_() for t in (v, weight, bias)]

    def function(*inputs):
        return F.drop_connect_linear(*inputs, mode=mode, activation="silu", seed=SEED)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    zeros = torch.zeros_like(v).requires_grad_()
    F.drop_connect_linear(zeros, weight, bias, mode=mode, seed=SEED).sum().backward()
    assert zeros.grad.isfinite().all()


# --- inference --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("aten")
@pytest.mark.parametrize(
    ("activation", "inverted", "count"),
    [
        ("relu", True, 100_000),
        pytest.param("relu", False, 100_000, marks=pytest.mark.slow),
        pytest.param("tanh", True, 100_000, marks=pytest.mark.slow),
    ],
)
def test_gaussian_inference_is_the_average_over_masks(activation, inverted, count):
    """Of 64 inputs, whose sum is close to normal. The activation of the mean is off by a seventh (relu): it is lower,
    as for every convex function (Jensen), and by far more than the Gaussian."""
    p = 0.5
    torch.manual_seed(2)
    v, weight = torch.randn(1, 64, dtype=torch.float64), torch.randn(2, 64, dtype=torch.float64) / 8
    options = {"inverted": inverted, "activation": activation}
    average = F.drop_connect_linear(v.expand(count, -1), weight, p=p, seed=SEED, **options).mean(0, True)
    gaussian = F.drop_connect_linear(v, weight, p=p, training=False, samples=5_000, seed=SEED, **options)
    mean = F.drop_connect_linear(v, weight, p=p, training=False, inference="mean", **options)
    # 6 standard errors of the average (a deviation of 0.7 at most), and as much for 5,000 draws where they are drawn.
    assert_close(
        gaussian, average, rtol=0, atol=6 * 0.7 * (count**-0.5 + 5_000**-0.5 * (activation != "relu"))
    )
    if activation == "relu":
        assert (gaussian - average).abs().max() < 0.05 * (mean - average).abs().max()
        assert ((average - mean) > 0.08 * average).all()
        assert ((average - mean) > 0.2 * average).any()
    else:
        assert (gaussian - average).abs().max() < 0.2 * (mean - average).abs().max()


def test_inference_without_activation_is_the_mean(device):
    v, weight, bias, _ = tensors(device, 3, 4, 5)
    z = F.drop_connect_linear(v, weight, bias, 0.3, training=False)
    assert_close(z, torch.nn.functional.linear(v, weight, bias))
    z = F.drop_connect_linear(v, weight, bias, 0.3, training=False, inverted=False)
    assert_close(z, torch.nn.functional.linear(v, weight * 0.7, bias))


def test_inference_of_zeros_and_small_numbers():
    """No variance: the activation of the mean, with finite gradients. Squares of small fp16 numbers are not lost."""
    v, weight = torch.zeros(2, 4, requires_grad=True), torch.ones(3, 4)
    z = F.drop_connect_linear(v, weight, torch.tensor([-1.0, 0.0, 2.0]), training=False, activation="relu")
    assert torch.equal(z.detach(), torch.tensor([[0.0, 0.0, 2.0]] * 2))
    z.sum().backward()
    assert v.grad.isfinite().all()
    v, weight = (torch.full((1, 4), 1e-3, dtype=torch.float16) for _ in range(2))
    z = F.drop_connect_linear(
        v, weight * torch.tensor([1, -1, 1, -1]).half(), training=False, activation="relu"
    )
    assert z.item() == pytest.approx(2e-6 / math.sqrt(2 * math.pi), rel=0.1)


# --- layers -----------------------------------------------------------------------------------------------


def test_layer_is_torchs_linear(path, device):
    layer = fnn.DropConnectLinear(5, 4, p=0.25, activation="relu", device=device)
    assert isinstance(layer, torch.nn.Linear)
    assert repr(layer) == (
        "DropConnectLinear(in_features=5, out_features=4, bias=True, p=0.25, mode=example, activation=relu)"
    )
    twin = torch.nn.Linear(5, 4, device=device)
    assert str(layer.load_state_dict(twin.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(3, 5, device=device)
    torch.manual_seed(3)
    z = layer(x)
    torch.manual_seed(3)
    assert torch.equal(z, F.drop_connect_linear(x, layer.weight, layer.bias, 0.25, activation="relu"))
    expected = F.drop_connect_linear(x, layer.weight, layer.bias, 0.25, False, activation="relu")
    assert torch.equal(layer.eval()(x), expected)


def test_convolution_drops_weights(path, device):
    layer = fnn.DropConnectConv2d(2, 3, 3, padding=1, p=0.5, activation="relu", device=device)
    assert "p=0.5, activation=relu" in repr(layer)
    x = torch.randn(2, 2, 5, 4, device=device)
    torch.manual_seed(3)
    z = layer(x)
    torch.manual_seed(3)
    weight = F.dropout(layer.weight, 0.5)
    assert_close(z, torch.nn.functional.conv2d(x, weight, layer.bias, padding=1).relu())
    z.sum().backward()
    dropped = weight == 0
    assert (layer.weight.grad[dropped] == 0).all()
    plain = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1).relu()
    assert torch.equal(layer.eval()(x), plain)


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, "dropout probability has to be between 0 and 1, but got 1.5"),
        ({"mode": "sample"}, "unknown mode 'sample': choose one of example, group, batch, flipout, gaussian"),
        ({"mode": "flipout", "p": 0.3}, 'mode="flipout" is exact for p = 0.5 alone, but got p = 0.3'),
        ({"mode": "group"}, 'mode="group" needs a group_size'),
        ({"group_size": 3}, 'mode="group" needs a group_size, and no other mode has one'),
        ({"mode": "group", "group_size": 0}, "group_size has to be at least 1, but got 0"),
        ({"inference": "exact"}, "unknown inference 'exact'"),
        ({"samples": 0}, "samples has to be at least 1"),
        ({"activation": "cake"}, "unknown activation 'cake'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        F.drop_connect_linear(torch.ones(2, 3), torch.ones(4, 3), **options)
    with pytest.raises(ValueError, match=message):
        fnn.DropConnectLinear(3, 4, **options)


@pytest.mark.parametrize(
    ("v", "weight", "bias"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), None),
        (torch.ones(2, 3), torch.ones(4, 3).double(), None),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(5)),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(4).double()),
    ],
)
def test_what_torchs_linear_refuses(path, v, weight, bias):
    with pytest.raises(RuntimeError) as theirs:
        torch.nn.functional.linear(v, weight, bias)
    with pytest.raises(RuntimeError) as ours:
        F.drop_connect_linear(v, weight, bias)
    assert str(ours.value) == str(theirs.value)

"""torch.func.vmap over all that is random: with each ``randomness=``, seeds and generators, nested, and over grad."""

import math

import pytest
import torch
from every_layer import LAYERS
from torch.func import functional_call, grad, vjp, vmap
from torch.testing import assert_close

import fastreg.functional as F

WEIGHT = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
SIGMAS = WEIGHT.abs()


def _linear(call, **options):
    return lambda x, **source: call(x, WEIGHT, None, 0.5, True, **options, **source)


FUNCTIONS = {  # of an example, and the shape of one
    "dropout": (lambda x, **source: F.dropout(x, 0.5, True, **source), (6,)),
    "dropout classic": (lambda x, **source: F.dropout(x, 0.5, True, inverted=False, **source), (6,)),
    "dropout gelu": (
        lambda x, **source: F.dropout(x, 0.5, True, activation="gelu", residual=x, **source),
        (6,),
    ),
    "dropout1d": (lambda x, **source: F.dropout1d(x, 0.5, True, **source), (3, 2)),
    "dropout1d batch": (lambda x, **source: F.dropout1d(x, 0.5, True, **source), (2, 3, 2)),
    "dropout2d": (lambda x, **source: F.dropout2d(x, 0.5, True, **source), (2, 3, 2, 1)),
    "dropout3d": (lambda x, **source: F.dropout3d(x, 0.5, True, **source), (3, 2, 1, 1)),
    "alpha_dropout": (lambda x, **source: F.alpha_dropout(x, 0.5, True, **source), (6,)),
    "feature_alpha_dropout": (lambda x, **source: F.feature_alpha_dropout(x, 0.5, True, **source), (2, 3, 2)),
    "drop_path": (lambda x, **source: F.drop_path(x, 0.5, True, **source), (4, 3)),
    "dropout_add_layer_norm": (
        lambda x, **source: F.dropout_add_layer_norm(x, x.sin(), (6,), p=0.5, prenorm=True, **source)[1],
        (2, 6),
    ),
    "gaussian_noise": (lambda x, **source: F.gaussian_noise(x, 0.5, True, **source), (6,)),
    "gaussian_noise multiplicative": (
        lambda x, **source: F.gaussian_noise(x, 0.5, True, mode="multiplicative", **source),
        (6,),
    ),
    "drop_connect": (_linear(F.drop_connect_linear), (3, 6)),
    "drop_connect of a vector": (_linear(F.drop_connect_linear), (6,)),
    "drop_connect group": (_linear(F.drop_connect_linear, mode="group", group_size=2), (3, 6)),
    "drop_connect batch": (_linear(F.drop_connect_linear, mode="batch"), (3, 6)),
    "drop_connect flipout": (_linear(F.drop_connect_linear, mode="flipout"), (3, 6)),
    "drop_connect gaussian": (_linear(F.drop_connect_linear, mode="gaussian"), (3, 6)),
    "drop_connect relu": (_linear(F.drop_connect_linear, activation="gelu"), (3, 6)),
    "drop_connect inference": (
        lambda x, **source: F.drop_connect_linear(
            x, WEIGHT, None, 0.5, False, activation="silu", samples=4, **source
        ),
        (3, 6),
    ),
    "noisy_linear": (_linear(F.noisy_linear), (3, 6)),
    "noisy_linear bias": (_linear(F.noisy_linear, bias_sigma=0.3), (3, 6)),
    "noisy_linear multiplicative": (_linear(F.noisy_linear, mode="multiplicative"), (3, 6)),
    "noisy_linear factorised": (
        lambda x, **source: F.noisy_linear(x, WEIGHT, None, SIGMAS, mode="factorised", **source),
        (3, 6),
    ),
}
# f(a x) = a f(x) for a > 0, so that by Euler's theorem <f'(x), x> = f(x).
HOMOGENEOUS = [
    name for name in FUNCTIONS if name not in ("dropout gelu", "gaussian_noise", "noisy_linear bias")
    and not name.endswith(("alpha_dropout", "layer_norm", "relu", "inference"))
]  # fmt: skip

all_functions = pytest.mark.parametrize("name", FUNCTIONS)


def _examples(name, number, device):
    """All alike."""
    function, shape = FUNCTIONS[name]
    return function, torch.randn(shape, device=device).add(3).expand(number, *shape)


def _alike(examples):
    """Up to rounding: products of matrices may differ in it from row to row."""
    return all(torch.allclose(each, examples[0], rtol=1e-4, atol=1e-5) for each in examples)


@pytest.fixture(autouse=True)
def _on_the_device(device, monkeypatch):
    monkeypatch.setitem(globals(), "WEIGHT", WEIGHT.to(device))
    monkeypatch.setitem(globals(), "SIGMAS", SIGMAS.to(device))


@all_functions
def test_error_is_torchs(name, device, path):
    function, x = _examples(name, 3, device)
    with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
        vmap(function)(x)


@all_functions
def test_same_is_one_draw_for_all(name, device, path):
    function, x = _examples(name, 4, device)
    y, z = (vmap(function, randomness="same")(x) for _ in range(2))
    assert _alike(y)
    assert not _alike([*y, *z])


@all_functions
def test_different_is_a_draw_for_each(name, device, path):
    """Neighbours and others are uncorrelated: beyond five standard errors with probability 6e-7 a comparison."""
    function, x = _examples(name, 1000, device)
    y = vmap(function, randomness="different")(x).flatten(1).double()
    varying = y[:, y.std(0) > 0]
    assert varying.shape[1] > 0
    centred = (varying - varying.mean(0)) / varying.std(0)
    for lag in (1, 2, 16, 499):
        correlation = (centred[lag:] * centred[:-lag]).mean(0)
        assert correlation.abs().max() < 5 / math.sqrt(len(y) - lag)


@all_functions
def test_different_on_an_input_that_all_share(name, device, path):
    function, x = _examples(name, 6, device)
    y = vmap(lambda _: function(x[0]), randomness="different")(torch.arange(6, device=device))
    assert len(y) == 6
    assert not _alike(y)


@all_functions
def test_moments_are_those_without_vmap(name, device, aten):
    """Means over draws by vmap and one after the other; five standard errors of their difference."""
    function, x = _examples(name, 1000, device)
    y = vmap(function, randomness="different")(x).double()
    z = torch.stack([function(each) for each in x[:100]]).double()
    spread = (y.var(0) / len(y) + z.var(0) / len(z)).sqrt()
    assert ((y.mean(0) - z.mean(0)).abs() <= 5 * spread + 1e-6).all()


@all_functions
def test_a_seed_draws_nothing(name, device, path):
    function, x = _examples(name, 3, device)
    x = x + torch.arange(3.0, device=device).view(3, *[1] * (x.dim() - 1))
    expected = torch.stack([function(each, seed=7) for each in x])
    assert_close(vmap(lambda each: function(each, seed=7))(x), expected, rtol=1e-5, atol=1e-5)


@all_functions
def test_a_seed_for_each_example(name, device, path):
    function, x = _examples(name, 3, device)
    seeds = torch.tensor([5, -6, 1 << 40], device=device)
    expected = torch.stack([function(each, seed=int(seed)) for each, seed in zip(x, seeds, strict=True)])
    found = vmap(lambda each, seed: function(each, seed=seed))(x, seeds)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


@all_functions
def test_a_generator_obeys_randomness(name, device, path):
    function, x = _examples(name, 8, device)

    def drawn(randomness):
        generator = torch.Generator(device).manual_seed(1)
        return vmap(lambda each: function(each, generator=generator), randomness=randomness)(x)

    same, different = drawn("same"), drawn("different")
    assert _alike(same)
    assert not _alike(different)
    assert drawn("different").equal(different)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        drawn("error")


@all_functions
@pytest.mark.parametrize("inner", ["same", "different"])
@pytest.mark.parametrize("outer", ["same", "different"])
def test_nested(name, inner, outer, device, path):
    """Who shares a draw with whom is as with torch's own dropout."""
    function, x = _examples(name, 30, device)

    def shares(function, x):
        y = vmap(vmap(function, randomness=inner), randomness=outer)(x.unflatten(0, (6, 5)))
        return _alike(y), _alike(y.transpose(0, 1))

    expected = shares(lambda x: torch.nn.functional.dropout(x, 0.5), torch.ones(30, 40, device=device))
    assert shares(function, x) == expected


@pytest.mark.parametrize("name", HOMOGENEOUS)
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradients_are_of_the_same_draw(name, randomness, device, path):
    function, x = _examples(name, 6, device)

    def both(each):
        y, pull = vjp(function, each)
        return y, pull(torch.ones_like(y))[0]

    y, dx = vmap(both, randomness=randomness)(x)
    assert_close((x * dx).flatten(1).sum(1), y.flatten(1).sum(1), rtol=1e-4, atol=1e-4)
    assert _alike(dx) == (randomness == "same")


@pytest.mark.parametrize("name", [name for name in LAYERS if "Drop" in name or "Nois" in name])
@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_gradients_of_every_layer_for_each_example(name, randomness, device, path):
    """As differential privacy takes them: vmap over grad over a layer."""
    case = LAYERS[name]
    layer = case.make().to(device)
    x = torch.ones(2, *case.shape, device=device)

    def loss(parameters, x):
        return functional_call(layer, parameters, x).square().sum()

    parameters = dict(layer.named_parameters())
    per_example = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0), randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness error mode"):
            per_example(parameters, x)
        return
    gradients, dx = per_example(parameters, x)
    assert _alike(dx) == (randomness == "same")
    for key, value in gradients.items():
        assert value.shape == (2, *parameters[key].shape)

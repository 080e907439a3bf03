"""Layers of batch, group and instance normalization beside torch's: layouts, state, running statistics."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from norm_cases import (
    BATCH_NORMS,
    CHANNELS,
    INSTANCE_NORMS,
    KINDS,
    LAYOUTS,
    RANK,
    SHAPES,
    _layer,
    _statistics,
    all_kinds,
    all_modules,
    assert_computed_alike,
    assert_layers_agree,
    assert_states_agree,
    check_gradients,
    on_both,
    randomize,
    some_modules,
    tensors,
)
from shared import assert_same, outcome
from torch.testing import assert_close

import fastreg.functional as FF
import fastreg.nn as fnn

FORMATS = {"contiguous": None, "channels_last": {4: torch.channels_last, 5: torch.channels_last_3d}}


@on_both(
    "kind layout rank",
    KINDS,
    LAYOUTS,
    (3, 4, 5),
    fast=lambda kind, layout, rank: (
        (kind in ("batch_norm", "group_norm") and rank == 4)
        or (layout == "channels_last" and (rank == 4 or kind == "batch_norm"))
    ),
)
def test_any_layout_has_the_values_and_gradients_of_torch(kind, layout, rank, device, path):
    if rank != 4 and layout not in ("contiguous", "channels_last", "transposed"):
        pytest.skip("rank 4 has it")
    x, weight, bias, _ = tensors(SHAPES[rank], device, torch.float32)
    x = LAYOUTS[layout](x)
    dy = torch.randn(SHAPES[rank], device=device)
    y, gradients = check_gradients(kind, (x, weight, bias, None), dy, path)
    if path == "aten":
        expected = KINDS[kind](F, x, weight, bias)
        assert y.stride() == expected.stride()
        assert gradients[0].stride() == torch.autograd.grad(expected, x, dy)[0].stride()
        return
    if layout in FORMATS and rank > 3 and not (kind.startswith("instance_norm") and layout != "contiguous"):
        # Torch's instance normalization on its own leaves channels last; ours need not.
        wanted = (FORMATS[layout] or {}).get(rank, torch.contiguous_format)
        assert y.is_contiguous(memory_format=wanted)
        assert gradients[0].is_contiguous(memory_format=wanted)


@on_both(
    "kind layout upstream",
    KINDS,
    ("contiguous", "channels_last"),
    ("contiguous", "channels_last", "transposed", "gaps", "expanded_samples", "one_number"),
    fast=lambda kind, layout, upstream: (
        kind in ("batch_norm", "group_norm", "batch_norm_evaluation")
        and (layout, upstream)
        in [("contiguous", "channels_last"), ("channels_last", "gaps"), ("contiguous", "one_number")]
    ),
)
def test_upstream_gradients_and_residuals_of_another_layout(kind, layout, upstream, device, path):
    x, weight, bias, residual = tensors(SHAPES[4], device, torch.float32)
    other = LAYOUTS.get(upstream, lambda x: x[:1, :1, :1, :1].expand(x.shape))
    dy = other(torch.randn(SHAPES[4], device=device))
    given = (LAYOUTS[layout](x), weight, bias, other(residual).detach())
    check_gradients(kind, given, dy, path, activation="silu")


@all_kinds
def test_parameters_and_statistics_that_are_views(kind, device, path):
    """Every second element of a larger tensor: running statistics have to be updated where they lie."""
    x, weight, bias, _ = tensors(SHAPES[4], device, torch.float32)
    strided = [t.repeat_interleave(2)[::2].detach() for t in (weight, bias)]
    check_gradients(kind, (x, *strided, None), torch.randn_like(x), path)
    if kind.endswith("evaluation") or kind == "group_norm":
        return
    stores = [torch.linspace(1, 3, 2 * CHANNELS, device=device) for _ in range(4)]
    mean, var, expected_mean, expected_var = (store[::2] for store in stores)
    getattr(FF, kind)(x, mean, var, *strided, True)
    getattr(F, kind)(x, expected_mean, expected_var, *strided, True)
    for store, expected in zip(stores[:2], stores[2:], strict=True):
        assert_computed_alike(store, expected)
        assert_same(store[1::2], torch.linspace(1, 3, 2 * CHANNELS, device=device)[1::2])


# --- modules ----------------------------------------------------------------------------------------------

CONSTRUCTIONS = [
    {},
    {"eps": 1e-3},
    {"affine": False},
    {"affine": True, "track_running_stats": True, "momentum": 0.3},
    {"momentum": None, "track_running_stats": True},
    {"track_running_stats": False},
    {"dtype": torch.float64},
    {"affine": True, "dtype": torch.bfloat16},
    {"device": "meta"},
    {"affine": True, "bias": False},
]


def constructions(name):
    for options in CONSTRUCTIONS:
        if name == "GroupNorm" and options.keys() & {"momentum", "track_running_stats"}:
            continue
        yield options


@all_modules
def test_layers_are_torchs_in_type_text_state_and_attributes(name):
    for options in constructions(name):
        (error, layer), (expected, stock) = (
            outcome(functools.partial(_layer, nn, name, **options)) for nn in (fnn, torch.nn)
        )
        if stock is None:  # torch 2.11 has no ``bias``
            assert (error[0], expected[0]) == (TypeError, TypeError)
            continue
        assert isinstance(layer, type(stock))
        assert type(layer) is not type(stock)
        assert (layer.extra_repr(), repr(layer)) == (stock.extra_repr(), repr(stock))
        assert list(layer.state_dict()) == list(stock.state_dict())
        for key, value in stock.state_dict().items():
            mine = layer.state_dict()[key]
            assert (mine.shape, mine.dtype, mine.device) == (value.shape, value.dtype, value.device)
            if not value.is_meta:
                assert_same(mine, value)
        assert {k for k, _ in layer.named_parameters()} == {k for k, _ in stock.named_parameters()}
        assert {k for k, _ in layer.named_buffers()} == {k for k, _ in stock.named_buffers()}
        attributes = {key for key in vars(stock) if not key.startswith("_")}
        assert {key for key in vars(layer) if not key.startswith("_")} == attributes | {"activation"}
        assert all(getattr(layer, key) == getattr(stock, key) for key in attributes)
        assert layer.training
        assert not layer.eval().training
        assert layer._version == stock._version
        assert type(layer).__constants__ == type(stock).__constants__


@all_modules
def test_an_activation_is_added_to_the_text_and_to_nothing_else(name):
    layer, plain = _layer(fnn, name, activation="silu"), _layer(fnn, name)
    assert layer.extra_repr() == f"{plain.extra_repr()}, activation=silu"
    assert list(layer.state_dict()) == list(plain.state_dict())


@some_modules
def test_state_goes_both_ways(name, device, path):
    options = {} if name == "GroupNorm" else {"affine": True, "track_running_stats": True}
    x = torch.randn(SHAPES[RANK[name]], device=device)
    for nn, other in ((fnn, torch.nn), (torch.nn, fnn)):
        source, target = _layer(nn, name, **options).to(device), _layer(other, name, **options).to(device)
        randomize(source)
        source(x)
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        assert_same(dict(target.state_dict()), dict(source.state_dict()))
        assert_computed_alike(target.eval()(x), source.eval()(x))
    # A state dict of before torch 0.4.1 has no counter.
    if name in BATCH_NORMS:
        old = {k: v for k, v in source.state_dict().items() if k != "num_batches_tracked"}
        for strict in (True, False):
            layers = [_layer(nn, name).to(device) for nn in (fnn, torch.nn)]
            mine, theirs = (
                outcome(functools.partial(layer.load_state_dict, old, strict)) for layer in layers
            )
            assert str(mine) == str(theirs)


@pytest.mark.parametrize("activation", [None, "gelu"])
@some_modules
def test_layers_survive_copy_and_pickle(name, activation, device, path):
    layer = _layer(fnn, name, affine=True, activation=activation).to(device)
    randomize(layer)
    x = torch.randn(SHAPES[RANK[name]], device=device)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = layer(x)
    for twin in twins:
        assert type(twin) is type(layer)
        assert repr(twin) == repr(layer)
        assert_same(twin(x), expected)
        assert_same(dict(twin.state_dict()), dict(layer.state_dict()))


@some_modules
def test_a_layer_of_torch_may_change_its_class(name, device, path):
    stock = _layer(torch.nn, name).to(device)
    layer = copy.deepcopy(stock)
    layer.__class__ = getattr(fnn, name)
    assert repr(layer) == repr(stock)
    assert_layers_agree(layer, stock, torch.randn(SHAPES[RANK[name]], device=device), path == "aten")


@some_modules
def test_factory_arguments(name, device, path):
    layer = _layer(fnn, name, affine=True, device=device, dtype=torch.float64)
    assert all(
        (t.dtype, t.device.type) == (torch.float64, device.type)
        for t in (*layer.parameters(), *layer.buffers())
        if t.is_floating_point()
    )
    x = torch.randn(SHAPES[RANK[name]], dtype=torch.float64, device=device)
    assert layer(x).dtype == torch.float64
    meta = _layer(fnn, name, affine=True, device="meta")
    y = meta(x.float().to("meta"))
    assert (y.device.type, y.shape) == ("meta", x.shape)
    materialized = meta.to_empty(device=device)
    materialized.reset_parameters()
    assert_computed_alike(materialized(x.float()), _layer(torch.nn, name, affine=True).to(device)(x.float()))


@some_modules
def test_conversions_move_a_layer_as_they_move_torchs(name, device, path):
    options = {} if name == "GroupNorm" else {"track_running_stats": True}
    for convert in (torch.nn.Module.double, torch.nn.Module.half, torch.nn.Module.bfloat16):
        layer, stock = (
            convert(_layer(nn, name, affine=True, **options).to(device)) for nn in (fnn, torch.nn)
        )
        assert [t.dtype for t in layer.state_dict().values()] == [
            t.dtype for t in stock.state_dict().values()
        ]
        x = torch.randn(SHAPES[RANK[name]], device=device).to(layer.weight.dtype)
        assert layer(x).dtype == x.dtype


@some_modules
def test_fused_layers_are_activation_of_norm_plus_residual(name, device, path):
    options = {} if name == "GroupNorm" else {"track_running_stats": True}
    layer = _layer(fnn, name, affine=True, activation="gelu", **options).to(device)
    stock = _layer(torch.nn, name, affine=True, **options).to(device).double()
    randomize(layer)
    stock.load_state_dict(layer.state_dict())
    x, residual = torch.randn(2, *SHAPES[RANK[name]], device=device)
    for training in (True, False):
        layer.train(training)
        stock.train(training)
        assert_computed_alike(layer(x, residual=residual), F.gelu(stock(x.double()) + residual))
        assert_computed_alike(layer(x), F.gelu(stock(x.double())))
    for key, value in stock.state_dict().items():
        assert_computed_alike(
            layer.state_dict()[key].double(), value.double(), 1e9
        )  # 1e9 fp64 ulps: fp32 statistics
    if name in INSTANCE_NORMS:
        assert_computed_alike(layer(x[0], residual=residual[0]), F.gelu(stock(x[0].double()) + residual[0]))


@some_modules
def test_layers_train_in_a_sequential(name, device, path):
    shape = SHAPES[RANK[name]]

    def model(nn):
        torch.manual_seed(2)
        return torch.nn.Sequential(
            torch.nn.Linear(shape[-1], 4), _layer(nn, name, affine=True), torch.nn.Linear(4, 2)
        ).to(device)

    mine, theirs = model(fnn), model(torch.nn)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    x = torch.randn(shape, device=device)
    for m in (mine, theirs):
        m(x).square().sum().backward()
    for p, expected in zip(mine.parameters(), theirs.parameters(), strict=True):
        # The bias in front of batch normalization has gradient 0, of terms as large as those of the weight.
        assert_computed_alike(p.grad, expected.grad, 20.0)
    assert_computed_alike(mine.eval()(x), theirs.eval()(x))


# --- running statistics -----------------------------------------------------------------------------------


@on_both(
    "name momentum dtype",
    (*BATCH_NORMS, *INSTANCE_NORMS),
    (0.1, None, 0.0, 1.0, 0.7),
    (torch.float64, torch.float32),
    fast=lambda name, momentum, dtype: (
        (name, momentum, dtype)
        in [
            ("BatchNorm1d", None, torch.float32),
            ("BatchNorm2d", None, torch.float64),
            ("BatchNorm2d", 0.7, torch.float64),
            ("BatchNorm3d", 0.1, torch.float32),
            ("InstanceNorm2d", 0.1, torch.float32),
        ]
    ),
)
def test_running_statistics_after_several_steps(name, momentum, dtype, device, path):
    layer, stock = (
        _layer(nn, name, momentum=momentum, track_running_stats=True).to(device, dtype)
        for nn in (fnn, torch.nn)
    )
    places = [buffer.data_ptr() for buffer in layer.buffers()]
    close = assert_same if path == "aten" else assert_computed_alike
    for step in range(4):
        # fp64 shows a momentum that went through fp32.
        x = 3 * torch.randn((step + 2, *SHAPES[RANK[name]][1:]), dtype=dtype, device=device) + step
        layer(x)
        stock(x)
        close(layer.running_mean, stock.running_mean)
        close(layer.running_var, stock.running_var)
        assert layer.num_batches_tracked == stock.num_batches_tracked
    assert [buffer.data_ptr() for buffer in layer.buffers()] == places
    close(layer.eval()(x), stock.eval()(x))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(x)
    assert_same(dict(layer.state_dict()), before)
    layer.reset_running_stats()
    stock.reset_running_stats()
    assert_same(dict(layer.state_dict()), dict(stock.state_dict()))


@on_both("name", ("BatchNorm2d", "InstanceNorm2d"), fast="BatchNorm2d".__eq__)
def test_settings_changed_after_construction_are_honoured(name, device, path):
    """``update_bn`` of torch sets ``momentum = None``; others switch tracking, or take the buffers away."""
    x = torch.randn(SHAPES[4], device=device) + 1
    changes = [
        lambda layer: setattr(layer, "momentum", None),
        lambda layer: setattr(layer, "momentum", 1.0),
        lambda layer: setattr(layer, "eps", 0.5),
        lambda layer: setattr(layer, "track_running_stats", False),
        lambda layer: setattr(layer, "num_batches_tracked", None),
        lambda layer: (setattr(layer, "num_batches_tracked", None), setattr(layer, "momentum", None)),
        lambda layer: (setattr(layer, "running_mean", None), setattr(layer, "running_var", None)),
        lambda layer: setattr(layer, "bias", None),
    ]
    close = assert_same if path == "aten" else assert_computed_alike
    for change in changes:
        layer, stock = (
            _layer(nn, name, affine=True, track_running_stats=True).to(device) for nn in (fnn, torch.nn)
        )
        for m in (layer, stock):
            m(x)
            change(m)
        for training in (True, False):
            (actual, y), (expected, expected_y) = (
                outcome(lambda m=m, training=training: m.train(training)(x)) for m in (layer, stock)
            )
            assert actual == expected
            if expected_y is not None:
                close(y, expected_y)
        assert_states_agree(layer, stock, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", ["fp32", "same"])
def test_16_bit_training_keeps_statistics_in_their_own_dtype(parameters, dtype, device, path):
    layer = fnn.BatchNorm2d(CHANNELS).to(device, dtype if parameters == "same" else torch.float32)
    stock = copy.deepcopy(layer).double()
    x = (torch.randn(SHAPES[4], device=device) + 0.5).to(dtype)
    y, expected = layer(x), stock(x.double())
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    # ATen keeps scale and shift in 16 bits: three more roundings of values up to 3.
    tolerance = (
        {"rtol": 1.01 * eps, "atol": 1e-6} if path == "kernels" else {"rtol": 4 * eps, "atol": 4 * eps}
    )
    assert_close(y.double(), expected, **tolerance)
    for buffer in ("running_mean", "running_var"):
        mine, exact = getattr(layer, buffer), getattr(stock, buffer)
        assert mine.dtype == (dtype if parameters == "same" else torch.float32)
        # Rounded after the product and after the sum.
        assert_close(mine.double(), exact, rtol=2 * torch.finfo(mine.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("given", ["mean", "var"])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_one_statistic_alone_is_updated_alone(name, given, device, path):
    x = torch.randn(SHAPES[4], device=device) + 1
    for f in (FF, F):
        statistic = torch.linspace(0, 1, CHANNELS, device=device)
        arguments = (statistic, None) if given == "mean" else (None, statistic)
        result, _ = outcome(
            lambda f=f, arguments=arguments: getattr(f, name)(x, *arguments, None, None, True)
        )
        if f is FF:
            mine, my_result = statistic, result
    assert my_result == result
    assert_computed_alike(mine, statistic)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_statistics_are_not_touched_by_evaluation_or_by_the_backward_pass(name, device, path):
    x, weight, bias, _ = tensors(SHAPES[4], device, torch.float32)
    mean, var = _statistics(x)
    before = mean.clone(), var.clone()
    x.requires_grad_()
    getattr(FF, name)(x, mean, var, weight, bias, False).sum().backward()
    assert_same((mean, var), before)
    y = getattr(FF, name)(x, mean, var, weight, bias, True)
    after = mean.clone(), var.clone()
    y.sum().backward()
    assert_same((mean, var), after)


def test_update_bn_works_on_our_layers(device, path):
    def model(nn):
        torch.manual_seed(4)
        layers = [
            torch.nn.Linear(5, CHANNELS),
            nn.BatchNorm1d(CHANNELS),
            torch.nn.ReLU(),
            nn.BatchNorm1d(CHANNELS),
        ]
        return torch.nn.Sequential(*layers).to(device)

    batches = [torch.randn(n, 5, device=device) for n in (4, 7, 3)]
    mine, theirs = model(fnn), model(torch.nn)
    for m in (mine, theirs):
        m(batches[0] + 5)  # statistics that have to be forgotten
        torch.optim.swa_utils.update_bn(batches, m, device=device)
        assert m[1].momentum == 0.1
    for key, value in theirs.state_dict().items():
        assert_computed_alike(mine.state_dict()[key].double(), value.double(), 1e9)  # fp32 statistics
    assert mine[1].num_batches_tracked == 3


def test_tools_that_look_for_torchs_classes_find_ours(device, path):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, CHANNELS, 3), fnn.BatchNorm2d(CHANNELS)).to(device)
    x = torch.randn(4, 2, 6, 5, device=device)
    model(x)
    model.eval()
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(*model)
    # A convolution and a product in another order: some ulps of sums of 18 terms.
    assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    synchronized = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert type(synchronized[1]) is torch.nn.SyncBatchNorm
    frozen = torch.func.replace_all_batch_norm_modules_(copy.deepcopy(model).train())
    assert frozen[1].running_mean is None
    assert_computed_alike(frozen(x), torch.nn.BatchNorm2d(CHANNELS).to(device)(frozen[0](x)))

"""Dropout under PyTorch's own suites: OpInfo, gradcheck, opcheck, torch.func, autocast, checkpointing.

Everything runs on both backends (fixture ``path``): on the kernels and on the definition in ATen.
"""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from dropout_cases import (
    FORMS,
    LAYOUTS,
    SEED,
    SHAPES,
    all_forms,
    constants,
    kept_of,
    ours,
    theirs,
    torch_forms,
)
from shared import Marked, ending
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db, sample_inputs_dropout
from torch.testing._internal.common_modules import module_db
from torch.utils.checkpoint import checkpoint

import fastreg.functional as FF
import fastreg.nn as fnn
from fastreg import random
from fastreg.ops import backend

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MODULES = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]
FUNCTION_OF = {
    "Dropout": "dropout",
    "Dropout1d": "dropout1d",
    "Dropout2d": "dropout2d",
    "Dropout3d": "dropout3d",
    "AlphaDropout": "alpha_dropout",
    "FeatureAlphaDropout": "feature_alpha_dropout",
    "DropPath": "drop_path",
}
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


# --- OpInfo -----------------------------------------------------------------------------------------------

OP_INFOS = [op for op in op_db if op.name.removeprefix("nn.functional.") in FORMS]
OP_CASES = [
    pytest.param(
        op,
        dtype,
        id=f"{op.name.removeprefix('nn.functional.')}-{op.variant_test_name}-{str(dtype)[6:]}",
        marks=[pytest.mark.slow] if dtype == torch.float16 else [],  # bf16 is the other 16-bit type
    )
    for op in OP_INFOS
    for dtype in sorted(op.dtypes, key=str)
]


def test_op_info_knows_what_it_is_asked_for():
    assert {op.name for op in OP_INFOS} >= {
        f"nn.functional.{name}"
        for name in ("dropout", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    }


def check_sample(name, sample, path):
    x, kwargs = sample.input, sample.kwargs
    p = kwargs.get("p", 0.5)
    training = kwargs.get("training", not FORMS[name][1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout2d warns of [N, C, L]
        expected = theirs(name)(x, *sample.args, **kwargs)
        if x.is_floating_point():
            x = x.detach().clone().requires_grad_()
        y = ours(name)(x, *sample.args, **kwargs)
    assert (y.shape, y.dtype, y.stride(), y.device) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
        expected.device,
    )
    assert y.requires_grad == x.requires_grad
    if not training or p == 0:
        assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        return
    unbatched = (name, x.dim()) in (("dropout3d", 4), ("dropout1d", 2))
    kept = kept_of(y, x, name, p, path == "aten", unbatched=unbatched)
    if p == 1:
        assert not kept.any()
    dy = torch.ones_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    a = constants(name, p, path == "aten")[0]
    # One rounding of a, and for torch one more of the product.
    tolerance = 2 * torch.finfo(x.dtype).eps
    expected = torch.full_like(x, a).where(kept, 0)
    undecided = (dx != 0) & ~kept  # values that alpha dropout maps to what it drops to, if it keeps them
    assert FORMS[name][1] or not undecided.any()
    assert undecided.sum() <= 0.1 * undecided.numel()
    assert_close(dx[~undecided], expected[~undecided], rtol=tolerance, atol=0)


@pytest.mark.parametrize(("op", "dtype"), OP_CASES)
def test_op_info_samples_act_as_in_torch(op, dtype, device, path):
    name = op.name.removeprefix("nn.functional.")
    samples = list(op.sample_inputs(device, dtype))
    if op.reference_inputs_func is not None:
        samples += op.reference_inputs(device, dtype)
    assert samples
    for sample in samples:
        check_sample(name, sample, path)


@all_dtypes
def test_op_info_samples_of_dropout2d_in_one_dimension_act_as_in_torch_for_dropout1d(dtype, device, path):
    # torch has no OpInfo of dropout1d: its generator of dropout samples, for that function's ranks.
    for sample in sample_inputs_dropout(None, device, dtype, False, valid_input_dim=(2, 3)):
        check_sample("dropout1d", sample, path)


def test_op_info_error_inputs_raise_as_in_torch(device, path):
    for op in OP_INFOS:
        if op.error_inputs_func is None:
            continue  # so far torch lists none for any of them
        for error in op.error_inputs(device):
            sample = error.sample_input
            with pytest.raises(error.error_type, match=error.error_regex):
                ours(op.name.removeprefix("nn.functional."))(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch_forms
def test_strides_are_those_of_torch(name, layout, device, path):
    x = LAYOUTS[layout](torch.randn(SHAPES[name], device=device))
    for training in (True, False):
        y, expected = ours(name)(x, 0.3, training), theirs(name)(x, 0.3, training)
        assert (y.shape, y.stride()) == (expected.shape, expected.stride())
    if layout != "empty":
        kept_of(ours(name)(x, 0.3, True), x, name, 0.3, path == "aten")


@all_dtypes
@all_forms
def test_any_probability_scales_what_it_keeps_and_drops_the_rest(name, dtype, device, path):
    x = torch.randn(SHAPES[name], device=device, dtype=dtype)
    for p in (0.1, 0.3, 0.9):
        kept_of(ours(name)(x, p, True), x, name, p, path == "aten")


@all_forms
def test_in_place_writes_into_the_input_and_has_the_same_gradient(name, device, path):
    x = torch.randn(SHAPES[name], device=device, requires_grad=True)
    dy = torch.randn(SHAPES[name], device=device)
    y = ours(name)(x, 0.5, True, seed=SEED)
    (expected,) = torch.autograd.grad(y, x, dy)
    before = x.clone()
    result = ours(name)(before, 0.5, True, True, seed=SEED)
    assert result is before
    assert_close(result, y, rtol=0, atol=0)
    (dx,) = torch.autograd.grad(result, x, dy)
    assert_close(dx, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "shape"), [("dropout1d", (4, 5)), ("dropout3d", (4, 2, 1, 3))])
def test_in_place_on_an_unbatched_input(name, shape, device, path):
    x = torch.randn(shape, device=device, requires_grad=True)
    before = x.clone()
    result = ours(name)(before, 0.5, True, True)
    assert result is before
    kept = kept_of(result, x, name, 0.5, path == "aten", unbatched=True)
    (dx,) = torch.autograd.grad(result.sum(), x)
    assert_close(dx, torch.where(kept, 2.0, 0.0), rtol=0, atol=0)


# --- errors -----------------------------------------------------------------------------------------------

ERROR_CASES = {
    "p_below_0": lambda f, x: f(x, -0.1, True),
    "p_above_1": lambda f, x: f(x, 1.1, True),
    "p_above_1_in_evaluation": lambda f, x: f(x, 1.1, False),
    "scalar": lambda f, x: f(x.flatten()[0], 0.5, True),
    "rank_1": lambda f, x: f(x.flatten(), 0.5, True),
    "rank_1_in_evaluation": lambda f, x: f(x.flatten(), 0.5, False),
    "rank_2": lambda f, x: f(x.flatten(1), 0.5, True),
    "rank_3": lambda f, x: f(x.reshape(*x.shape[:2], -1), 0.5, True),
    "rank_6": lambda f, x: f(x.reshape(*x.shape, *[1] * (6 - x.dim())), 0.5, True),
    "integers": lambda f, x: f(x.long(), 0.5, True),
    "integers_in_evaluation": lambda f, x: f(x.long(), 0.5, False),
    "integers_p_1": lambda f, x: f(x.long(), 1.0, True),
    "complex": lambda f, x: f(x.to(torch.complex64), 0.5, True),
    "in_place_on_a_leaf": lambda f, x: f(x.clone().requires_grad_(), 0.5, True, True),
    "in_place_on_a_leaf_p_1": lambda f, x: f(x.clone().requires_grad_(), 1.0, True, True),
    "in_place_on_expanded": lambda f, x: f(x[:1].expand(x.shape), 0.5, True, True),
}


@pytest.mark.parametrize("case", ERROR_CASES)
@torch_forms
def test_errors_and_warnings_are_those_of_torch(name, case, device, path):
    x = torch.randn(SHAPES[name], device=device)
    call = ERROR_CASES[case]
    assert ending(lambda: call(ours(name), x)) == ending(lambda: call(theirs(name), x))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("p", [-0.1, 1.1, 2])
def test_constructors_refuse_what_torch_refuses(module, p):
    expected = ending(lambda: getattr(torch.nn, module)(p))
    assert expected[0] is ValueError
    assert ending(lambda: getattr(fnn, module)(p)) == expected


# --- modules ----------------------------------------------------------------------------------------------

# (constructor arguments, in ModuleInfo's manner): torch's module_db lists no dropout layers.
CONSTRUCTORS = [
    ((), {}),
    ((0.3,), {}),
    ((), {"p": 0.0}),
    ((0.5, True), {}),
    ((), {"p": 1.0, "inplace": True}),
]


def module_inputs(module):
    for info in module_db:
        if info.module_cls is getattr(torch.nn, module):
            for entry in info.module_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
            ):
                yield entry.constructor_input.args, entry.constructor_input.kwargs
    yield from CONSTRUCTORS


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_torchs_in_type_text_state_and_result(module, device, path):
    name = FUNCTION_OF[module]
    x = torch.randn(SHAPES[name], device=device)
    for args, kwargs in module_inputs(module):
        layer, reference = getattr(fnn, module)(*args, **kwargs), getattr(torch.nn, module)(*args, **kwargs)
        assert isinstance(layer, type(reference))
        assert (layer.extra_repr(), repr(layer)) == (reference.extra_repr(), repr(reference))
        assert list(layer.state_dict()) == list(reference.state_dict()) == []
        assert layer.load_state_dict(reference.state_dict())
        y, expected = layer(x.clone()), reference(x.clone())
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
        kept_of(y, x, name, layer.p, path == "aten")
        assert not layer.eval().training
        assert_close(layer(x), reference.eval()(x), rtol=0, atol=0)
        assert layer.train().training
        for attribute in ("p", "inplace", "training"):
            assert getattr(layer, attribute) == getattr(reference.train(), attribute)


@pytest.mark.parametrize("module", [*MODULES, "DropPath"])
def test_modules_survive_copy_and_pickle_with_their_options(module, device, path):
    options = {"activation": "gelu"} if "Alpha" in module else {"activation": "gelu", "inverted": False}
    layer = getattr(fnn, module)(0.25, **options)
    x = torch.randn(SHAPES[FUNCTION_OF[module]], device=device)
    torch.manual_seed(3)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert repr(twin) == repr(layer)
        torch.manual_seed(3)
        assert_close(twin(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("module", [*MODULES, "DropPath"])
def test_modules_are_transparent_in_a_sequential(module, device, path):
    shape = SHAPES[FUNCTION_OF[module]]
    layer = getattr(fnn, module)(0.5)
    model = torch.nn.Sequential(torch.nn.Linear(shape[-1], 4), layer, torch.nn.Linear(4, 2)).to(device)
    x = torch.randn(shape, device=device)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    model.eval()
    assert not layer.training
    assert_close(model(x), model[2](model[0](x)), rtol=0, atol=0)


def test_modules_of_a_channel_form_warn_and_fail_as_torch_does(device, path):
    for module in ("Dropout1d", "Dropout2d", "Dropout3d"):
        for shape in [(3,), (3, 4), (3, 4, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5), (1, 1, 2, 1, 2, 2)]:
            x = torch.randn(shape, device=device)
            for training in (True, False):
                layer = getattr(fnn, module)().train(training)
                reference = getattr(torch.nn, module)().train(training)
                assert ending(partial(layer, x)) == ending(partial(reference, x)), (module, shape, training)


# --- autocast, checkpointing, fake and meta tensors, export, fx -------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch_forms
def test_autocast_gives_the_dtypes_of_torch(name, dtype, device, path):
    x = torch.randn(SHAPES[name], device=device, dtype=dtype)
    linear = torch.nn.Linear(SHAPES[name][-1], SHAPES[name][-1], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert ours(name)(x, 0.5, True).dtype == theirs(name)(x, 0.5, True).dtype == dtype
        y = ours(name)(linear(x.float()), 0.5, True)
        assert y.dtype == theirs(name)(linear(x.float()), 0.5, True).dtype == torch.bfloat16
        # fp32 parameters and residuals beside a bf16 activation, as in torch's own sums.
        bias, residual = linear.bias, torch.randn(SHAPES[name], device=device)
        fused = ours(name)(linear(x.float()), 0.5, True, bias=bias, activation="gelu", residual=residual)
    assert fused.dtype == torch.float32
    (y.float().sum() + fused.sum()).backward()
    assert linear.weight.grad.dtype == linear.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_checkpointing_draws_the_same_mask_again(use_reentrant, fused, device, path):
    layer = torch.nn.Linear(6, 8, bias=not fused, dtype=torch.float64, device=device)
    bias = torch.nn.Parameter(torch.randn(8, dtype=torch.float64, device=device))
    drop = fnn.Dropout(0.5, activation="gelu") if fused else fnn.Dropout(0.5)
    x = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)

    def block(x):
        return drop(layer(x), bias=bias if fused else None).square()

    def run(function):
        torch.manual_seed(11)
        y = function(x)
        gradients = torch.autograd.grad if not use_reentrant else _backward
        return y, gradients(y.sum(), (x, layer.weight))

    def _backward(y, inputs):  # a reentrant checkpoint works with .backward() alone
        for t in inputs:
            t.grad = None
        y.backward()
        return [t.grad for t in inputs]

    y, expected = run(block)
    again, gradients = run(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert_close(again, y, rtol=0, atol=0)
    assert_close(list(gradients), list(expected), rtol=0, atol=0)
    assert torch.manual_seed(11).get_state().equal(torch.default_generator.get_state())


@pytest.mark.parametrize("seeded", [False, True])
@all_forms
def test_fake_and_meta_tensors_give_shapes_without_data(name, seeded, device, path):
    kwargs = {"seed": SEED} if seeded else {}
    fused = {"activation": "gelu"}
    x = LAYOUTS["channels_last"](torch.randn(SHAPES[name], device=device))
    expected = ours(name)(x, 0.5, True, **kwargs)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        y = ours(name)(fake, 0.5, True, **kwargs)
        residual = ours(name)(fake, 0.5, True, residual=fake.double(), **fused, **kwargs)
    assert (y.shape, y.dtype, y.stride(), y.device) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
        expected.device,
    )
    assert residual.dtype == torch.float64
    y = ours(name)(x.to("meta"), 0.5, True, **kwargs)
    assert (y.shape, y.dtype, y.stride(), y.device.type) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
        "meta",
    )


def test_export_of_a_model_for_evaluation(device, path):
    model = (
        torch.nn.Sequential(torch.nn.Linear(4, 8), fnn.Dropout(0.5), torch.nn.Linear(8, 2)).to(device).eval()
    )
    x = torch.randn(3, 4, device=device)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    batch = torch.randn(5, 4, device=device)
    assert_close(exported.module()(batch), model(batch), rtol=0, atol=0)


def test_export_of_a_model_in_training(device, path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 32), fnn.Dropout(0.5)).to(device)
    x = torch.randn(3, 4, device=device)
    exported = torch.export.export(model, (x,)).module()
    first, second = exported(x), exported(x)
    assert not first.equal(second)
    kept_of(first, model[0](x), "dropout", 0.5, True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("module", [*MODULES, "DropPath"])
def test_fx_traces_modules(module, training, device, path):
    """Feature extraction and quantization trace models with torch.fx; torch's layers are leaves there."""
    name = FUNCTION_OF[module]
    x = torch.randn(SHAPES[name], device=device)
    layer = getattr(fnn, module)(0.5).train(training)
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(layer))
    if training:
        kept_of(traced(x), x, name, 0.5, True)
    else:
        assert_close(traced(x), x, rtol=0, atol=0)


@torch_forms
def test_tensor_subclasses_stay_what_they_are(name, device, path):
    x = torch.randn(SHAPES[name], device=device).as_subclass(Marked)
    expected = theirs(name)(x, 0.5, True)
    y = ours(name)(x, 0.5, True)
    assert type(y) is type(expected) is Marked
    fused = ours(name)(x, 0.5, True, activation="gelu", seed=SEED)
    assert type(fused) is Marked


# --- seeds and generators ---------------------------------------------------------------------------------

LONG = {name: (64, *shape[1:]) for name, shape in SHAPES.items()}  # no two masks are equal by chance (2^-64)


@all_forms
def test_manual_seed_reproduces_and_two_calls_differ(name, device, path):
    x = torch.ones(LONG[name], device=device)
    torch.manual_seed(5)
    first, second = ours(name)(x, 0.5, True), ours(name)(x, 0.5, True)
    torch.manual_seed(5)
    again = ours(name)(x, 0.5, True)
    assert first.equal(again)
    assert not first.equal(second)


@all_forms
def test_a_generator_is_advanced_and_no_other(name, device, path):
    x = torch.ones(LONG[name], device=device)
    generator = torch.Generator(device).manual_seed(7)
    default = torch.get_rng_state()
    first = ours(name)(x, 0.5, True, generator=generator)
    second = ours(name)(x, 0.5, True, generator=generator)
    assert torch.get_rng_state().equal(default)
    assert not first.equal(second)
    generator.manual_seed(7)
    assert ours(name)(x, 0.5, True, generator=generator).equal(first)


@pytest.mark.parametrize("p", [0.0, 1.0])
@all_forms
def test_nothing_is_drawn_where_nothing_is_random(name, p, device, path):
    x = torch.ones(SHAPES[name], device=device)
    generator = torch.Generator(device).manual_seed(7)
    state, default = generator.get_state(), torch.get_rng_state()
    ours(name)(x, p, True, generator=generator)
    ours(name)(x, p, True, activation="gelu")
    ours(name)(x, 0.5, False, generator=generator)
    assert generator.get_state().equal(state)
    assert torch.get_rng_state().equal(default)


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 3, 2**64 - 1])
@all_forms
def test_a_seed_names_one_mask_on_every_path_and_dtype(name, seed, device, monkeypatch):
    shape = SHAPES[name]
    masks = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(backend, "runs_kernels", lambda x: False)
        for dtype in DTYPES:
            x = torch.ones(shape, device=device, dtype=dtype)
            masks.append(ours(name)(x, 0.5, True, seed=seed) > 0)
        as_tensor = torch.tensor([seed if seed < 2**63 else seed - 2**64], device=device)
        masks.append(ours(name)(x, 0.5, True, seed=as_tensor) > 0)
        masks.append(ours(name)(x, 0.5, True, seed=as_tensor[0]) > 0)
    assert all(mask.equal(masks[0]) for mask in masks)
    dims = FORMS[name][0] or len(shape)
    drawn = random.keep_mask(shape[:dims], 0.5, random.stream(device, seed), device)
    assert masks[0].equal(drawn.view(*drawn.shape, *[1] * (len(shape) - dims)).expand(shape))


@pytest.mark.parametrize("name", ["dropout", "alpha_dropout"])
def test_a_mask_of_elements_follows_memory_order(name, device, path):
    shape = (2, 4, 3, 2)
    for layout in ("contiguous", "channels_last", "transposed"):
        x = LAYOUTS[layout](torch.ones(shape, device=device))
        mask = ours(name)(x, 0.5, True, seed=SEED) > 0
        in_memory = mask.as_strided((x.numel(),), (1,))
        assert in_memory.equal(random.keep_mask((x.numel(),), 0.5, random.Stream(SEED), device)), layout


@pytest.mark.parametrize("name", ["dropout2d", "feature_alpha_dropout", "drop_path"])
def test_a_mask_of_channels_or_samples_is_the_same_in_every_layout(name, device, path):
    shape = (3, 4, 2, 3)
    masks = [
        ours(name)(LAYOUTS[layout](torch.ones(shape, device=device)), 0.5, True, seed=SEED) > 0
        for layout in ("contiguous", "channels_last", "transposed", "gaps")
    ]
    assert all(mask.equal(masks[0]) for mask in masks)


def test_a_seed_beside_a_generator_is_refused(device, path):
    with pytest.raises(ValueError, match="exclude each other"):
        FF.dropout(torch.ones(4, device=device), seed=1, generator=torch.Generator(device))

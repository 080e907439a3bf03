"""Layer normalization under PyTorch's own suites: OpInfo, ModuleInfo, gradcheck, opcheck, torch.func, torch.compile.

Everything runs on both backends (fixture ``path``): on the kernels and on the definition in ATen.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compiled_graphs import graph_runs_the_kernel
from machine_option import bf16
from shared import Marked, compiled, ending, needs_triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils.checkpoint import checkpoint

import fastreg.functional as FF
import fastreg.nn as fnn
from fastreg.ops.fused import ACTIVATIONS
from fastreg.ops.norms import layer_norm as ops

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SEED = 20

# Sums of up to a few hundred terms in fp32; one rounding, or the interpreter's truncation, of 16-bit results.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: bf16(3e-2)}
close64 = partial(
    assert_close, rtol=1e-11, atol=1e-11
)  # fp64: the same function in another order of summation


def normal(shape, device, dtype=torch.float64):
    return torch.randn(shape, device=device, dtype=dtype)


# --- OpInfo and ModuleInfo --------------------------------------------------------------------------------

OP_INFO = next(op for op in op_db if op.name == "nn.functional.layer_norm")
NATIVE = next(op for op in op_db if op.name == "native_layer_norm")
OP_DTYPES = sorted(OP_INFO.dtypes, key=str)


def check_sample(sample, dtype):
    tensors = [sample.input, *(t for t in sample.kwargs.values() if isinstance(t, torch.Tensor))]
    expected = F.layer_norm(sample.input, *sample.args, **sample.kwargs)
    y = FF.layer_norm(sample.input, *sample.args, **sample.kwargs)
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert_close(y, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    dy = torch.randn_like(y)
    leaves = [t for t in tensors if t.requires_grad]
    gradients, expected = (torch.autograd.grad(out, leaves, dy) for out in (y, expected))
    for gradient, exact in zip(gradients, expected, strict=True):
        # gradients of parameters are sums over the rows
        assert_close(gradient, exact, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", OP_DTYPES, ids=str)
def test_op_info_samples(dtype, device, path):
    samples = list(OP_INFO.sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) >= 6
    for sample in samples:
        check_sample(sample, dtype)


def test_op_info_reference_samples_of_the_native_operator(device, path):
    """The same inputs and more: weights without biases, and biases without weights."""
    for sample in NATIVE.sample_inputs(device, torch.float32, requires_grad=True):
        shape, weight, bias, eps = sample.args
        y, (expected, _, _) = (
            FF.layer_norm(sample.input, shape, weight, bias, eps),
            torch.native_layer_norm(sample.input, shape, weight, bias, eps),
        )
        assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_op_info_error_inputs(device, path):
    errors = list(NATIVE.error_inputs(device))
    assert errors
    for error in errors:
        sample = error.sample_input
        shape, weight, bias, eps = sample.args
        with pytest.raises(error.error_type, match=error.error_regex):
            FF.layer_norm(sample.input, shape, weight, bias, eps)


ERRORS = {
    "another last dimension": lambda f, x: f(x, (5,)),
    "more dimensions than the input": lambda f, x: f(x, (1, 2, 3, 4)),
    "no dimensions": lambda f, x: f(x, ()),
    "a number": lambda f, x: f(x, 4),
    "another weight": lambda f, x: f(x, (4,), x.new_ones(3)),
    "a weight that broadcasts": lambda f, x: f(x, (4,), x.new_ones(1)),
    "another bias": lambda f, x: f(x, (4,), None, x.new_ones(3, 4)),
    "integers": lambda f, x: f(x.long(), (4,)),
    "a weight of another dtype": lambda f, x: f(x, (4,), x.new_ones(4).double()),
    "a number of no dimensions": lambda f, x: f(x.sum(), (4,)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_those_of_torch(case, device, path):
    x = normal((2, 3, 4), device, torch.float32)
    expected = ending(lambda: ERRORS[case](F.layer_norm, x))
    assert expected
    assert ending(lambda: ERRORS[case](FF.layer_norm, x)) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_module_info_inputs(dtype, training, device, path):
    (info,) = (info for info in module_db if info.module_cls is torch.nn.LayerNorm)
    inputs = [
        entry
        for entry in info.module_inputs_func(
            info, device=device, dtype=dtype, requires_grad=True, training=training
        )
        if entry.forward_input is not None
    ]
    assert len(inputs) >= 5
    for entry in inputs:
        args, kwargs = entry.constructor_input.args, entry.constructor_input.kwargs
        stock = torch.nn.LayerNorm(*args, **kwargs).to(device, dtype).train(training)
        layer = fnn.LayerNorm(*args, **kwargs).to(device, dtype).train(training)
        for parameter in stock.parameters():
            torch.nn.init.normal_(parameter)
        layer.load_state_dict(stock.state_dict())
        assert (layer.extra_repr(), repr(layer)) == (stock.extra_repr(), repr(stock))
        xs = [entry.forward_input.args[0].detach().clone() for _ in range(2)]
        if dtype == torch.bfloat16:
            stock, xs[1] = stock.double(), xs[1].double()  # without torch's roundings on the way
        y, expected = layer(xs[0].requires_grad_()), stock(xs[1].requires_grad_())
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy.to(expected.dtype))
        assert_close(y, expected.to(dtype), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        found, wanted = (
            [t.grad.to(dtype) for t in (x, *m.parameters())] for x, m in zip(xs, (layer, stock), strict=True)
        )
        # 1e-4: the samples of ModuleInfo have rows of very different size, and gradients that sum over all of them
        assert_close(found, wanted, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


# --- derivatives ------------------------------------------------------------------------------------------


def check_derivatives(function, inputs):
    """First and second derivatives, in fast mode (random projections of the Jacobians), at torch's tolerances."""
    inputs = tuple(t.requires_grad_() for t in inputs)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def fused_inputs(device, shape=(3, 4), normalized=(4,)):
    """Values near which no activation has a kink: the residual keeps them away."""
    shifted = normal(shape, device).sign() * 8 + normal(shape, device)
    return (
        normal(shape, device),
        0.3 * normal(normalized, device),
        0.3 * normal(normalized, device),
        shifted,
    )


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_derivatives_of_layer_norm(activation, device, path):
    check_derivatives(
        lambda x, w, b, r: FF.layer_norm(x, (4,), w, b, activation=activation, residual=r),
        fused_inputs(device),
    )


def test_derivatives_of_plain_layer_norm(device, path):
    x, weight, bias, _ = fused_inputs(device, (2, 3, 4), (3, 4))
    check_derivatives(lambda x, w, b: FF.layer_norm(x, (3, 4), w, b), (x, weight, bias))
    check_derivatives(lambda x: FF.layer_norm(x, (3, 4)), (x,))


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_derivatives_of_the_seam(activation, p, prenorm, device, path):
    x, weight, bias, residual = fused_inputs(device)
    check_derivatives(
        lambda x, r, w, b: FF.dropout_add_layer_norm(
            x, r, (4,), w, b, p=p, prenorm=prenorm, activation=activation, seed=SEED
        ),
        (x, residual, weight, bias),
    )


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_that_are_differentiated_again_are_the_same(p, device, path):
    """create_graph=True takes the definition in ATen; gradgradcheck compares it with itself alone."""
    x, weight, bias, residual = leaves = [t.requires_grad_() for t in fused_inputs(device)]
    y, h = FF.dropout_add_layer_norm(
        x, residual, (4,), weight, bias, p=p, prenorm=True, activation="silu", seed=SEED
    )
    z = FF.layer_norm(h, (4,), weight, bias, activation="gelu", residual=residual)
    upstream = [torch.randn_like(y) for _ in range(3)]
    first = torch.autograd.grad((y, h, z), leaves, upstream, retain_graph=True)
    again = torch.autograd.grad((y, h, z), leaves, upstream, create_graph=True)
    for gradient, same in zip(first, again, strict=True):
        close64(gradient, same)


@pytest.mark.parametrize("needed", range(4))
def test_derivatives_of_any_one_input(needed, device, path):
    values = list(fused_inputs(device))

    def function(t):
        x, weight, bias, residual = [*values[:needed], t, *values[needed + 1 :]]
        return FF.layer_norm(x, (4,), weight, bias, activation="tanh", residual=residual)

    check_derivatives(function, (values[needed],))


@pytest.mark.parametrize("seam", [False, True])
def test_batched_gradients(seam, device, path):
    """``is_grads_batched`` (vectorized Jacobians) runs the backward pass under vmap."""
    x, weight, bias, residual = (t.requires_grad_() for t in fused_inputs(device))
    if seam:
        y = FF.dropout_add_layer_norm(x, residual, (4,), weight, bias, p=0.4, activation="silu", seed=SEED)
    else:
        y = FF.layer_norm(x, (4,), weight, bias, activation="silu", residual=residual)
    dy = normal((3, 3, 4), device)
    leaves = (x, weight, bias, residual)
    expected = [torch.autograd.grad(y, leaves, row, retain_graph=True) for row in dy]
    batched = torch.autograd.grad(y, leaves, dy, retain_graph=True, is_grads_batched=True)
    for result, rows in zip(batched, zip(*expected, strict=True), strict=True):
        close64(result, torch.stack(rows))


# --- torch.func and forward-mode AD -----------------------------------------------------------------------

FUNCTIONS = {
    "layer_norm": lambda x, w: FF.layer_norm(x, (4,), w, activation="tanh"),
    "seam": lambda x, w: FF.dropout_add_layer_norm(x, x, (4,), w, p=0.4, seed=SEED),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_func_transforms_agree_with_autograd(name, device, path):
    function, weight = FUNCTIONS[name], normal((4,), device)
    x, tangent, cotangent = (normal((3, 4), device) for _ in range(3))
    leaf = x.clone().requires_grad_()
    y = function(leaf, weight)
    (gradient,) = torch.autograd.grad(y, leaf, cotangent)
    close64(torch.func.grad(lambda x: (function(x, weight) * cotangent).sum())(x), gradient)
    value, derivative = torch.func.jvp(lambda x: function(x, weight), (x,), (tangent,))
    close64(value, y.detach())
    close64((derivative * cotangent).sum(), (gradient * tangent).sum())  # <c, J t> = <J^T c, t>
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent), weight))
        close64(dual.tangent, derivative)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap(name, device, path):
    function, weight = FUNCTIONS[name], normal((4,), device)
    x = normal((5, 3, 4), device)
    close64(torch.vmap(lambda x: function(x, weight))(x), torch.stack([function(e, weight) for e in x]))

    def gradient(weight, x):
        return torch.func.grad(lambda w: function(x, w).sum())(weight)

    per_sample = torch.vmap(gradient, in_dims=(None, 0))(weight, x)
    close64(per_sample, torch.stack([gradient(weight, e) for e in x]))


# --- registered operators ---------------------------------------------------------------------------------


def op_arguments(device, **changed):
    """Those of ``torch.ops.fastreg.layer_norm``, with tensors to write into."""
    arguments = {
        "x": normal((2, 3, 4), device, torch.float32), "skip": None,
        "weight": normal((4,), device, torch.float32), "bias": normal((4,), device, torch.float32),
        "residual": None, "y": None, "h": None, "statistics": None, "seed": None,
        "columns": 4, "eps": 1e-5, "dtype": torch.float32, "activation": None, "threshold": 0, "scale": 1.0,
    }  # fmt: skip
    assert changed.keys() <= arguments.keys()
    arguments |= changed
    x, skip = arguments["x"], arguments["skip"]
    arguments["y"] = torch.empty(x.shape, dtype=arguments["dtype"], device=device)
    if skip is not None or arguments["threshold"]:
        arguments["h"] = torch.empty(x.shape, dtype=(x if skip is None else skip).dtype, device=device)
    arguments["statistics"] = torch.empty(2, x.numel() // arguments["columns"], device=device)
    return arguments


def drops(device):
    return {"seed": torch.tensor([SEED], device=device), "threshold": 1 << 15, "scale": 2.0}


OP_SAMPLES = {
    "plain": lambda d: {},
    "no parameters": lambda d: {"weight": None, "bias": None},
    "normalized dimensions": lambda d: {
        "columns": 12,
        "weight": normal((3, 4), d, torch.float32),
        "bias": None,
    },
    "activation and residual": lambda d: {
        "activation": "gelu",
        "residual": normal((2, 3, 4), d, torch.float32),
    },
    "skip": lambda d: {"skip": normal((2, 3, 4), d, torch.float32)},
    "dropout": drops,
    "seam": lambda d: drops(d) | {"skip": normal((2, 3, 4), d, torch.float32), "activation": "relu"},
    "16 bits, stream in 32": lambda d: (
        drops(d)
        | {
            "x": normal((2, 3, 4), d, torch.bfloat16),
            "skip": normal((2, 3, 4), d, torch.float32),
            "dtype": torch.bfloat16,
        }
    ),
    "empty": lambda d: {"x": normal((0, 4), d, torch.float32)},
    "transposed": lambda d: {"x": normal((4, 3), d, torch.float32).t()},
}


@needs_triton
@pytest.mark.parametrize("sample", OP_SAMPLES)
def test_opcheck_of_the_forward_operator(sample, device):
    arguments = op_arguments(device, **OP_SAMPLES[sample](device))
    torch.library.opcheck(torch.ops.fastreg.layer_norm.default, (), arguments)


@needs_triton
@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 4)])
@pytest.mark.parametrize("wanted", [(1, 1, 1, 1, 1), (1, 0, 0, 0, 0), (0, 0, 1, 1, 0)])
def test_opcheck_of_the_backward_operator(wanted, shape, device):
    x, dy, dh, residual = (normal(shape, device, torch.float32) for _ in range(4))
    weight, bias = (normal((4,), device, torch.float32) for _ in range(2))
    statistics = torch.randn(2, x.numel() // 4, device=device)
    gradients = [torch.empty_like(t) for t in (x, x, weight, bias, x)]
    torch.library.opcheck(
        torch.ops.fastreg.layer_norm_backward.default,
        (dy, dh, x, weight, bias, residual, statistics,
         *[g if want else None for g, want in zip(gradients, wanted, strict=True)],
         torch.tensor([SEED], device=device), 4, 1e-5, torch.float32, "gelu", 1 << 15, 2.0),
    )  # fmt: skip


# --- torch.compile ----------------------------------------------------------------------------------------


def seed_tensor(device):
    return torch.tensor([SEED], device=device)


STEPS = {
    "plain": lambda x, r, w, b, seed: FF.layer_norm(x, (8,), w, b),
    "fused": lambda x, r, w, b, seed: FF.layer_norm(x, (8,), w, b, activation="gelu", residual=r),
    "seam": lambda x, r, w, b, seed: FF.dropout_add_layer_norm(x, r, (8,), w, b, p=0.4, seed=seed),
    "prenorm": lambda x, r, w, b, seed: torch.stack(
        FF.dropout_add_layer_norm(x, r, (8,), w, b, p=0.4, prenorm=True, seed=seed)
    ),
    "prenorm, y alone": lambda x, r, w, b, seed: FF.dropout_add_layer_norm(
        x, r, (8,), w, b, p=0.4, prenorm=True, seed=seed
    )[0],
    "prenorm, h alone": lambda x, r, w, b, seed: FF.dropout_add_layer_norm(
        x, r, (8,), w, b, p=0.4, prenorm=True, seed=seed
    )[1],
    "no dropout": lambda x, r, w, b, seed: FF.dropout_add_layer_norm(x, r, (8,), w, b, p=0.0),
    "one tensor as several": lambda x, r, w, b, seed: FF.layer_norm(x, (8,), w, w, residual=x),
    "an int as the seed": lambda x, r, w, b, seed: FF.dropout_add_layer_norm(x, r, (8,), w, b, p=0.4, seed=0),
}


@pytest.mark.parametrize("name", STEPS)
def test_one_graph_with_eagers_values_for_every_batch_size(name, device, path):
    step, counter = compiled(STEPS[name], dynamic=True)
    weight, bias = (normal((8,), device, torch.float32).requires_grad_() for _ in range(2))
    compilations = []
    for batch in (4, 7, 9):
        x, residual = (normal((batch, 2, 8), device, torch.float32).requires_grad_() for _ in range(2))
        leaves = (x, residual, weight, bias)
        y, expected = step(*leaves, seed_tensor(device)), STEPS[name](*leaves, seed_tensor(device))
        assert y.stride() == expected.stride()
        # The same kernel, or the same ATen operations, whose sums the compiler may reorder.
        assert_close(y, expected, rtol=1e-6, atol=1e-6)
        dy = torch.randn_like(y)
        found, wanted = (torch.autograd.grad(out, leaves, dy, allow_unused=True) for out in (y, expected))
        for gradient, exact in zip(found, wanted, strict=True):
            assert_close(gradient if exact is not None else None, exact, rtol=1e-5, atol=1e-5)
        compilations.append(counter.frame_count)
    # The first batch may compile twice, as with torch.nn.Dropout: dynamic=True begins with a symbol for eps.
    assert compilations == compilations[:1] * 3
    assert graph_runs_the_kernel(counter) == (path == "kernels")


@pytest.mark.slow
def test_inductor_equals_eager(device, path):
    def step(x, residual, weight):
        y, h = FF.dropout_add_layer_norm(x * 2, residual, (8,), weight, p=0.0, prenorm=True)
        return FF.layer_norm(y.sin(), (8,), weight, activation="gelu") + h

    leaves = [normal(s, device, torch.float32).requires_grad_() for s in ((5, 8), (5, 8), (8,))]
    y, expected = torch.compile(step, fullgraph=True, dynamic=True)(*leaves), step(*leaves)
    found, wanted = (torch.autograd.grad(out.sum(), leaves) for out in (y, expected))
    # fp32: Inductor fuses, and rounds sine and gelu differently, by some ulps.
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_seam_draws_a_new_mask_at_every_call(device, path):
    step, _ = compiled(lambda x: FF.dropout_add_layer_norm(x, None, (8,), p=0.5, prenorm=True)[1])
    x = torch.ones(64, 8, device=device, requires_grad=True)
    torch.manual_seed(5)
    first, second = step(x), step(x)
    torch.manual_seed(5)
    again = step(x)
    assert again.equal(first)
    assert not first.equal(second)
    (dx,) = torch.autograd.grad(again.sum(), x)
    assert_close(dx, again.detach(), rtol=0, atol=0)  # x = 1: both are the scaled mask


MODULES = {
    "LayerNorm": lambda: fnn.LayerNorm(8, activation="gelu"),
    "DropoutAddLayerNorm": lambda: fnn.DropoutAddLayerNorm(8, p=0.1),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_train_in_a_compiled_sequential(name, device, path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), MODULES[name](), torch.nn.Linear(8, 2)).to(device)
    step, counter = compiled(model, dynamic=True)
    compilations = []
    for batch in (16, 32, 48):
        step(normal((batch, 6), device, torch.float32)).sum().backward()
        compilations.append(counter.frame_count)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert compilations == compilations[:1] * 3
    model.eval()
    x = normal((16, 6), device, torch.float32)
    # fp32, the compiler may choose another matrix product: some ulps of sums of eight
    assert_close(step(x), model(x), rtol=1e-5, atol=1e-5)


# --- autocast, checkpointing, fake and meta tensors, export, fx -------------------------------------------


@pytest.mark.parametrize("graph", [False, True])
def test_autocast_gives_the_dtypes_of_torch(graph, device, path):
    layer, stock = fnn.LayerNorm(8, device=device), torch.nn.LayerNorm(8, device=device)
    linear = torch.nn.Linear(8, 8, device=device)

    def step(x, layer):
        with torch.autocast(x.device.type, torch.bfloat16):
            return layer(linear(x)), layer(x)

    x = normal((4, 8), device, torch.float32)
    ours = compiled(step)[0] if graph else step
    results, expected = ours(x, layer), step(x, stock)
    assert [y.dtype for y in results] == [y.dtype for y in expected]
    sum(y.float().sum() for y in results).backward()
    assert linear.weight.grad.dtype == layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_again(use_reentrant, device, path):
    layer = fnn.DropoutAddLayerNorm(8, p=0.5, prenorm=True).to(device, torch.float64)
    x = normal((5, 8), device).requires_grad_()

    def block(x):
        y, h = layer(x.tanh(), x)
        return y.square() + h

    def run(function):
        torch.manual_seed(11)
        x.grad = layer.weight.grad = None
        y = function(x)
        y.sum().backward()
        return y.detach(), x.grad, layer.weight.grad

    expected = run(block)
    again = run(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert_close(again, expected, rtol=0, atol=0)


def test_fake_and_meta_tensors_give_shapes_without_data(device, path):
    x = normal((2, 3, 4), device, torch.float32)
    with FakeTensorMode() as mode:
        y = FF.layer_norm(mode.from_tensor(x), (4,), activation="gelu")
    meta = FF.layer_norm(x.to("meta"), (4,), activation="gelu")
    seam, h = FF.dropout_add_layer_norm(x.to("meta"), x.to("meta").double(), (4,), prenorm=True)
    assert (
        (y.shape, y.stride(), y.dtype)
        == (meta.shape, meta.stride(), meta.dtype)
        == (x.shape, x.stride(), x.dtype)
    )
    assert (seam.shape, seam.dtype, h.dtype) == (x.shape, torch.float32, torch.float64)


def test_export(device, path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), fnn.LayerNorm(8, activation="silu")).to(device).eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        model, (normal((3, 4), device, torch.float32),), dynamic_shapes=({0: batch},)
    )
    x = normal((5, 4), device, torch.float32)
    assert_close(exported.module()(x), model(x), rtol=1e-6, atol=1e-6)


def test_fx_traces_modules(device, path):
    """Feature extraction and quantization trace models with torch.fx; torch's layers are leaves there."""
    model = torch.nn.Sequential(fnn.LayerNorm(4)).to(device)
    x = normal((3, 4), device, torch.float32)
    assert_close(torch.fx.symbolic_trace(model)(x), model(x), rtol=1e-6, atol=1e-6)


def test_tensor_subclasses_stay_what_they_are(device, path):
    x = normal((3, 4), device, torch.float32)
    for fused in ({}, {"activation": "gelu", "residual": x}):
        assert type(FF.layer_norm(x.as_subclass(Marked), (4,), **fused)) is Marked
        assert type(FF.layer_norm(x, (4,), x[0].as_subclass(Marked), **fused)) is Marked
    assert type(FF.dropout_add_layer_norm(x.as_subclass(Marked), x, (4,), seed=SEED)) is Marked


def test_operators_are_the_definition(device):
    """The compiled path and the eager one are one function."""
    arguments = op_arguments(device, **OP_SAMPLES["seam"](device))
    torch.ops.fastreg.layer_norm(**arguments)
    y, h, statistics = (arguments[name] for name in ("y", "h", "statistics"))
    expected, expected_h = FF.dropout_add_layer_norm(
        arguments["x"], arguments["skip"], (4,), arguments["weight"], arguments["bias"],
        p=0.5, prenorm=True, activation="relu", seed=SEED,
    )  # fmt: skip
    assert_close((y, h), (expected, expected_h), rtol=0, atol=0)
    assert_close(statistics[0], h.flatten(0, 1).mean(1), rtol=1e-5, atol=1e-6)
    assert ops.Form(**{name: arguments[name] for name in ops.Form._fields}).threshold == 1 << 15

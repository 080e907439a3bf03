"""Local response normalization against fp64 references, on the kernels and on ATen."""

import itertools
import math
from functools import partial

import pytest
import torch
from machine_option import bf16
from shared import Marked, ending
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fastreg.functional as F
import fastreg.nn as fnn
from fastreg.ops.fused import ACTIVATIONS, activated
from fastreg.ops.norms import local_response_norm as ops

# Relative and absolute. fp32 is computed in fp32: 5 roundings, and 3e-7 of the power of d. 16-bit results are rounded
# once on the kernels, after every operation on ATen, and truncated to bf16 by the interpreter.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 4e-3,
    torch.bfloat16: bf16(3e-2),
}
STRONG = {"alpha": 0.5, "beta": 0.75, "k": 2.0}  # so that the denominator is felt: with 1e-4 it is about 1


def reference(x, size, alpha=1e-4, beta=0.75, k=1.0, *, activation=None, residual=None):
    """The definition, written out: a sum over the channels of each window."""
    squares = x.square()
    sums = torch.stack(
        [
            squares[:, max(0, c - size // 2) : c + (size - 1) // 2 + 1].sum(1)
            for c in range(x.shape[1])
        ],
        dim=1,
    )  # fmt: skip
    return activated(x * (k + alpha / size * sums) ** -beta, activation, residual)


def check(x, size, *, activation=None, residual=None, dy=None, **constants):
    """Result and gradients equal those of the reference in fp64; returns the result."""
    constants = constants or STRONG
    inputs = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    residual, exact_residual = (inputs[1], exact[1]) if residual is not None else (None, None)
    y = F.local_response_norm(inputs[0], size, **constants, activation=activation, residual=residual)
    expected = reference(exact[0], size, **constants, activation=activation, residual=exact_residual)
    dy = torch.randn_like(y) if dy is None else dy
    tolerance = TOLERANCE[x.dtype]
    assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(y, inputs, dy)
    exact_gradients = torch.autograd.grad(expected, exact, dy.double())
    for t, gradient, exact_gradient in zip(inputs, gradients, exact_gradients, strict=True):
        assert (gradient.dtype, gradient.shape) == (t.dtype, t.shape)
        # A gradient is a difference of terms of the size of dy.
        assert_close(gradient.double(), exact_gradient, rtol=tolerance, atol=2 * tolerance)
    return y


def on_kernels(y) -> bool:
    return y.grad_fn.name() == "_LocalResponseNormBackward"


def channels_last(x):
    """``x`` with its channels innermost, in any rank."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


# --- values and gradients ---------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.executed
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fused_form_equals_fp64_reference(path, device, dtype, layout):
    if path == "aten" and dtype.itemsize == 2 and device.type == "cpu":
        pytest.skip("torch has no 16-bit average over volumes on the CPU")
    x = layout(3 * torch.randn(2, 8, 3, 2, device=device)).to(dtype)
    y = check(x, 5, activation="gelu", residual=torch.randn_like(x))
    assert y.dtype == dtype
    assert y.stride() == x.stride()


# Channels beside one block of 16 and several, vectors of 8, 4, 2 and 1, windows of even size and over all channels.
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 3, 5), 1),
        ((1, 6, 4), 2),
        ((2, 5, 1, 3), 4),
        ((1, 17, 2), 5),
        ((2, 20, 1, 2, 1), 3),
        ((1, 10, 2), 16),
        ((3, 1, 2, 2), 5),
        ((2, 4, 3), 30),
        ((70, 2, 1), 2),
        ((1, 2, 3, 1, 1, 2), 3),
    ],
)
def test_shapes_and_windows(device, shape, size, layout):
    x = layout(3 * torch.randn(shape, device=device))
    assert on_kernels(check(x, size))


@pytest.mark.parametrize("size", [17, 40])
def test_wide_windows_go_to_aten(device, size):
    assert not on_kernels(check(torch.randn(2, 20, 3, device=device), size))


@pytest.mark.parametrize(
    "constants",
    [
        {"alpha": 1e-4, "beta": 0.75, "k": 1.0},
        {"alpha": 1, "beta": 1, "k": 3},
        {"alpha": 0.3, "beta": 0.5, "k": 1e-3},
        {"alpha": 0.3, "beta": -0.4, "k": 1.0},
        {"alpha": 0.0, "beta": 2.5, "k": 2.0},
    ],
)
def test_constants(device, constants):
    for dtype in (torch.float32, torch.float64):
        x = 1 + torch.rand(2, 3, 4, dtype=dtype, device=device)
        assert on_kernels(check(x, 3, **constants))


@pytest.mark.parametrize(
    "constants", [{"k": 0.0}, {"k": -1.0}, {"alpha": -0.1}, {"beta": 0.0}, {"k": math.nan}]
)
def test_denominators_that_may_not_be_positive_are_torchs(device, constants):
    x = torch.randn(2, 3, 4, device=device, requires_grad=True)
    y = F.local_response_norm(x, 3, **constants)
    assert not on_kernels(y)
    assert_close(
        y, torch.nn.functional.local_response_norm(x, 3, **constants), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize("activation", ["relu", "mish", None])
def test_activation_and_residual(device, activation):
    x, residual = 3 * torch.randn(2, 2, 5, 2, device=device)
    check(x, 3, activation=activation, residual=residual)
    if activation:
        check(x, 3, activation=activation)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("subset", list(itertools.product([False, True], repeat=2)))
def test_any_subset_of_gradients(path, device, subset, activation):
    x, residual = torch.randn(2, 1, 3, 2, device=device)
    for tensor, wanted in zip((x, residual), subset, strict=True):
        tensor.requires_grad_(wanted)
    y = F.local_response_norm(x, 2, **STRONG, activation=activation, residual=residual)
    assert y.requires_grad == any(subset)
    if any(subset):
        y.backward(torch.ones_like(y))
    assert (x.grad is not None, residual.grad is not None) == subset
    if subset[1] and activation is None:
        assert torch.equal(residual.grad, torch.ones_like(residual))


def test_mixed_dtypes(path, device):
    x = torch.randn(1, 4, 3, dtype=torch.bfloat16, device=device)
    residual = torch.randn(1, 4, 3, device=device)
    assert check(x, 3, activation="relu", residual=residual).dtype == torch.float32


# --- layouts ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "channels_last": lambda: torch.randn(2, 4, 3, 2).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 4, 3, 2, 2).to(memory_format=torch.channels_last_3d),
    "samples inside": lambda: torch.randn(4, 3, 2, 2).permute(3, 0, 1, 2),
    "transposed": lambda: torch.randn(2, 2, 3, 4).permute(3, 2, 1, 0),
    "sliced": lambda: torch.randn(2, 4, 3, 4)[..., ::2],
    "expanded": lambda: torch.randn(2, 4, 1, 2).expand(2, 4, 3, 2),
    "one sample": lambda: torch.randn(1, 4, 1, 1).to(memory_format=torch.channels_last),
    "offset": lambda: torch.randn(2 * 4 * 6 + 1)[1:].view(2, 4, 3, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(path, device, name):
    x = LAYOUTS[name]().to(device)
    y = check(x, 3)
    expected = torch.nn.functional.local_response_norm(x, 3)
    assert [s for s, n in zip(y.stride(), y.shape, strict=True) if n > 1] == [
        s for s, n in zip(expected.stride(), y.shape, strict=True) if n > 1
    ]


@pytest.mark.executed
@pytest.mark.parametrize("dy_layout", ["transposed", "expanded"])
def test_gradients_of_any_layout(device, dy_layout):
    x = torch.randn(4, 3, 2, 2, device=device)
    dy = LAYOUTS[dy_layout]().to(device)
    check(x if dy_layout == "transposed" else torch.randn(2, 4, 3, 2, device=device), 3, dy=dy)


def test_dense_layouts_are_not_copied(device, monkeypatch):
    """Any order of the dimensions in memory is samples x channels x inner to the kernels."""
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    for name in ("channels_last", "samples inside", "transposed"):
        x = LAYOUTS[name]().to(device).requires_grad_()
        y = F.local_response_norm(x, 2)
        torch.autograd.grad(y, x, torch.empty_like(y))


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2), (2, 3, 0, 2)])
def test_empty(path, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    y = F.local_response_norm(x, 3, activation="relu", residual=x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_wide_indices_give_the_same_result(device):
    for layout in (torch.Tensor.contiguous, channels_last):
        x = layout(torch.randn(3, 4, 5, device=device))
        results = []
        for wide in (False, True):
            y, dx = torch.empty_like(x), torch.empty_like(x)
            form = ops.Form(2, 0.5, 0.75, 1.0)
            launches = ops.forward_launches(x, None, y, form)
            for launch in launches + ops.backward_launches(x, x, None, dx, None, form):
                launch.arguments["plan"] = launch.arguments["plan"]._replace(wide=wide)
                launch.run(device)
            results.append((y, dx))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- special values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
def test_nan_and_inf_stay_in_their_windows(path, device, layout, value):
    x = layout(torch.ones(1, 12, 3, device=device))
    x[0, 5, 1] = value
    x.requires_grad_()
    y = F.local_response_norm(x, 4, **STRONG)  # the window of c: c - 2 to c + 1
    touched = torch.zeros(1, 12, 3, dtype=torch.bool, device=device)
    touched[0, 4:8, 1] = True
    clean = F.local_response_norm(torch.ones_like(x), 4, **STRONG)
    assert_close(y[~touched], clean[~touched], rtol=1e-6, atol=0)  # ATen adds in another order
    assert y[0, 5, 1].isnan()
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    touched[0, 2:9, 1] = True  # windows of windows
    assert dx[~touched].isfinite().all()
    if math.isnan(value):
        assert y[0, 4:8, 1].isnan().all()
        assert dx[0, 2:9, 1].isnan().all()
    else:
        assert torch.equal(y[0, 6:8, 1], torch.zeros(2, device=device))


def test_large_values_do_not_overflow(device):
    """torch squares in the dtype of the input: in fp16 all of these become 0."""
    x = (1000 * (1 + torch.rand(2, 6, 3, device=device))).half()
    y = check(x, 5, alpha=1e-4, beta=0.75, k=1.0, dy=torch.ones(2, 6, 3, device=device).half())
    assert y.abs().min() > 1
    x = 1e12 * (1 + torch.rand(2, 6, 3, device=device))
    y, expected = F.local_response_norm(x, 5), reference(x.double(), 5)
    assert_close(y.double(), expected, rtol=3e-6, atol=0)


# --- autograd, torch.func, torch.compile ------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "tanh"])
def test_gradcheck_and_gradgradcheck(path, device, activation):
    x, residual = torch.randn(2, 1, 2, 1, dtype=torch.float64, device=device)
    x.requires_grad_()
    residual.requires_grad_()

    def function(x, residual):
        return F.local_response_norm(x, 2, **STRONG, activation=activation, residual=residual)

    # fast_mode: a directional derivative, which keeps the interpreter short. Its derivative in full is in check().
    assert gradcheck(function, (x, residual), fast_mode=True, check_batched_grad=True)
    assert gradgradcheck(function, (x, residual), fast_mode=True)


def test_second_derivative_in_every_layout_of_the_kernels(device):
    # torch's own function fails here: it takes a view of the last two dimensions as one.
    x = torch.randn(1, 2, 1, 2, 2, dtype=torch.float64, device=device).transpose(3, 4).requires_grad_()
    assert gradgradcheck(lambda x: F.local_response_norm(x, 2, **STRONG), (x,), fast_mode=True)


def test_func_transforms(path, device):
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, device=device)
    function = lambda x: F.local_response_norm(x, 3, **STRONG, activation="silu")  # noqa: E731
    assert_close(torch.vmap(function)(x), torch.stack([function(each) for each in x]))
    leaf = x[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
    assert_close(torch.func.grad(lambda x: function(x).sum())(x[0]), gradient)


def test_a_subclass_of_tensor_stays_one(path, device):
    x = torch.randn(2, 3, 4, device=device)
    marked = x.as_subclass(Marked)
    assert type(F.local_response_norm(marked, 3)) is Marked
    assert type(F.local_response_norm(x, 3, residual=marked)) is Marked


def test_only_the_input_is_saved_and_the_residual_for_an_activation(device):
    x, residual = torch.randn(2, 2, 4, 8, device=device)
    for activation, expected in ((None, [x]), ("relu", [x, residual])):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            F.local_response_norm(x.requires_grad_(), 3, activation=activation, residual=residual)
        assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in expected]


def test_compiled_is_one_graph_with_eagers_numbers(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, residual):
        return F.local_response_norm(x, 3, **STRONG, activation="silu", residual=residual)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for batch in (
        5,
        7,
    ):  # other numbers than those of the other dimensions, which Dynamo would take for the same
        x = channels_last(torch.randn(batch, 2, 1, 3, device=device)).requires_grad_()
        residual = torch.randn(batch, 2, 1, 3, device=device, requires_grad=True)
        y, expected = compiled(x, residual), step(x, residual)
        assert y.stride() == expected.stride()
        assert_close(y, expected, rtol=0, atol=0)  # the same kernel
        dy = torch.randn_like(y)
        gradients = torch.autograd.grad(y, (x, residual), dy)
        assert_close(gradients, torch.autograd.grad(expected, (x, residual), dy), rtol=0, atol=0)
        compilations.append(counter.frame_count)
    # The first batch may compile twice, as dynamic=True begins with symbols for alpha, beta and k.
    assert compilations == compilations[:1] * 2
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "sliced"])
def test_opcheck(device, name):
    x = (LAYOUTS[name]() if name in LAYOUTS else torch.randn(1, 2, 3, 2)).to(device)
    form = (2, 0.5, 0.75, 1.0, "relu" if name == "contiguous" else None)
    residual = torch.randn_like(x) if name == "contiguous" else None
    operators = torch.ops.fastreg
    torch.library.opcheck(operators.local_response_norm.default, (x, residual, torch.empty_like(x), *form))
    gradients = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    torch.library.opcheck(operators.local_response_norm_backward.default, (x, x, residual, *gradients, *form))


# --- PyTorch's own samples --------------------------------------------------------------------------------

(OP_INFO,) = [op for op in op_db if op.name == "nn.functional.local_response_norm"]
(MODULE_INFO,) = [info for info in module_db if info.module_cls is torch.nn.LocalResponseNorm]


def assert_as_in_torch(path, ours, theirs, x):
    """Result and gradient: torch's bits on ATen (and of integers), torch's in fp64 on the kernels."""
    exact = path == "aten" or not x.is_floating_point()
    leaf, expected_leaf = x.detach().clone(), (x if exact else x.double()).detach().clone()
    results, expected_results = [], []
    if x.is_floating_point():
        y, expected = ours(leaf.requires_grad_()), theirs(expected_leaf.requires_grad_())
        assert not x.numel() or on_kernels(y) == (path == "kernels")
        dy = torch.randn_like(y)
        results += torch.autograd.grad(y, leaf, dy)
        expected_results += torch.autograd.grad(expected, expected_leaf, dy.to(expected.dtype))
    else:
        y, expected = ours(leaf), theirs(expected_leaf)
    assert (y.dtype, y.stride()) == (expected.dtype if exact else x.dtype, expected.stride())
    tolerance = 0 if exact else TOLERANCE[x.dtype]
    for result, expected_result in zip([y, *results], [expected, *expected_results], strict=True):
        # A gradient is a difference of terms of the size of dy.
        assert_close(result.to(expected_result.dtype), expected_result, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", sorted(OP_INFO.dtypes, key=str), ids=str)
def test_op_info_samples_act_as_in_torch(path, device, dtype):
    samples = list(OP_INFO.sample_inputs(device, dtype))
    assert len(samples) >= 11
    for sample in samples:
        (size,), constants = sample.args, sample.kwargs
        ours, theirs = (
            partial(f.local_response_norm, size=size, **constants) for f in (F, torch.nn.functional)
        )
        assert_as_in_torch(path, ours, theirs, sample.input)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize(
    ("dtype", "training"),
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)],
    ids=["fp32-training", "fp32-evaluation", "bf16-training"],
)
def test_module_info_inputs_act_as_in_torch(path, device, dtype, layout, training):
    if path == "aten" and dtype.itemsize == 2 and device.type == "cpu":
        pytest.skip("torch has no 16-bit average over volumes on the CPU")
    inputs = list(MODULE_INFO.module_inputs_func(MODULE_INFO, device, dtype, False, training=training))
    assert len(inputs) >= 3
    for each in inputs:
        constructor, (x,) = each.constructor_input, each.forward_input.args
        layers = [
            of.LocalResponseNorm(*constructor.args, **constructor.kwargs).train(training)
            for of in (fnn, torch.nn)
        ]
        assert_as_in_torch(path, *layers, layout(x))


# --- the module, and errors -------------------------------------------------------------------------------


def test_layer_is_torchs_class_with_more_abilities(path, device):
    layer, theirs = fnn.LocalResponseNorm(3, 1e-3, 0.5, 2.0), torch.nn.LocalResponseNorm(3, 1e-3, 0.5, 2.0)
    assert isinstance(layer, torch.nn.LocalResponseNorm)
    assert repr(layer) == repr(theirs)
    assert repr(fnn.LocalResponseNorm(3, activation="relu")).endswith("k=1.0, activation=relu)")
    x, residual = 3 * torch.randn(2, 2, 4, 3, device=device)
    assert_close(layer(x), theirs(x))
    layer.activation = "relu"
    assert_close(layer(x, residual=residual), (theirs(x) + residual).relu())


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 3), 3), ((3,), 1), ((2, 3, 4), 0), ((2, 3, 4), -1), ((2, 3, 4), 1.5)]
)
def test_errors_are_torchs(path, device, shape, size):
    x = torch.randn(shape, device=device)
    theirs = ending(lambda: torch.nn.functional.local_response_norm(x, size))
    assert ending(lambda: F.local_response_norm(x, size)) == theirs


def test_bad_fusions_are_refused(path, device):
    x = torch.randn(2, 3, 4, device=device)
    with pytest.raises(ValueError, match="unknown activation 'swish': choose one of relu, "):
        F.local_response_norm(x, 3, activation="swish")
    with pytest.raises(ValueError, match="unknown activation"):
        fnn.LocalResponseNorm(3, activation="swish")
    with pytest.raises(ValueError, match="residual has to have the shape of the input"):
        F.local_response_norm(x, 3, residual=x[:1])
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        F.local_response_norm(x, 3, residual=x.to("meta"))


def test_every_activation_compiles_into_the_kernel(device):
    x = torch.randn(1, 2, 3, device=device)
    for activation in ACTIVATIONS:
        y = F.local_response_norm(x, 2, **STRONG, activation=activation)
        assert_close(y, reference(x, 2, **STRONG, activation=activation), rtol=3e-6, atol=3e-6)


def test_five_dimensions_channels_last_on_aten(aten):
    """torch's own function refuses them: it views its window in a shape that these strides do not have."""
    x = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    last = x.to(memory_format=torch.channels_last_3d).requires_grad_()
    torch.testing.assert_close(F.local_response_norm(last, 3), torch.nn.functional.local_response_norm(x, 3))
    assert torch.autograd.gradcheck(lambda x: F.local_response_norm(x, 3, 0.5), last, fast_mode=True)

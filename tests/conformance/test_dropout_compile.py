"""Dropout under ``torch.compile``: one graph, eager's numbers, and a mask that is new at every call."""

import pytest
import torch
from compiled_graphs import graph_runs_the_kernel
from shared import compiled
from torch.testing import assert_close

import fastreg.functional as FF
import fastreg.nn as fnn
from fastreg.ops import backend

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SEED = 20
FORMS = {
    "dropout": (4, 6),
    "dropout1d": (4, 3, 5),
    "dropout2d": (4, 3, 2, 5),
    "dropout3d": (4, 3, 2, 1, 5),
    "alpha_dropout": (4, 6),
    "feature_alpha_dropout": (4, 3, 5),
    "drop_path": (4, 2, 3),
}
LONG = {name: (64, *shape[1:]) for name, shape in FORMS.items()}  # masks equal by chance: 2^-64
all_forms = pytest.mark.parametrize("name", FORMS)


def seed_tensor(device):
    return torch.tensor([SEED], device=device)


@all_forms
def test_one_graph_with_eagers_values_and_gradients(name, device, path):
    function = getattr(FF, name)

    def step(x, seed):
        return function(x, 0.4, True, seed=seed)

    step_compiled, counter = compiled(step, dynamic=True)
    x = torch.randn(FORMS[name], device=device, requires_grad=True)
    dy = torch.randn(FORMS[name], device=device)
    expected, y = step(x, seed_tensor(device)), step_compiled(x, seed_tensor(device))
    assert_close(y, expected, rtol=0, atol=0)  # the same kernel, or the same ATen operations
    assert y.stride() == expected.stride()
    (gradient,), (result,) = torch.autograd.grad(expected, x, dy), torch.autograd.grad(y, x, dy)
    assert_close(result, gradient, rtol=0, atol=0)
    assert counter.frame_count == 1
    assert graph_runs_the_kernel(counter) == (path == "kernels")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bias_shape", [pytest.param((5,), marks=pytest.mark.slow), (3, 1, 1)])
@pytest.mark.parametrize(
    # "dropout" in the default run: its mask follows memory order, so that a wrong layout in backward shows.
    "name",
    ["dropout", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dropout2d", "drop_path"))],
)
def test_fused_forms_equal_eager(name, bias_shape, layout, device, path):
    function = getattr(FF, name)
    shape = (4, 3, 2, 5)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(shape, device=device).to(memory_format=memory).requires_grad_()
    residual = torch.randn(shape, device=device).to(memory_format=memory).requires_grad_()
    bias = torch.randn(bias_shape, device=device, requires_grad=True)
    dy = torch.randn(shape, device=device)

    def step(x, bias, residual, seed):
        return function(x, 0.4, True, bias=bias, activation="gelu", residual=residual, seed=seed)

    step_compiled, counter = compiled(step, dynamic=True)
    arguments = (x, bias, residual, seed_tensor(device))
    expected, y = step(*arguments), step_compiled(*arguments)
    assert_close(y, expected, rtol=0, atol=0)
    assert y.stride() == expected.stride()
    gradients = torch.autograd.grad(expected, arguments[:3], dy)
    results = torch.autograd.grad(y, arguments[:3], dy)
    # The bias gradient of the ATen path is a sum whose order the compiler may change: some fp32 ulps.
    assert_close(results, gradients, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
@all_forms
def test_a_new_batch_size_does_not_recompile(name, training, device, path):
    function = getattr(FF, name)
    step, counter = compiled(lambda x: function(x, 0.5, training), dynamic=True)
    for batch in (4, 6, 9):
        x = torch.randn(batch, *FORMS[name][1:], device=device)
        assert step(x).shape == x.shape
    assert counter.frame_count == 1


def test_a_new_batch_size_does_not_recompile_a_fused_training_step(device, path):
    def step(x, bias, residual, seed):
        return FF.dropout(x, 0.5, bias=bias, activation="silu", residual=residual, seed=seed)

    step_compiled, counter = compiled(step, dynamic=True)
    bias = torch.randn(6, device=device, requires_grad=True)
    for batch in (4, 7, 9):
        x, residual = torch.randn(2, batch, 6, device=device, requires_grad=True)
        step_compiled(x, bias, residual, seed_tensor(device)).sum().backward()
    assert counter.frame_count == 1


def test_automatic_dynamic_shapes_compile_twice_at_most(device, path):
    """The default of torch.compile: static at first, dynamic from the second size on."""
    step, counter = compiled(lambda x: FF.dropout(x, 0.5))
    for batch in (4, 6, 9, 11):
        step(torch.randn(batch, 6, device=device))
    assert counter.frame_count == 2


@all_forms
def test_every_call_has_a_new_mask_and_manual_seed_brings_it_back(name, device, path):
    function = getattr(FF, name)
    step, _ = compiled(lambda x: function(x, 0.5, True))
    x = torch.ones(LONG[name], device=device)
    torch.manual_seed(5)
    first, second = step(x), step(x)
    torch.manual_seed(5)
    assert step(x).equal(first)
    assert not first.equal(second)


def test_backward_draws_the_mask_of_forward(device, path):
    step, _ = compiled(lambda x: FF.dropout(x, 0.5))
    x = torch.ones(64, 4, device=device, requires_grad=True)
    for _ in range(2):
        y = step(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert_close(dx, y.detach(), rtol=0, atol=0)  # x = 1: both are the scaled mask


def test_several_dropouts_in_a_graph_have_masks_of_their_own(device, path):
    step, counter = compiled(lambda x: (FF.dropout(x, 0.5), FF.dropout(x, 0.5)))
    first, second = step(torch.ones(64, 4, device=device))
    assert not first.equal(second)
    assert counter.frame_count == 1


def test_an_int_seed_is_a_constant_of_the_graph(device, path):
    step, _ = compiled(lambda x: FF.dropout(x, 0.5, seed=SEED))
    x = torch.randn(8, 6, device=device)
    assert_close(step(x), FF.dropout(x, 0.5, seed=SEED), rtol=0, atol=0)
    assert_close(step(x), step(x), rtol=0, atol=0)


def test_in_place_writes_into_the_input(device, path):
    def step(x, seed):
        FF.dropout(x, 0.5, inplace=True, seed=seed)
        return x + 1

    step_compiled, _ = compiled(step)
    x = torch.randn(8, 6, device=device)
    expected = FF.dropout(x, 0.5, seed=SEED)
    y = step_compiled(x, seed_tensor(device))
    assert_close(x, expected, rtol=0, atol=0)
    assert_close(y, expected + 1, rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_probabilities_0_and_1(p, device, path):
    step, counter = compiled(lambda x: FF.dropout(x, p) + FF.dropout2d(x, p))
    x = torch.randn(2, 3, 2, 2, device=device, requires_grad=True)
    y = step(x)
    assert_close(y, 2 * (1 - p) * x, rtol=0, atol=0)
    assert_close(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 2 * (1 - p)), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_autocast_in_the_graph(device, path):
    linear = torch.nn.Linear(6, 8, device=device)

    def step(x, seed):
        with torch.autocast(x.device.type, torch.bfloat16):
            return FF.dropout(linear(x), 0.5, residual=x[:, :1].expand(-1, 8).float(), seed=seed)

    step_compiled, _ = compiled(step)
    x = torch.randn(4, 6, device=device)
    result, expected = step_compiled(x, seed_tensor(device)), step(x, seed_tensor(device))
    assert result.dtype == expected.dtype == torch.float32
    assert_close(result, expected, rtol=0, atol=0)


MODULES = {
    "Dropout": lambda: fnn.Dropout(0.5),
    "Dropout_fused": lambda: fnn.Dropout(0.5, activation="gelu"),
    "AlphaDropout": lambda: fnn.AlphaDropout(0.5),
    "DropPath": lambda: fnn.DropPath(0.5),
}


@pytest.mark.parametrize("module", MODULES)
def test_modules_train_in_a_compiled_sequential(module, device, path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), MODULES[module](), torch.nn.Linear(8, 2)).to(device)
    step, counter = compiled(model, dynamic=True)
    compilations = []
    for batch in (16, 32, 48):
        x = torch.randn(batch, 6, device=device)
        first, second = step(x), step(x)
        assert not first.equal(second)
        (first + second).sum().backward()
        compilations.append(counter.frame_count)
    assert all(parameter.grad is not None for parameter in model.parameters())
    # The first batch may compile twice, as with torch.nn.Dropout: dynamic=True begins with a symbol for p.
    assert compilations == compilations[:1] * 3
    model.eval()
    # fp32, the compiler may choose another matrix product: some ulps of sums of eight
    assert_close(step(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_module_switches_between_training_and_evaluation(device, path):
    layer = fnn.Dropout(0.5)
    step, counter = compiled(layer)
    x = torch.randn(8, 6, device=device)
    for _ in range(2):
        layer.train()
        assert (step(x) == 0).any()
        layer.eval()
        assert_close(step(x), x, rtol=0, atol=0)
    assert counter.frame_count == 2


def test_channel_dropout_of_a_rank_torch_only_warns_of_is_one_graph(device, path):
    step, counter = compiled(lambda x: FF.dropout2d(x, 0.5))
    assert step(torch.randn(4, 3, 5, device=device)).shape == (4, 3, 5)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_equals_eager(device, path):
    """The default backend, which compiles the ATen path and calls the registered operators."""

    def step(x, bias, residual, seed):
        return FF.dropout(x * 2, 0.4, bias=bias, activation="gelu", residual=residual, seed=seed).sin()

    arguments = [torch.randn(s, device=device, requires_grad=True) for s in ((5, 6), (6,), (5, 6))]
    step_compiled = torch.compile(step, fullgraph=True, dynamic=True)
    y, expected = step_compiled(*arguments, seed_tensor(device)), step(*arguments, seed_tensor(device))
    results, gradients = (
        torch.autograd.grad(y.sum(), arguments),
        torch.autograd.grad(expected.sum(), arguments),
    )
    # fp32: Inductor fuses, and rounds gelu and sin differently, by some ulps of values near 1.
    assert_close(y, expected, rtol=1e-5, atol=2e-6)
    assert_close(results, gradients, rtol=1e-5, atol=5e-6)


def test_inductor_draws_a_new_mask_at_every_call(device, path):
    step = torch.compile(lambda x: FF.dropout(x, 0.5), fullgraph=True)
    x = torch.ones(64, 4, device=device, requires_grad=True)
    torch.manual_seed(5)
    first, second = step(x), step(x)
    assert not first.equal(second)
    torch.manual_seed(5)
    again = step(x)
    assert again.equal(first)
    (dx,) = torch.autograd.grad(again.sum(), x)
    assert_close(dx, again.detach(), rtol=0, atol=0)


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
def test_operator_on_dynamic_shapes_under_opcheck(device):
    """The registered operator with sizes that the graph does not know."""
    torch.library.opcheck(
        torch.ops.fastreg.dropout.default,
        (
            torch.randn(3, 5, device=device),
            torch.randn(5, device=device),
            torch.randn(3, 5, device=device),
            torch.empty(3, 5, device=device),
            seed_tensor(device),
            1 << 15,
            2.0,
            None,
            None,
            0,
            1,
            "silu",
        ),
        test_utils=("test_aot_dispatch_dynamic", "test_faketensor"),
    )

"""Batch, group and instance normalization under ``torch.compile``, ``torch.export``, ``torch.fx`` and ``opcheck``.

One graph, eager's numbers and running statistics, and no compilation for a new batch size.
"""

import copy

import pytest
import torch
from compiled_graphs import graph_runs_the_kernel
from shared import compilations, compiled
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastreg.functional as FF
import fastreg.nn as fnn
from fastreg.ops import backend
from fastreg.ops.fused import result_dtype, sum_dtype

pytestmark = pytest.mark.usefixtures("fresh_compiler")

CHANNELS = 6
SHAPE = (4, CHANNELS, 5, 3)
slow = pytest.mark.slow  # all of this file takes five minutes


def quick(names, among):
    """All names as parameters, of which the default run takes some."""
    return [name if name in names else pytest.param(name, marks=slow) for name in among]


def batch_norm(x, weight, bias, mean, var, **fused):
    return FF.batch_norm(x, mean, var, weight, bias, True, 0.3, **fused)


def batch_norm_without_statistics(x, weight, bias, mean, var, **fused):
    return FF.batch_norm(x, None, None, weight, bias, True, **fused)


def batch_norm_evaluation(x, weight, bias, mean, var, **fused):
    return FF.batch_norm(x, mean, var, weight, bias, False, **fused)


def group_norm(x, weight, bias, mean, var, **fused):
    return FF.group_norm(x, 3, weight, bias, **fused)


def instance_norm(x, weight, bias, mean, var, **fused):
    return FF.instance_norm(x, None, None, weight, bias, **fused)


def instance_norm_with_statistics(x, weight, bias, mean, var, **fused):
    return FF.instance_norm(x, mean, var, weight, bias, **fused)


def instance_norm_evaluation(x, weight, bias, mean, var, **fused):
    return FF.instance_norm(x, mean, var, weight, bias, False, **fused)


KINDS = {
    f.__name__: f
    for f in (
        *(batch_norm, batch_norm_without_statistics, batch_norm_evaluation),
        *(group_norm, instance_norm, instance_norm_with_statistics, instance_norm_evaluation),
    )
}
all_kinds = pytest.mark.parametrize("kind", quick(["batch_norm", "group_norm"], KINDS))
some_kinds = pytest.mark.parametrize("kind", ["batch_norm", "group_norm", "instance_norm"])


def tensors(device, shape=SHAPE, dtype=torch.float32):
    x, residual = torch.randn(2, *shape, device=device, dtype=dtype)
    weight = torch.linspace(0.5, 1.5, shape[1], device=device)
    bias, mean = torch.randn(2, shape[1], device=device)
    return x, weight, bias, residual, mean, mean.square() + 0.5


def assert_compiled_alike(actual, expected, scale=1.0):
    """fp32, values near 1: the compiler may sum in another order, and fuse a product with a sum."""
    assert_close(actual, expected, rtol=1e-5, atol=1e-5 * scale)


def check(
    kind, device, path, *, layout=torch.contiguous_format, residual=False, compiler="aot_eager", **fused
):
    """Values, statistics, strides and gradients of the compiled function equal those of eager."""

    def step(x, weight, bias, r, mean, var):
        return KINDS[kind](x, weight, bias, mean, var, **({"residual": r} if residual else {}), **fused)

    step_compiled, counter = compiled(step, compiler, dynamic=True)
    given = tensors(device)
    x, weight, bias, r, mean, var = given
    dy = torch.randn(SHAPE, device=device)
    results = []
    for function in (step, step_compiled):
        leaves = [
            t.detach()
            .clone()
            .to(memory_format=layout if t.dim() == 4 else torch.preserve_format)
            .requires_grad_()
            for t in (x, weight, bias, r)
        ]
        statistics = [mean.clone(), var.clone()]
        y = function(*leaves, *statistics)
        wanted = leaves if residual else leaves[:3]
        results.append((y.detach(), torch.autograd.grad(y, wanted, dy), statistics))
    (expected, gradients, statistics), (y, found, updated) = results
    assert y.stride() == expected.stride()
    assert_compiled_alike(y, expected)
    assert_compiled_alike(found, gradients, 10)  # sums of 60 terms
    assert_compiled_alike(updated, statistics)
    # The first statistics are not what went in, where they are to be updated.
    assert (updated[0].equal(mean)) == (kind not in ("batch_norm", "instance_norm_with_statistics"))
    assert compilations(counter) == 1
    assert graph_runs_the_kernel(counter) == (path == "kernels")


@all_kinds
def test_one_graph_with_eagers_values_gradients_and_statistics(kind, device, path):
    check(kind, device, path)


@slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", ["relu", pytest.param("gelu", marks=slow)])
@pytest.mark.parametrize(
    "kind",
    [
        *("batch_norm", "group_norm"),
        *(pytest.param(k, marks=slow) for k in ("instance_norm", "batch_norm_evaluation")),
    ],
)
def test_fused_forms_equal_eager(kind, activation, layout, device, path):
    check(kind, device, path, layout=layout, residual=True, activation=activation)


@pytest.mark.parametrize("shape", [(4, 8, 4, 2), pytest.param((3, 8, 5, 5), marks=slow)], ids=str)
def test_packed_signs_have_their_size_in_the_graph(shape, device, path):
    """A residual under a relu keeps bits, eight a byte, where the innermost dimension is a multiple of eight."""

    def step(x, weight, bias, r):
        return FF.batch_norm(x, None, None, weight, bias, True, activation="relu", residual=r)

    step_compiled, counter = compiled(step, dynamic=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        x, weight, bias, r, _, _ = tensors(device, shape)
        x, r = (t.to(memory_format=layout) for t in (x, r))
        dy = torch.randn(shape, device=device)
        results = []
        for function in (step, step_compiled):
            leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, r)]
            y = function(*leaves)
            results.append((y.detach(), torch.autograd.grad(y, leaves, dy)))
        assert_compiled_alike(results[1], results[0], 10)
    assert compilations(counter) <= 2  # one for each layout


@all_kinds
def test_a_new_batch_size_does_not_recompile(kind, device, path):
    def step(x, weight, bias, r, mean, var):
        return KINDS[kind](x, weight, bias, mean, var, residual=r, activation="silu")

    step_compiled, counter = compiled(step, dynamic=True)
    for batch in (4, 7, 9):
        given = [t.requires_grad_() for t in tensors(device, (batch, *SHAPE[1:]))[:4]]
        statistics = tensors(device)[4:]
        step_compiled(*given, *statistics).sum().backward()
        assert given[1].grad is not None
    assert compilations(counter) == 1


@slow
@some_kinds
def test_automatic_dynamic_shapes_compile_twice_at_most(kind, device, path):
    """The default of torch.compile: static at first, dynamic from the second size on."""
    step, counter = compiled(KINDS[kind])
    for batch in (4, 6, 9, 11):
        x, weight, bias, _, mean, var = tensors(device, (batch, *SHAPE[1:]))
        assert_compiled_alike(
            step(x, weight, bias, mean.clone(), var.clone()), KINDS[kind](x, weight, bias, mean, var)
        )
    assert compilations(counter) == 2


@some_kinds
def test_16_bit_inputs_with_fp32_parameters(kind, device, path):
    step, _ = compiled(KINDS[kind])
    x, weight, bias, _, mean, var = tensors(device)
    x = x.bfloat16()
    y = step(x, weight, bias, mean.clone(), var.clone())
    expected = KINDS[kind](x, weight, bias, mean, var)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert_close(y, expected, rtol=1e-2, atol=1e-2)  # one unit of bf16 where a sum has another order


@some_kinds
def test_autocast_in_the_graph(kind, device, path):
    linear = torch.nn.Linear(3, 3, device=device)

    def step(x, weight, bias, mean, var):
        with torch.autocast(x.device.type, torch.bfloat16):
            return KINDS[kind](linear(x), weight, bias, mean, var, activation="relu")

    step_compiled, _ = compiled(step)
    x, weight, bias, _, mean, var = tensors(device)
    result = step_compiled(x, weight, bias, mean.clone(), var.clone())
    expected = step(x, weight, bias, mean, var)
    assert result.dtype == expected.dtype
    assert_close(result, expected, rtol=1e-2, atol=1e-2)


@some_kinds
def test_without_gradients(kind, device, path):
    step, counter = compiled(KINDS[kind], dynamic=True)
    x, weight, bias, _, mean, var = tensors(device)
    weight.requires_grad_()
    with torch.no_grad():
        y = step(x, weight, bias, mean.clone(), var.clone())
    assert not y.requires_grad
    assert_compiled_alike(y, KINDS[kind](x, weight, bias, mean, var).detach())
    assert compilations(counter) == 1


@slow
@some_kinds
def test_frozen_parameters_and_frozen_inputs(kind, device, path):
    for needed in (0, 1):
        torch._dynamo.reset()
        step, _ = compiled(KINDS[kind])
        x, weight, bias, _, mean, var = tensors(device)
        results = []
        for function in (KINDS[kind], step):
            leaves = [x.clone(), weight.clone()]
            leaves[needed].requires_grad_()
            y = function(*leaves, bias, mean.clone(), var.clone())
            results.append(torch.autograd.grad(y.square().sum(), leaves[needed])[0])
        # Gradients of y^2 through a normalization are small differences of terms near 1.
        assert_compiled_alike(results[1], results[0], 10)


# --- modules ----------------------------------------------------------------------------------------------

LAYERS = {
    "BatchNorm2d": lambda: fnn.BatchNorm2d(CHANNELS),
    "BatchNorm2d_average": lambda: fnn.BatchNorm2d(CHANNELS, momentum=None),
    "BatchNorm2d_untracked": lambda: fnn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "BatchNorm2d_fused": lambda: fnn.BatchNorm2d(CHANNELS, activation="relu"),
    "GroupNorm": lambda: fnn.GroupNorm(3, CHANNELS, activation="silu"),
    "InstanceNorm2d": lambda: fnn.InstanceNorm2d(CHANNELS, affine=True),
    "InstanceNorm2d_tracked": lambda: fnn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True),
}
all_layers = pytest.mark.parametrize("layer", LAYERS)


@pytest.mark.parametrize("layer", quick(["BatchNorm2d", "GroupNorm"], LAYERS))
def test_modules_train_in_a_compiled_sequential(layer, device, path):
    """No graph break, also not for ``momentum=None``, where torch's own layer breaks (pytorch#194504)."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, CHANNELS, 3), LAYERS[layer](), torch.nn.Conv2d(CHANNELS, 1, 2)
    )
    model = model.to(device)
    twin = copy.deepcopy(model)
    step, counter = compiled(model, dynamic=True)
    for batch in (3, 5, 8):
        x = torch.randn(batch, 2, 7, 6, device=device)
        for m in (step, twin):
            m(x).square().sum().backward()
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_compiled_alike(p.grad, expected.grad, 1000)  # sums of some hundred terms of some units
    assert_compiled_alike(dict(model[1].state_dict()), dict(twin[1].state_dict()))
    before = compilations(counter)
    assert before == 1
    model.eval()
    twin.eval()
    assert_compiled_alike(step(x), twin(x), 10)
    assert_compiled_alike(dict(model[1].state_dict()), dict(twin[1].state_dict()))


@slow
@pytest.mark.parametrize("layer", ["BatchNorm2d", "BatchNorm2d_average"])
def test_statistics_are_those_of_torchs_eager_layer(layer, device, path):
    """Not only of ours: over several steps, then in evaluation, then in training again."""
    mine = LAYERS[layer]().to(device)
    theirs = torch.nn.BatchNorm2d(CHANNELS, momentum=mine.momentum).to(device)
    step, counter = compiled(mine)
    for training in (True, True, False, True):
        mine.train(training)
        theirs.train(training)
        x = torch.randn(SHAPE, device=device) + 1
        assert_compiled_alike(step(x), theirs(x))
        assert_compiled_alike(dict(mine.state_dict()), dict(theirs.state_dict()))
    assert mine.num_batches_tracked == 3
    assert compilations(counter) == 2  # one for each mode


def test_a_residual_goes_through_a_compiled_module(device, path):
    layer = fnn.BatchNorm2d(CHANNELS, activation="relu").to(device)
    twin = copy.deepcopy(layer)
    step, _ = compiled(layer)
    x, residual = torch.randn(2, *SHAPE, device=device)
    assert_compiled_alike(step(x, residual=residual), twin(x, residual=residual))
    assert_compiled_alike(step(x), twin(x))


def test_unbatched_instance_norm(device, path):
    layer = fnn.InstanceNorm2d(CHANNELS).to(device)
    step, _ = compiled(layer)
    x = torch.randn(SHAPE[1:], device=device)
    assert_compiled_alike(step(x), layer(x))


def test_an_empty_batch(device, path):
    """Torch counts it, and leaves the statistics."""
    layer = fnn.BatchNorm2d(CHANNELS).to(device)
    step, _ = compiled(layer)
    assert step(torch.randn(0, *SHAPE[1:], device=device)).shape == (0, *SHAPE[1:])
    assert_close(layer.running_mean, torch.zeros(CHANNELS, device=device), rtol=0, atol=0)
    assert layer.num_batches_tracked == 1


# --- Inductor ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batch_norm", "group_norm", "instance_norm"])
def test_inductor_equals_eager(kind, device, path):
    """The default backend, which compiles the ATen path and calls the registered operators."""
    check(kind, device, path, residual=True, compiler="inductor", activation="gelu")


@slow
def test_inductor_trains_a_module(device, path):
    model = torch.nn.Sequential(fnn.BatchNorm2d(CHANNELS, activation="relu"), torch.nn.Conv2d(CHANNELS, 2, 2))
    model = model.to(device)
    twin = copy.deepcopy(model)
    step = torch.compile(model, fullgraph=True)
    for _ in range(2):
        x = torch.randn(SHAPE, device=device)
        for m in (step, twin):
            m(x).square().sum().backward()
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_compiled_alike(p.grad, expected.grad, 100)
    assert_compiled_alike(dict(model.state_dict()), dict(twin.state_dict()))


# --- registered operators ---------------------------------------------------------------------------------


def operator(name):
    """``torch.ops.fastreg.<name>``, or a skipped test where there is none (no Triton)."""
    if not hasattr(torch.ops.fastreg, name):
        pytest.skip(f"no operator fastreg::{name}")
    return getattr(torch.ops.fastreg, name).default


def arguments_of(op, **given):
    """The arguments of an operator, by name: those given, and a plain default for the others.

    A new argument of the operator needs an entry here.
    """
    names = [argument.name for argument in op._schema.arguments]
    assert given.keys() <= set(names)
    x, groups = given["x"], given.get("groups", 0)
    units = x.shape[0] * groups if groups else x.shape[1]
    wide = {"dtype": sum_dtype(x.dtype), "device": x.device}
    written = {
        "y": torch.empty_like(x, dtype=result_dtype(x.dtype, given.get("residual"))),
        "mean": torch.rand(units, **wide),
        "var": torch.rand(units, **wide) + 0.5,
        "dx": torch.empty_like(x),
        "dweight": torch.empty(x.shape[1], **wide),
        "dbias": torch.empty(x.shape[1], **wide),
    }
    absent = ("weight", "bias", "residual", "signs", "activation", "dv")
    absent += ("running_mean", "running_var", "momentum_in_memory")
    numbers = {"groups": 0, "eps": 1e-5, "momentum": 0.1, "training": True}
    arguments = dict.fromkeys(absent) | numbers | written | given
    return {name: arguments[name] for name in names}


def _x(device, shape=SHAPE, **options):
    return torch.randn(shape, device=device, **options)


def _vector(device, **options):
    return torch.rand(CHANNELS, device=device, **options)


OP_SAMPLES = {
    "batch": lambda d: {"x": _x(d)},
    "batch_affine": lambda d: {
        "x": _x(d),
        "weight": _vector(d),
        "bias": _vector(d),
    },
    "running": lambda d: {"x": _x(d), "running_mean": _vector(d), "running_var": _vector(d)},
    "momentum_in_memory": lambda d: {
        "x": _x(d),
        "running_mean": _vector(d),
        "running_var": _vector(d),
        "momentum_in_memory": torch.full((), 0.1, device=d),
    },
    "group_channels_last": lambda d: {
        "x": _x(d).to(memory_format=torch.channels_last),
        "weight": _vector(d),
        "bias": _vector(d),
        "groups": 3,
        "activation": "silu",
    },
    "instance_residual": lambda d: {
        "x": _x(d),
        "residual": _x(d),
        "groups": CHANNELS,
        "activation": "gelu",
    },
    "signs": lambda d: {
        "x": _x(d, (2, CHANNELS, 4, 2)),
        "residual": _x(d, (2, CHANNELS, 4, 2)),
        "activation": "relu",
        "signs": torch.empty(2 * CHANNELS, dtype=torch.uint8, device=d),
    },
    "only_the_residual_has_a_gradient": lambda d: {
        "x": _x(d),
        "residual": _x(d),
        "activation": "leaky_relu",
    },
    "half_with_fp32_parameters": lambda d: {
        "x": _x(d, dtype=torch.bfloat16),
        "weight": _vector(d),
    },
    "half_with_fp32_residual": lambda d: {
        "x": _x(d, dtype=torch.bfloat16),
        "residual": _x(d),
    },
    "fp64": lambda d: {
        "x": _x(d, dtype=torch.float64),
        "groups": 2,
    },
    "not_dense": lambda d: {
        "x": _x(d, (4, CHANNELS, 6))[..., ::2],
    },
    "samples_inside": lambda d: {
        "x": _x(d, (CHANNELS, 5, 4)).movedim(-1, 0),
        "groups": 2,
    },
    "rows": lambda d: {"x": _x(d, (7, CHANNELS))},
}


@pytest.mark.parametrize("sample", quick(["batch_affine", "group_channels_last", "signs"], OP_SAMPLES))
def test_opcheck_of_the_forward_operator(sample, device):
    op = operator("channel_norm")
    torch.library.opcheck(op, (), arguments_of(op, **OP_SAMPLES[sample](device)))


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck_of_the_operator_with_given_statistics(residual, device):
    op = operator("channel_norm_apply")
    given = {"x": _x(device), "weight": _vector(device), "residual": _x(device) if residual else None}
    torch.library.opcheck(op, (), arguments_of(op, **given))


BACKWARD_SAMPLES = {
    "batch": lambda d: {},
    "affine": lambda d: {"weight": _vector(d), "bias": _vector(d)},
    "evaluation": lambda d: {"training": False, "weight": _vector(d)},
    "activation": lambda d: {"weight": _vector(d), "bias": _vector(d), "activation": "silu"},
    "residual": lambda d: {"activation": "gelu", "residual": _x(d), "dv": _x(d)},
    "group_channels_last": lambda d: {
        "x": _x(d).to(memory_format=torch.channels_last),
        "groups": 3,
        "weight": _vector(d),
    },
}


@pytest.mark.parametrize("sample", quick(["residual"], BACKWARD_SAMPLES))
def test_opcheck_of_the_backward_operator(sample, device):
    op = operator("channel_norm_backward")
    given = {"dy": _x(device), "x": _x(device), **BACKWARD_SAMPLES[sample](device)}
    torch.library.opcheck(op, (), arguments_of(op, **given))


@pytest.mark.parametrize("compiler", ["aot_eager", "aot_eager_decomp_partition"])
def test_statistics_of_a_checkpoint_are_updated_once_in_a_graph(compiler, device, path):
    """What is computed again in the backward pass needs nothing that the forward pass has overwritten."""
    layer = fnn.BatchNorm2d(CHANNELS).to(device)
    twin = copy.deepcopy(layer)
    x, y = (torch.randn(SHAPE, device=device).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)

    def block(x):
        return checkpoint(lambda x: layer(x.relu()), x, use_reentrant=False).square().sum()

    torch.compile(block, backend=compiler, fullgraph=True)(x).backward()
    twin(y.relu()).square().sum().backward()
    assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    assert_close(dict(layer.state_dict()), dict(twin.state_dict()), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
def test_the_operators_have_names_that_graphs_can_be_searched_for(device):
    """What ``graph_runs_the_kernel`` relies on, and what users see in a trace."""
    assert operator("channel_norm")
    assert operator("channel_norm_backward")


# --- torch.fx and torch.export ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@all_layers
def test_fx_keeps_modules_as_leaves(layer, training, device, path):
    """As torch's own: feature extraction, quantization and fusion look for ``call_module``."""
    model = torch.nn.Sequential(torch.nn.ReLU(), LAYERS[layer]()).to(device).train(training)
    twin = copy.deepcopy(model)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert dict(traced.named_modules())["1"] is model[1]
    x = torch.randn(SHAPE, device=device)
    for _ in range(2):  # statistics are updated at every call, not at the trace
        assert_compiled_alike(traced(x), twin(x))
    assert_close(dict(traced.state_dict()), dict(twin.state_dict()), rtol=1e-6, atol=1e-6)


def test_fx_keeps_a_residual(device, path):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = torch.nn.ModuleList(
                [fnn.BatchNorm2d(CHANNELS, activation="relu"), fnn.GroupNorm(3, CHANNELS)]
            )

        def forward(self, x):
            for norm in self.norms:
                x = norm(x.sin(), residual=x)
            return x

    block = Block().to(device)
    twin = copy.deepcopy(block)
    traced = torch.fx.symbolic_trace(block)
    x = torch.randn(SHAPE, device=device)
    assert_compiled_alike(traced(x), twin(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer", ["BatchNorm2d", "BatchNorm2d_fused", "GroupNorm", "InstanceNorm2d", "InstanceNorm2d_tracked"]
)
def test_export_with_a_dynamic_batch(layer, training, device, path):
    """Torch's own layers export in both modes; the exported module updates its own statistics."""
    model = torch.nn.Sequential(LAYERS[layer]()).to(device).train(training)
    twin = copy.deepcopy(model)
    x = torch.randn(SHAPE, device=device)
    exported = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    ).module()
    batch = torch.randn(7, *SHAPE[1:], device=device)
    assert_compiled_alike(exported(batch), twin(batch))
    for key, value in twin.state_dict().items():
        assert_compiled_alike(exported.state_dict()[key], value)


def test_export_of_a_plain_average_in_evaluation(device, path):
    model = fnn.BatchNorm2d(CHANNELS, momentum=None).to(device).eval()
    exported = torch.export.export(model, (torch.randn(SHAPE, device=device),)).module()
    x = torch.randn(SHAPE, device=device)
    assert_compiled_alike(exported(x), model(x))

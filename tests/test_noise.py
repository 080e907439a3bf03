"""Gaussian noise against its definition in fp64: both forms, every layout and dtype, on the kernels and on ATen."""

import copy
import math
import pickle

import pytest
import torch
from machine_option import bf16
from shared import compiled, needs_gpu, needs_triton
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fastreg import random
from fastreg.nn.noise import GaussianNoise
from fastreg.ops import backend, layout
from fastreg.ops import noise as ops
from fastreg.ops.noise import MODES, gaussian_noise
from fastreg.random import Stream

both_modes = pytest.mark.parametrize("mode", MODES)

# The normals of the kernels are fp32 in every dtype, and tests/test_random.py bounds their error: 4e-5 holds for all
# but the pairs with a radius below 0.02, of which 2,500 pairs expect one half, and the largest radii.
NORMAL_ERROR = 4e-5
# 16-bit results are rounded once; the interpreter truncates to bf16, which is one unit in the last place more.
ROUNDING = {torch.float64: 0, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: bf16(1e-2)}
DTYPES = list(ROUNDING)


def eps_of(x, seed):
    """The normals by the contract, fp64: elements count in memory order."""
    flat = random.normal((x.numel(),), Stream(seed), dtype=torch.float64, device=x.device)
    return flat.as_strided(x.shape, layout.dense_strides(x))


def exact(x, std, mode, seed):
    x, eps = x.detach().double(), eps_of(x, seed)
    return x + std * eps if mode == "additive" else x * (1 + std * eps)


def assert_noisy(actual, x, std, mode, seed):
    expected = exact(x, std, mode, seed)
    scale = std if mode == "additive" else std * x.detach().double().abs()
    error = (actual.double() - expected).abs()
    assert (error <= scale * NORMAL_ERROR + ROUNDING[x.dtype] * (expected.abs() + 1e-3)).all()


def assert_plausible(samples, variances):
    """z-tests of means of 0: {name: sample} with the sample's known variance. Errs once in 10^4 seeds (Bonferroni),
    and the seed is fixed: it passes always or never."""
    for (name, sample), variance in zip(samples.items(), variances, strict=True):
        z = float(sample.double().mean()) * math.sqrt(sample.numel() / variance)
        assert math.erfc(abs(z) / math.sqrt(2)) * len(samples) > 1e-4, f"{name}: z = {z:.2f}"


# --- the definition ---------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.executed
@both_modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 77), (1030,), ()], ids=str)
def test_equals_the_definition(path, device, shape, dtype, mode):
    x = torch.randn(shape, dtype=dtype, device=device)
    before = x.clone()
    y = gaussian_noise(x, 0.3, mode=mode, seed=11)
    assert y.dtype == dtype
    assert_noisy(y, x, 0.3, mode, 11)
    assert torch.equal(x, before)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 4, 7, 8, 1024, 1031])
def test_every_element_is_written_and_none_behind_the_last(device, numel, dtype):
    """Whole vectors and tiles, and what is left behind them."""
    memory = torch.full((numel + 16,), 99.0, dtype=dtype, device=device)
    x = torch.randn(numel, dtype=dtype, device=device)
    y = memory[:numel]
    ops.launches.run(x, y, Stream(3), ops.Form(0.5, False))
    assert (memory[numel:] == 99).all()
    assert_noisy(y, x, 0.5, "additive", 3)


@needs_triton
def test_tiles_of_large_tensors_give_the_same_noise(device):
    """4,096 elements a tile from 2^20 elements on, and 64-bit indices from 2^31 on."""
    x = torch.randn(5001, dtype=torch.bfloat16, device=device)
    results = []
    for changes in ({}, {"block": 4096}, {"wide": True}):
        y = torch.empty_like(x)
        (launch,) = ops.launches(x, y, Stream(-3, 4), ops.Form(0.5, True))
        plan = launch.arguments["plan"] = launch.arguments["plan"]._replace(**changes)
        grid = (-(-5001 // plan.block),)
        launch._replace(grid=grid).run(device)
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_launch_follows_the_size():
    def arguments(*size, dtype=torch.bfloat16):
        x = torch.empty(size, dtype=dtype, device="meta")
        (launch,) = ops.launches(x, x, Stream(1), ops.Form(0.1, False))
        return launch

    if not backend.HAS_TRITON:
        pytest.skip("needs Triton")
    small, large, huge = arguments(1029), arguments(1 << 20), arguments(1 << 16, 1 << 15)
    assert (small.grid, small.arguments["vectors"], small.arguments["tail"]) == ((1,), 128, 5)
    assert (small.leaves["plan.ragged"], large.leaves["plan.ragged"]) == (True, False)
    assert (large.grid, large.leaves["plan.block"], large.leaves["plan.wide"]) == ((256,), 4096, False)
    assert huge.leaves["plan.wide"]
    assert [arguments(8, dtype=dtype).leaves["plan.vector"] for dtype in DTYPES] == [4, 4, 8, 8]


LAYOUTS = {
    "channels_last": lambda: torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 4, 3, 2, 5).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.randn(5, 3, 8, 2).permute(3, 2, 1, 0),
    "sliced": lambda: torch.randn(2, 8, 3, 10)[..., ::2],
    "expanded": lambda: torch.randn(2, 8, 1, 5).expand(2, 8, 3, 5),
    "offset": lambda: torch.randn(2 * 8 * 3 * 5 + 1)[1:].view(2, 8, 3, 5),
    "six dimensions": lambda: torch.randn(2, 3, 1, 2, 1, 4),
}


@both_modes
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_kept_and_the_noise_follows_memory(path, device, name, mode):
    x = LAYOUTS[name]().to(device)
    x.requires_grad_()
    y = gaussian_noise(x, 0.3, mode=mode, seed=8)
    assert y.stride() == torch.empty_like(x).stride()
    assert_noisy(y.detach(), x, 0.3, mode, 8)
    if mode == "additive":
        return
    for dy in (torch.randn_like(x), torch.randn(x.shape, device=device), torch.ones(1, device=device)):
        dy = dy.expand(x.shape)  # of the layout of x, contiguous, and of one element
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert_close(
            dx.double(), dy.double() * (1 + 0.3 * eps_of(x, 8)), rtol=NORMAL_ERROR, atol=NORMAL_ERROR
        )


@both_modes
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4)])
def test_empty(path, device, shape, mode):
    x = torch.randn(shape, device=device, requires_grad=True)
    y = gaussian_noise(x, 0.3, mode=mode, seed=1)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert gaussian_noise(x, 0.3, mode=mode).shape == shape


@both_modes
def test_16_bit_noise_is_rounded_once(path, device, mode):
    """To half a unit in the last place: fp16 noise, or an fp16 factor near 1, would double the error."""
    x = torch.randn(4096, device=device).half()
    y, expected = gaussian_noise(x, 0.5, mode=mode, seed=1).double(), exact(x, 0.5, mode, 1)
    normal_error = 0.5 * NORMAL_ERROR * (1 if mode == "additive" else x.double().abs())
    assert ((y - expected).abs() <= 2**-11 * expected.abs() + normal_error + 2**-25).all()


def test_nan_and_inf_stay(path, device):
    x = torch.tensor([math.nan, math.inf, -math.inf] * 5, device=device)
    for mode in MODES:
        assert torch.equal(gaussian_noise(x, 0.1, mode=mode, seed=1).nan_to_num(), x.nan_to_num())


# --- statistics -------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("seed", [None, 5])
def test_moments(aten, mode, seed):
    """Mean, variance, skewness and kurtosis of the noise (eps^k has variance 1, 2, 15, 96), independent of x."""
    x = torch.randn(1 << 19, dtype=torch.float64)
    y = gaussian_noise(x, 0.5, mode=mode, seed=seed)
    eps = (y - x) / 0.5 if mode == "additive" else (y / x - 1) / 0.5
    samples = {
        "mean": eps,
        "variance": eps**2 - 1,
        "skewness": eps**3,
        "kurtosis": eps**4 - 3,
        "with x": eps * x,
        "neighbours": eps[1:] * eps[:-1],
    }
    assert_plausible(samples, [1, 2, 15, 96, 1, 1])


def test_multiplicative_noise_has_the_moments_of_dropout(aten):
    """Srivastava et al. 2014, section 10: std = sqrt(p / (1 - p)) keeps the mean x and the variance x^2 p / (1 - p)."""
    p, x = 0.2, 3.0
    noise = (
        gaussian_noise(torch.full((1 << 19,), x).double(), math.sqrt(p / (1 - p)), mode="multiplicative") - x
    )
    variance = x**2 * p / (1 - p)
    assert_plausible({"mean": noise, "variance": noise**2 - variance}, [variance, 2 * variance**2])


def test_noise_on_the_inputs_of_a_linear_model_is_tikhonov_regularization(aten):
    """Bishop 1995: E |W(x + std eps) - t|^2 = |Wx - t|^2 + std^2 |W|_F^2, here over 400,000 draws.

    The tolerance is 4 standard errors of the mean, estimated from the draws: an error rate of 6e-5.
    """
    weight, x, target = (torch.randn(size, dtype=torch.float64) for size in ((3, 5), (5,), (3,)))
    std = 0.4
    noisy = gaussian_noise(x.expand(400_000, 5), std)
    losses = (noisy @ weight.T - target).square().sum(1)
    expected = (weight @ x - target).square().sum() + std**2 * weight.square().sum()
    standard_error = losses.std() / math.sqrt(len(losses))
    assert standard_error < 0.05 * std**2 * weight.square().sum()  # the penalty is not lost in the noise
    assert abs(losses.mean() - expected) < 4 * standard_error


# --- where the noise comes from ---------------------------------------------------------------------------


@pytest.mark.executed
@both_modes
def test_seeds_reproduce(path, device, mode):
    x = torch.randn(40, 30, device=device)
    first = gaussian_noise(x, mode=mode, seed=5)
    assert torch.equal(gaussian_noise(x, mode=mode, seed=5), first)
    assert torch.equal(gaussian_noise(x, mode=mode, seed=torch.tensor([5], device=device)), first)
    assert not torch.equal(gaussian_noise(x, mode=mode, seed=6), first)


def test_torchs_generators_govern_the_noise(path, device):
    x = torch.randn(40, 30, device=device)
    torch.manual_seed(3)
    first, second = gaussian_noise(x), gaussian_noise(x)
    torch.manual_seed(3)
    assert torch.equal(gaussian_noise(x), first)
    assert not torch.equal(first, second)
    drawn = [gaussian_noise(x, generator=torch.Generator(device).manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_checkpointing_draws_the_noise_again(path, device):
    x = torch.randn(6, 50, device=device, requires_grad=True)

    def block(x):
        return gaussian_noise(x, 0.5, mode="multiplicative")

    torch.manual_seed(4)
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.manual_seed(4)
    y = checkpoint(block, x, use_reentrant=False)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(gradient, expected)


# --- derivatives ------------------------------------------------------------------------------------------


def counted_launches(monkeypatch):
    launched = []
    run = ops.launches.run
    monkeypatch.setattr(ops.launches, "run", lambda *arguments: launched.append(arguments) or run(*arguments))
    return launched


@needs_triton
def test_the_additive_gradient_is_that_of_the_output_without_a_launch(device, monkeypatch):
    launched = counted_launches(monkeypatch)
    x = torch.randn(6, 50, device=device, requires_grad=True)
    y = gaussian_noise(x, seed=1)
    assert len(launched) == 1
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.data_ptr() == dy.data_ptr()
    assert len(launched) == 1


@needs_triton
def test_the_multiplicative_gradient_is_one_launch_of_the_same_function(device, monkeypatch):
    """With dy = x, it is the output, bit by bit: the same noise, drawn again."""
    launched = counted_launches(monkeypatch)
    x = torch.randn(6, 500, device=device, requires_grad=True)
    for seed in (None, 1, torch.tensor([7], device=device)):
        launched.clear()
        y = gaussian_noise(x, mode="multiplicative", seed=seed)
        (dx,) = torch.autograd.grad(y, x, x.detach())
        assert len(launched) == 2
        assert torch.equal(dx, y.detach())


@needs_triton
@both_modes
def test_nothing_of_the_size_of_the_input_is_saved(device, mode):
    x = torch.randn(64, 64, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        gaussian_noise(x, mode=mode, seed=1)
        gaussian_noise(x, mode=mode, seed=torch.tensor([1], device=device))
    assert saved == [1]


def test_backward_draws_the_noise_of_forward(path, device):
    x = torch.randn(6, 50, dtype=torch.float64, device=device, requires_grad=True)
    y = gaussian_noise(x, 0.5, mode="multiplicative")
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_close(dx, dy * (y / x).detach(), rtol=1e-12, atol=1e-12)  # fp64: a division and a product


@both_modes
def test_first_and_second_derivatives(path, device, mode):
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, device=device)
    x = x.to(memory_format=torch.channels_last).requires_grad_()

    def function(x):
        return gaussian_noise(x, 0.4, mode=mode, seed=2).pow(3)

    assert gradcheck(function, (x,), fast_mode=True)
    assert gradgradcheck(function, (x,), fast_mode=True)


@both_modes
def test_batched_gradients(path, device, mode):
    """``is_grads_batched`` runs the backward pass under vmap, on the definition."""
    x = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    y = gaussian_noise(x, 0.4, mode=mode, seed=3)
    dy = torch.randn(3, 2, 5, dtype=torch.float64, device=device)
    expected = [torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in dy]
    (batched,) = torch.autograd.grad(y, x, dy, is_grads_batched=True)
    assert_close(batched, torch.stack(expected), rtol=NORMAL_ERROR, atol=NORMAL_ERROR)


@both_modes
def test_func_transforms(path, device, mode):
    x = torch.randn(3, 8, dtype=torch.float64, device=device)

    def function(x):
        return gaussian_noise(x, 0.4, mode=mode, seed=3)

    gradient = torch.func.grad(lambda x: function(x).square().sum())(x)
    slope = 1 if mode == "additive" else 1 + 0.4 * eps_of(x, 3)
    assert_close(gradient, 2 * exact(x, 0.4, mode, 3) * slope, rtol=1e-12, atol=1e-12)
    value, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
    assert_close(tangent, slope * torch.ones_like(x), rtol=1e-12, atol=1e-12)
    assert_close(value, exact(x, 0.4, mode, 3), rtol=1e-12, atol=1e-12)
    same = torch.vmap(function)(x)  # each example as if it were alone
    assert_close(same, torch.stack([exact(row, 0.4, mode, 3) for row in x]), rtol=1e-12, atol=1e-12)


def test_vmap_obeys_its_randomness(path, device):
    x = torch.zeros(4, 50, device=device)
    noise = {kind: torch.vmap(gaussian_noise, randomness=kind)(x) for kind in ("same", "different")}
    assert (noise["same"] == noise["same"][0]).all()
    assert not (noise["different"] == noise["different"][0]).any(1)[1:].any()
    with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
        torch.vmap(gaussian_noise)(x)


# --- identity, in-place, errors ---------------------------------------------------------------------------


@both_modes
def test_the_input_itself_comes_back_where_there_is_no_noise(path, device, mode):
    x = torch.randn(4, 6, device=device)
    before = x.clone()
    for inplace in (False, True):
        assert gaussian_noise(x, 0.5, False, inplace, mode=mode) is x
        assert gaussian_noise(x, 0.0, True, inplace, mode=mode) is x
        assert gaussian_noise(x, 0, mode=mode, seed=1) is x
    assert torch.equal(x, before)


@both_modes
@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("name", ["contiguous", "channels_last", "sliced"])
def test_inplace_writes_into_the_input_and_nowhere_else(path, device, name, seed, mode):
    leaf = torch.randn(2, 8, 3, 10, device=device)
    if name == "channels_last":
        leaf = leaf.to(memory_format=torch.channels_last)
    leaf.requires_grad_()
    memory = leaf * 1
    target = memory[..., ::2] if name == "sliced" else memory
    before, neighbours = target.detach().clone(), memory.detach()[..., 1::2].clone()
    assert gaussian_noise(target, 0.5, True, True, mode=mode, seed=seed) is target
    if seed is not None:
        assert_noisy(target.detach(), before if name == "sliced" else leaf, 0.5, mode, seed)
    else:
        assert not torch.equal(target.detach(), before)
    if name == "sliced":
        assert torch.equal(memory.detach()[..., 1::2], neighbours)
    target.sum().backward()
    gradient = leaf.grad[..., ::2] if name == "sliced" else leaf.grad
    factor = torch.ones_like(before) if mode == "additive" else target.detach() / before
    assert_close(gradient, factor, rtol=1e-5, atol=1e-5)  # fp32, a division


@needs_triton
@both_modes
def test_inplace_takes_no_other_memory(device, mode, monkeypatch):
    launched = counted_launches(monkeypatch)
    x = torch.randn(8, 4, device=device)
    gaussian_noise(x, 0.5, True, True, mode=mode)
    ((read, written, *_),) = launched
    assert read is written is x


@pytest.mark.parametrize("seed", [None, 1])
def test_inplace_is_refused_before_anything_changes(path, device, seed):
    leaf = torch.randn(8, 4, device=device, requires_grad=True)
    overlapping = torch.zeros(1, 4, device=device).expand(8, 4)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
        gaussian_noise(leaf, 0.5, True, True, seed=seed)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        gaussian_noise(overlapping, 0.5, True, True, seed=seed)
    assert torch.equal(leaf, before)
    assert (overlapping == 0).all()
    with torch.no_grad():
        assert gaussian_noise(leaf, 0.5, True, True, seed=seed) is leaf
    assert not torch.equal(leaf, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"std": -0.1}, ValueError, "std has to be finite and not negative, but got -0.1"),
        ({"std": math.nan}, ValueError, "std has to be finite and not negative, but got nan"),
        ({"std": math.inf}, ValueError, "std has to be finite and not negative, but got inf"),
        ({"std": torch.tensor(0.1, requires_grad=True)}, TypeError, "std has to be a number, but got Tensor"),
        ({"std": torch.tensor([0.1])}, TypeError, "std has to be a number, but got Tensor"),
        ({"mode": "add"}, ValueError, "unknown mode 'add': choose one of additive, multiplicative"),
    ],
)
def test_bad_arguments_are_refused_at_once(path, device, arguments, error, message, training):
    with pytest.raises(error, match=message):
        gaussian_noise(torch.ones(3, device=device), training=training, **arguments)
    with pytest.raises(error, match=message):
        GaussianNoise(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator exclude each other"),
        ({"seed": 1.5}, TypeError, "seed has to be an int"),
        ({"seed": 2**64}, ValueError, "seed has to fit in 64 bits"),
    ],
)
def test_bad_seeds_are_refused(path, device, arguments, error, message):
    with pytest.raises(error, match=message):
        gaussian_noise(torch.ones(3, device=device), **arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("training", [True, False])
def test_other_dtypes_are_refused(path, device, dtype, training):
    with pytest.raises(TypeError, match=f"needs a floating point input, but got {dtype}"):
        gaussian_noise(torch.ones(3, dtype=dtype, device=device), 0.1, training)


# --- the module -------------------------------------------------------------------------------------------


def test_module(path, device):
    module = GaussianNoise(0.25, mode="multiplicative")
    assert repr(module) == "GaussianNoise(std=0.25, inplace=False, mode=multiplicative)"
    assert repr(GaussianNoise()) == "GaussianNoise(std=0.1, inplace=False, mode=additive)"
    assert module.state_dict() == {}
    assert repr(copy.deepcopy(module)) == repr(pickle.loads(pickle.dumps(module))) == repr(module)
    x = torch.randn(40, 6, device=device)
    torch.manual_seed(1)
    y = module(x)
    torch.manual_seed(1)
    assert torch.equal(y, gaussian_noise(x, 0.25, mode="multiplicative"))
    assert not torch.equal(module(x), y)
    assert module.eval()(x) is x
    assert GaussianNoise(inplace=True)(x) is x


def test_a_call_can_be_traced_by_fx(path, device):
    traced = torch.fx.symbolic_trace(lambda x: gaussian_noise(x.sin(), 0.5))
    assert gaussian_noise in [node.target for node in traced.graph.nodes]
    x = torch.randn(3, 4, device=device)
    assert not torch.equal(traced(x), traced(x))


def test_a_subclass_of_tensor_stays_one(path, device):
    class Wrapped(torch.Tensor):
        pass

    y = gaussian_noise(torch.zeros(9, device=device).as_subclass(Wrapped), 0.5, seed=1)
    assert type(y) is Wrapped
    assert_noisy(y.as_subclass(torch.Tensor), torch.zeros(9, device=device), 0.5, "additive", 1)


# --- torch.compile ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_with_eagers_values_and_gradients_at_every_batch_size(path, device):
    def step(x, seed):
        return gaussian_noise(x, 0.4, mode="multiplicative", seed=seed)

    step_compiled, counter = compiled(step, dynamic=True)
    seed = torch.tensor([20], device=device)
    compilations = []
    for batch in (4, 9):
        x = torch.randn(batch, 3, 2, 5, device=device).to(memory_format=torch.channels_last).requires_grad_()
        dy = torch.randn(x.shape, device=device)
        y, expected = step_compiled(x, seed), step(x, seed)
        assert_close(y, expected, rtol=0, atol=0)
        assert y.stride() == expected.stride()
        (result,), (gradient,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
        assert_close(result, gradient, rtol=0, atol=0)
        compilations.append(counter.frame_count)
    # torch 2.11 compiles the definition twice for the first batch: it begins with a symbol for math.pi.
    assert compilations == compilations[:1] * 2
    # An autograd.Function has graphs of its own, which are modules of the graph.
    modules = [m for graph in counter.graphs for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [node for m in modules for node in m.graph.nodes if node.op == "call_function"]
    assert any("fastreg" in str(node.target) for node in nodes) == (path == "kernels")


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_module_draws_new_noise_at_every_call_and_the_same_in_backward(path, device):
    layer = GaussianNoise(0.5, mode="multiplicative")
    step, counter = compiled(layer, dynamic=True)
    compilations = []
    for batch in (16, 32):
        x = torch.randn(batch, 6, device=device, requires_grad=True)
        first, second = step(x), step(x)
        assert not first.equal(second)
        (dx,) = torch.autograd.grad(second, x, x.detach())
        assert_close(dx, second.detach(), rtol=0, atol=0)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[1]
    torch.manual_seed(5)
    first = step(x)
    torch.manual_seed(5)
    assert step(x).equal(first)
    layer.eval()
    assert_close(step(x), x, rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
def test_in_place_in_a_graph_writes_into_the_input(path, device):
    def step(x):
        x = x * 1
        gaussian_noise(x, 0.5, inplace=True, seed=3)
        return x + 1

    step_compiled, _ = compiled(step)
    x = torch.randn(8, 6, device=device, requires_grad=True)
    y = step_compiled(x)
    assert_close(y, gaussian_noise(x, 0.5, seed=3) + 1, rtol=0, atol=0)
    dy = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy)


OP_INPUTS = {
    "contiguous": lambda: torch.randn(3, 5),
    "channels_last": lambda: torch.randn(2, 4, 3, 2).to(memory_format=torch.channels_last),
    "not dense, half": lambda: torch.randn(4, 6).half()[:, ::2],
    "empty": lambda: torch.randn(0, 4),
}


@needs_triton
@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "multiplicative") for name in OP_INPUTS), ("contiguous", "additive")]
)
def test_opcheck_of_the_operator(name, mode, device):
    x = OP_INPUTS[name]().to(device)
    arguments = (x, torch.empty_like(x), torch.tensor([20], device=device), 0.4, mode == "multiplicative")
    torch.library.opcheck(torch.ops.fastreg.gaussian_noise.default, arguments)


# --- on a GPU ---------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.gpu
@both_modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_noise_equals_the_cpu_definition(dtype, mode):
    x = torch.randn(1_100_003, dtype=dtype, device="cuda")
    y = gaussian_noise(x, 0.5, mode=mode, seed=-5).cpu().double()
    # Over a million elements, the smallest radii meet the worst error of log2: see normal_tolerance in test_random.py.
    assert_close(y, exact(x.cpu(), 0.5, mode, -5), rtol=ROUNDING[dtype] + 1e-3, atol=2e-3)
    assert (y - exact(x.cpu(), 0.5, mode, -5)).abs().median() < ROUNDING[dtype] + 1e-6


@needs_gpu
@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_beyond_2_to_the_31_elements():
    count = (1 << 31) + 4096 + 3
    y = gaussian_noise(torch.zeros(count, dtype=torch.bfloat16, device="cuda"), 1.0, seed=1)
    block = torch.arange((1 << 31) // 4 - 8, count // 4)
    words = random.words(block, Stream(1))
    radius = (-2 * ((words[:, 0::2].double() + 0.5) / 2**32).log()).sqrt()
    angle = words[:, 1::2].double() * (2 * math.pi / 2**32)
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten()
    first = int(block[0]) * 4
    assert_close(y[first : first + len(expected)].cpu().double(), expected, rtol=1e-2, atol=1e-3)

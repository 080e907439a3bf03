"""DropConnect against the definition with all masks at once, in fp64; its statistics against the paper's formulas."""

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

import fastreg.functional as F
from fastreg import random
from fastreg.ops.fused import ACTIVATIONS, OF_OUTPUT
from fastreg.ops.linear import drop_connect as ops
from fastreg.random import Stream


def definition(v, weight, bias, p, group_size=1, seed=SEED, inverted=True):
    """z in fp64, by the masks of ``fastreg.random``."""
    chance = random.chance(p)
    group = torch.arange(len(v)) // group_size
    mask = random.connection_mask(group, *weight.shape, chance, Stream(seed))
    scale = 1 / chance.probability if inverted else 1.0
    z = torch.einsum("bnk,nk,bk->bn", mask.double(), weight, v) * scale
    return z if bias is None else z + bias


def check(device, examples, outputs, inputs, *, p=0.5, dtype=torch.float32, bias=True, **options):
    v, weight, b, dz = tensors(device, examples, outputs, inputs, dtype)
    given = [v, weight, *([b] if bias else [])]
    leaves = [t.clone().requires_grad_() for t in given]
    z = F.drop_connect_linear(*leaves, *([] if bias else [None]), p, seed=SEED, **options)
    assert z.dtype == dtype
    found = torch.autograd.grad(z, leaves, dz)
    exact = [t.detach().cpu().double().requires_grad_() for t in given]
    group_size = examples if options.get("mode") == "batch" else options.get("group_size") or 1
    expected = definition(*exact, *([] if bias else [None]), p, group_size)
    near(z, expected, TOLERANCE[dtype])
    for gradient, wanted in zip(found, torch.autograd.grad(expected, exact, dz.cpu().double()), strict=True):
        near(gradient, wanted, TOLERANCE[dtype])


# --- the product and its gradients ------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.executed
@pytest.mark.parametrize(
    ("examples", "outputs", "inputs", "p"),
    [
        (3, 5, 7, 0.5),
        (3, 5, 7, 0.25),
        (3, 5, 7, 0.3),
        (1, 1, 1, 0.5),
        (5, 32, 16, 0.5),
        (17, 9, 20, 0.5),
        pytest.param(5, 32, 16, 0.25, marks=pytest.mark.slow),
        pytest.param(17, 9, 20, 0.3, marks=pytest.mark.slow),
    ],
)
def test_every_example_has_its_mask(path, device, examples, outputs, inputs, p):
    check(device, examples, outputs, inputs, p=p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("portion", [1, 15, 21])
def test_masks_are_cut_between_outputs(monkeypatch, dtype, portion):
    """In ATen, into one, two or three of five outputs."""
    monkeypatch.setattr(ops.backend, "runs_kernels", lambda x: False)
    monkeypatch.setattr(ops, "PORTION", portion)
    check(torch.device("cpu"), 18, 5, 7, p=0.3, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(path, device, dtype):
    check(device, 18, 6, 21, dtype=dtype)
    check(device, 3, 6, 16, dtype=dtype, bias=False)


@pytest.mark.parametrize(
    ("examples", "group_size"), [(10, 2), (35, 2), (9, 40), (50, 3), (40, 17), (20, 16), (270, 16)]
)
def test_groups_share_a_mask(path, device, examples, group_size):
    """Several to a tile below 16 examples, else a tile for each; the last group is smaller; a second word of lanes."""
    check(device, examples, 5, 9, mode="group", group_size=group_size)


@pytest.fixture(params=["in registers", "in memory"])
def masked_in(request, monkeypatch) -> str:
    """Where the kernels mask what examples share: it goes by their number, and not by hundreds of them here."""
    registers = request.param == "in registers"
    monkeypatch.setattr(ops.Form, "masks_in_registers", lambda form, examples: registers)
    return request.param


@pytest.mark.smoke
@pytest.mark.parametrize(("examples", "p"), [(1, 0.5), (7, 0.25), (33, 0.5)])
def test_the_batch_shares_a_mask(path, device, masked_in, examples, p):
    check(device, examples, 5, 19, p=p, mode="batch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_shared_masks(path, device, masked_in, dtype):
    check(device, 40, 6, 21, dtype=dtype, mode="group", group_size=17)
    check(device, 17, 6, 16, dtype=dtype, mode="batch", bias=False)


def test_a_mask_for_the_batch_is_that_of_one_large_group(path, device):
    """Whatever the size of the batch, and of any other group that takes all of it."""
    v, weight, bias, _ = tensors(device, 33, 4, 5)
    z = F.drop_connect_linear(v, weight, bias, 0.3, mode="batch", seed=SEED)
    assert_close(F.drop_connect_linear(v[:2], weight, bias, 0.3, mode="batch", seed=SEED), z[:2])
    one = F.drop_connect_linear(v, weight, bias, 0.3, mode="group", group_size=33, seed=SEED)
    assert_close(one, z)
    unscaled = F.drop_connect_linear(v, weight, bias, 0.3, mode="batch", seed=SEED, inverted=False)
    assert_close(unscaled, (z - bias) * random.chance(0.3).probability + bias, rtol=1e-4, atol=1e-5)


def test_an_activation_behind_a_shared_mask(path, device, masked_in):
    v, weight, bias, _ = tensors(device, 17, 6, 7)
    with torch.no_grad():
        z = F.drop_connect_linear(v, weight, bias, activation="gelu", mode="batch", seed=SEED)
    exact = (t.cpu().double() for t in (v, weight, bias))
    near(z, ACTIVATIONS["gelu"](definition(*exact, 0.5, 17)), TOLERANCE[v.dtype])


@pytest.mark.parametrize(
    ("group_size", "p", "registers"),
    [
        (1, 0.5, True),
        (128, 0.5, True),
        (512, 0.5, True),
        (513, 0.5, False),
        (ops.BATCH, 0.5, False),
        (256, 0.25, True),
        (257, 0.25, False),
        (128, 0.3, True),
        (129, 0.3, False),
    ],
)
def test_small_groups_mask_weights_in_registers(group_size, p, registers):
    """Up to four tiles of 128 examples at one binary digit, as two digits draw twice the numbers; one tile always."""
    form = ops.Form(*random.chance(p), group_size, 2.0)
    assert form.masks_in_registers(4096) is registers
    assert form.masks_in_registers(100)  # of which no group is larger


@pytest.mark.skipif(not ops.backend.HAS_TRITON, reason="needs Triton")
def test_groups_that_fill_a_tile_have_it_for_themselves():
    v, weight, z = (torch.empty(*s, device="meta") for s in ((300, 64), (96, 64), (300, 96)))
    for group_size, shared, tile in (
        (1, False, 16),
        (15, False, 32),
        (16, True, 16),
        (40, True, 64),
        (300, True, 128),
    ):
        form = ops.Form(1, 1, group_size, 2.0)
        launch = ops.product_launches(v, weight, None, z, None, Stream(1), form, False, True)[0]
        plan = launch.arguments["plan"]
        assert (plan.shared, plan.examples) == (shared, tile)
        gradient = ops.weight_gradient_launches(z, v, weight, Stream(1), form, True)[0].kernel
        assert gradient is (ops.kernels.shared_weight_gradient if shared else ops.kernels.weight_gradient)


def test_columns_that_are_split(path, device, monkeypatch):
    """As few rows and examples as here leave most of a GPU idle, so that programs share the columns."""
    check(device, 2, 5, 16 * 5 + 3)


def check_activation(
    device, activation, dtype=torch.float32, *, needed=(0, 1, 2), bias=True, size=(5, 6, 7), **options
):
    """Results and gradients behind an activation, in training and without gradients, against fp64."""
    *given, dz = tensors(device, *size, dtype)
    exact = [t.cpu().double().requires_grad_() for t in given]
    given = given if bias else given[:2]
    group_size = size[0] if options.get("mode") == "batch" else options.get("group_size") or 1
    expected = ACTIVATIONS[activation](definition(*exact[:2], exact[2] if bias else None, 0.5, group_size))
    with torch.no_grad():
        y = F.drop_connect_linear(*given, activation=activation, seed=SEED, **options)
    near(y, expected, TOLERANCE[dtype])
    needed = [index for index in needed if index < len(given)]
    leaves = [t.requires_grad_(index in needed) for index, t in enumerate(given)]
    y = F.drop_connect_linear(*leaves, activation=activation, seed=SEED, **options)
    near(y, expected, TOLERANCE[dtype])
    found = torch.autograd.grad(y, [leaves[index] for index in needed], dz)
    gradients = torch.autograd.grad(expected, [exact[index] for index in needed], dz.cpu().double())
    # A derivative that is taken from the output loses what that has lost: twice in tanh, and the interpreter cuts bf16.
    slack = 4 if dtype.itemsize == 2 and activation in OF_OUTPUT else 1
    for gradient, wanted in zip(found, gradients, strict=True):
        assert gradient.dtype == dtype
        near(gradient, wanted, slack * TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(path, device, activation, activation_passes):
    """It and its derivative run in passes that are there without it: on the kernels, ATen's is called nowhere."""
    with activation_passes() as passes:
        v, weight, bias, dz = tensors(device, 5, 6, 7)
        leaves = [t.requires_grad_() for t in (v, weight, bias)]
        F.drop_connect_linear(*leaves, activation=activation, seed=SEED).backward(dz)
    assert bool(passes.names) == (path == "aten")
    check_activation(device, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_activations_of_16_bits(path, device, activation, dtype):
    check_activation(device, activation, dtype)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1)])
@pytest.mark.parametrize("activation", ["elu", "silu"])
def test_any_gradient_behind_an_activation(device, activation, needed):
    check_activation(device, activation, needed=needed, bias=2 in needed)


@pytest.mark.executed
@pytest.mark.parametrize("options", [{"mode": "batch"}, {"mode": "group", "group_size": 17}])
@pytest.mark.parametrize("activation", ["sigmoid", "mish"])
def test_activations_behind_shared_masks(device, masked_in, options, activation):
    check_activation(device, activation, size=(20, 6, 19), **options)


@pytest.mark.executed
@pytest.mark.parametrize("activation", ["sigmoid", "mish"])
def test_activations_behind_columns_that_are_split(device, activation):
    check_activation(device, activation, size=(2, 5, 16 * 5 + 3))


def test_an_activation_behind_what_is_computed_again(device):
    """An infinite weight makes NaN of the examples that dropped it, at first: their gradients are those of what is."""
    v, weight, bias, dz = tensors(device, 5, 6, 7)
    weight[3, 2] = math.inf
    leaves = [t.requires_grad_() for t in (v.abs(), weight, bias)]
    y = F.drop_connect_linear(*leaves, activation="hardswish", seed=SEED)
    (found,) = torch.autograd.grad(y, bias, dz)
    finite = [t.detach().cpu().double() for t in leaves]
    finite[1][3, 2] = 1e4
    z = definition(*finite, 0.5).requires_grad_()
    (dz_exact,) = torch.autograd.grad(ACTIVATIONS["hardswish"](z), z, dz.cpu().double())
    assert {True, False} == set((z[:, 3].abs() > 100).tolist())  # some have kept it
    near(found, dz_exact.sum(0), TOLERANCE[torch.float32])


def test_only_what_the_derivative_needs_is_kept(device):
    """For relu the output, which the next layer keeps too; for gelu its argument, a tensor of the output's size."""
    leaves = [t.requires_grad_() for t in tensors(device, 5, 6, 7)[:3]]
    for activation, of_output in (("relu", True), ("gelu", False)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t
        ):
            y = F.drop_connect_linear(*leaves, activation=activation, seed=SEED)
        own = [t for t in kept if t.data_ptr() not in [leaf.data_ptr() for leaf in leaves]]
        assert [t.shape for t in own] == [y.shape]
        assert (own[0].data_ptr() == y.data_ptr()) is of_output


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "gelu"])
def test_second_derivatives_of_the_kernels(device, activation):
    """By way of what is kept, and of the function itself."""
    given = tensors(device, 3, 2, 4)[:3]
    exact = [t.cpu().double().requires_grad_() for t in given]
    leaves = [t.requires_grad_() for t in given]

    def second(z, inputs):
        first = torch.autograd.grad(z.pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), inputs)

    found = second(F.drop_connect_linear(*leaves, activation=activation, seed=SEED), leaves)
    wanted = second(ACTIVATIONS[activation](definition(*exact, 0.5)), exact)
    for gradient, target in zip(found, wanted, strict=True):
        near(
            gradient / 20, target / 20, TOLERANCE[torch.float32]
        )  # polynomials of high degree in what has the tolerance


def test_a_kept_result_that_is_overwritten_is_noticed(device):
    leaves = [t.requires_grad_() for t in tensors(device, 3, 2, 4)[:3]]
    y = F.drop_connect_linear(*leaves, activation="relu", seed=SEED)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_leading_dimensions_count_examples(path, device):
    v, weight, bias, _ = tensors(device, 6, 4, 5)
    flat = F.drop_connect_linear(v, weight, bias, seed=SEED)
    assert torch.equal(F.drop_connect_linear(v.view(2, 3, 5), weight, bias, seed=SEED), flat.view(2, 3, 4))
    one = F.drop_connect_linear(v[0], weight, bias, seed=SEED)
    near(one, flat[0].cpu().double(), TOLERANCE[v.dtype])


def test_any_strides(path, device):
    v, weight, bias, dz = tensors(device, 6, 4, 5)
    dense = F.drop_connect_linear(v, weight, bias, seed=SEED)
    gaps = bias.repeat_interleave(2)[::2]
    strided = F.drop_connect_linear(v.t().contiguous().t(), weight.t().contiguous().t(), gaps, seed=SEED)
    assert_close(dense, strided)
    v, w = (t.clone().requires_grad_() for t in (v, weight))
    F.drop_connect_linear(v, w, bias, seed=SEED).backward(dz.t().contiguous().t())
    exact = [t.detach().cpu().double().requires_grad_() for t in (v, w)]
    definition(*exact, None, 0.5).backward(dz.cpu().double())
    near(w.grad, exact[1].grad, TOLERANCE[w.dtype])


@pytest.mark.parametrize("needed", [0, 1, 2], ids=["v", "weight", "bias"])
def test_any_one_gradient(path, device, needed):
    *given, dz = tensors(device, 4, 3, 5)
    given[needed].requires_grad_()
    z = F.drop_connect_linear(*given, seed=SEED)
    (gradient,) = torch.autograd.grad(z, given[needed], dz)
    exact = [t.detach().cpu().double().requires_grad_() for t in given]
    expected = torch.autograd.grad(definition(*exact, 0.5), exact, dz.cpu().double())
    near(gradient, expected[needed], TOLERANCE[torch.float32])


@pytest.mark.skipif(not ops.backend.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(("examples", "group_size"), [(1 << 21, 1), (100, 10**6), (1 << 21, 3)])
def test_grids_of_large_batches_and_groups(examples, group_size):
    """A GPU takes 2^31 programs along the first axis and 65,535 along the others, and none should be idle."""
    v, weight, z = (torch.empty(*s, device="meta") for s in ((examples, 64), (96, 64), (examples, 96)))
    form = ops.Form(1, 1, group_size, 2.0)
    for transposed, u, out in ((False, v, z), (True, z, v)):
        launches = ops.product_launches(u, weight, None, out, None, Stream(1), form, transposed, True)
        for launch in launches:
            first, *others = launch.grid
            assert first < 1 << 31
            assert all(count < 1 << 16 for count in others)
        # 16 examples a program where each has its own mask, 32 otherwise, and what is left of a word of lanes.
        row_blocks = -(-out.shape[1] // ops.BLOCK_ROWS)
        assert launches[0].grid[0] <= 2 * (examples // 16 + 16) * row_blocks


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 5, 0), (3, 0, 7)])
def test_empty(path, device, shape):
    v, weight, bias, dz = tensors(device, *shape)
    v.requires_grad_()
    z = F.drop_connect_linear(v, weight, bias)
    assert_close(z, torch.nn.functional.linear(v, weight, bias))
    z.backward(dz)
    assert v.grad.shape == v.shape


@pytest.fixture(
    params=["example", "group", "batch", "batch in memory", pytest.param("few", marks=pytest.mark.slow)]
)
def sharing(request, monkeypatch) -> dict:
    """What examples share a mask; in memory as a large batch has it."""
    registers = not request.param.endswith("in memory")
    monkeypatch.setattr(ops.Form, "masks_in_registers", lambda form, examples: registers)
    return SHARING[request.param]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's numpy
def test_a_bad_example_spoils_itself_alone(path, device, sharing, bad):
    v, weight, bias, _ = tensors(device, 20, 5, 7)
    clean = F.drop_connect_linear(v, weight, bias, seed=SEED, **sharing)
    v[3] = bad
    z = F.drop_connect_linear(v, weight, bias, seed=SEED, **sharing)
    assert not z[3].isfinite().any()
    rest = [i for i in range(20) if i != 3]
    assert_close(z[rest], clean[rest])


@pytest.mark.parametrize(("bad", "dtype"), [(math.nan, torch.float16), (math.inf, torch.float32)])
def test_a_bad_weight_adds_nothing_where_it_is_dropped(path, device, sharing, dtype, bad):
    """Forward and input gradient: all that keep the connection are spoiled, all others as with any other weight."""
    v, weight, _, dz = tensors(device, 20, 5, 7, dtype)
    group_size = sharing.get("group_size", 20 if sharing else 1)
    mask = random.connection_mask(torch.arange(20) // group_size, 5, 7, random.chance(0.5), Stream(SEED))
    kept = mask[:, 2, 4]
    found = []
    for value in (1.0, bad):
        weight[2, 4] = value
        leaf = v.clone().requires_grad_()
        z = F.drop_connect_linear(leaf, weight, None, seed=SEED, **sharing)
        found.append((z.detach(), *torch.autograd.grad(z, leaf, dz)))
    for clean, spoiled, column in ((found[0][0], found[1][0], 2), (found[0][1], found[1][1], 4)):
        assert not spoiled[kept, column].isfinite().any()
        hidden = torch.zeros(clean.shape, dtype=torch.bool)
        hidden[kept, column] = True
        assert_close(spoiled[~hidden], clean[~hidden], rtol=0, atol=TOLERANCE[dtype] * 8)


def test_products_of_fp32(device, sharing):
    """Three products of TF32, whose operands lose 13 bits, are off by 2^-21 of the sizes of the terms at most (kernels/
    drop_connect.py, ``_halves``); fp32 adds half a unit a sum."""
    v, weight = torch.randn(20, 3, device=device), torch.randn(300, 3, device=device)
    z = F.drop_connect_linear(v, weight, None, seed=SEED, **sharing)
    group_size = sharing.get("group_size", 20 if sharing else 1)
    exact = definition(v.cpu().double(), weight.cpu().double(), None, 0.5, group_size)
    sizes = definition(v.cpu().double().abs(), weight.cpu().double().abs(), None, 0.5, group_size)
    error = (z.cpu().double() - exact).abs()
    assert (error <= (2.0**-21 + 3 * 2.0**-24) * sizes).all()
    assert (
        error.sum() <= 2.0**-24 * sizes.sum()
    )  # as they differ in sign, they are no more than those of fp32


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's numpy
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, LARGEST, -LARGEST, LARGEST * (1 - 2.0**-12)]
)
def test_infinite_and_huge_numbers_of_fp32(path, device, sharing, value):
    """As in plain fp32 products, though the halves of such a number are not finite."""
    v = torch.rand(20, 5, device=device) * 0.2 + 0.1
    v[:, 0] = 0.125  # exact in TF32: the rest is 0
    weight = torch.randn(6, 5, device=device)
    weight[1, 0] = weight[2, 3] = weight[4, 0] = value
    weight[5, 1] = 0.0
    v[7, 1] = value
    z = F.drop_connect_linear(v, weight, None, seed=SEED, **sharing)
    group_size = sharing.get("group_size", 20 if sharing else 1)
    mask = random.connection_mask(torch.arange(20) // group_size, 6, 5, random.chance(0.5), Stream(SEED))
    kept = torch.where(mask, weight.cpu().double(), 0.0)
    expected = 2 * (kept * v.cpu().double()[:, None]).sum(2)
    assert_close(z.cpu(), expected.float(), equal_nan=True)


@pytest.mark.executed
def test_a_bad_gradient_reaches_kept_weights_alone(path, device, sharing):
    v, weight, _, dz = tensors(device, 20, 5, 7)
    weight.requires_grad_()
    clean, spoiled = [], []
    for found, value in ((clean, 0.0), (spoiled, math.nan)):
        dz[19] = value
        z = F.drop_connect_linear(v, weight, None, seed=SEED, **sharing)
        found += torch.autograd.grad(z, weight, dz)
    group_size = sharing.get("group_size", 20 if sharing else 1)
    chance = random.chance(0.5)
    kept = random.connection_mask(torch.tensor([19 // group_size]), 5, 7, chance, Stream(SEED))[0]
    assert torch.equal(spoiled[0].isnan(), kept)
    assert_close(spoiled[0][~kept], clean[0][~kept])


def test_the_weight_of_a_tensor_subclass_is_atens(device, monkeypatch):
    """The kernels take memory, and a subclass need not have any of its own: also beside a plain input."""

    class Own(torch.Tensor):
        pass

    def run(*_):
        raise AssertionError("a kernel was launched")

    v, weight, bias, dz = tensors(device, 3, 4, 5)
    expected = F.drop_connect_linear(v, weight, bias, seed=SEED)
    monkeypatch.setattr(ops, "_product", run)
    monkeypatch.setattr(ops, "_weight_gradient", run)
    for w, b in ((weight.as_subclass(Own), bias), (weight, bias.as_subclass(Own))):
        assert_close(F.drop_connect_linear(v, w, b, seed=SEED).as_subclass(torch.Tensor), expected)
    leaf = weight.as_subclass(Own).requires_grad_()
    F.drop_connect_linear(v, leaf, None, seed=SEED).backward(dz)
    assert leaf.grad.shape == weight.shape


def test_a_new_call_draws_new_masks_and_manual_seed_brings_them_back(path, device):
    v, weight, bias, _ = tensors(device, 4, 5, 7)
    torch.manual_seed(5)
    first, second = (F.drop_connect_linear(v, weight, bias) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(F.drop_connect_linear(v, weight, bias), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("group_size", [None, 2])
def test_derivatives(path, device, group_size):
    v, weight, bias, _ = tensors(device, 3, 2, 4, torch.float64)
    options = {} if group_size is None else {"mode": "group", "group_size": group_size}
    inputs = [t.requires_grad_() for t in (v, weight, bias)]

    def function(*inputs):
        return F.drop_connect_linear(*inputs, 0.3, activation="silu", seed=SEED, **options)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_one_graph_for_every_batch_size(path, device, activation):
    torch._dynamo.reset()
    _, weight, bias, _ = tensors(device, 1, 3, 5)
    compiled = torch.compile(
        lambda v, w, b: F.drop_connect_linear(v, w, b, 0.25, activation=activation, seed=SEED),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for examples in (4, 7):
            v = torch.randn(examples, 5, device=device)
            leaves = [t.detach().clone().requires_grad_() for t in (v, weight, bias)]
            twins = [t.detach().clone().requires_grad_() for t in (v, weight, bias)]
            expected = F.drop_connect_linear(*twins, 0.25, activation=activation, seed=SEED)
            z = compiled(*leaves)
            assert_close(z, expected)
            gradients = (
                torch.autograd.grad(y.square().sum(), t) for y, t in ((z, leaves), (expected, twins))
            )
            assert_close(*gradients)


def test_opcheck(path, device):
    v, weight, bias, dz = tensors(device, 3, 4, 5)
    seed = torch.tensor([SEED], device=device)
    for activation in (None, "relu", "gelu"):
        if activation is not None and path == "aten":
            continue  # there it is ATen's, behind the operator
        form = ops.Form(*random.chance(0.5), 1, 2.0, activation, path == "aten")
        before = torch.empty_like(dz) if activation == "gelu" else None
        given = v, weight, bias, torch.empty_like(dz), before, seed, *form
        torch.library.opcheck(torch.ops.fastreg.drop_connect.default, given)
        kept = None if activation is None else dz.abs()
        given = dz, v, weight, kept, torch.empty_like(v), None, torch.empty_like(bias), seed, *form
        torch.library.opcheck(torch.ops.fastreg.drop_connect_backward.default, given)

"""DropConnect: linear layers whose connections, not units, are dropped (Wan et al. 2013).

A mask for every example, for a group of examples, or for the batch (a group as large) is one function,
``_DropConnect``, on two backends: the Triton kernels of ``kernels/drop_connect.py`` (CUDA) and loops over the groups in
ATen (CPU, fp64). Neither stores a mask, and neither needs more memory than its results and a mask or two, or one masked
copy of the weights where large groups share a mask. An activation is part of the kernels; it is a pass of its own in
ATen, and behind the dense product with such a copy.
"""

import itertools
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fastreg import random
from fastreg.ops import arguments, backend
from fastreg.ops.backend import Launch, number
from fastreg.ops.checks import check_activation, probability
from fastreg.ops.dropout import activation_backward, activation_forward
from fastreg.ops.fused import activated, kept_of, needs_argument
from fastreg.ops.launch import planned
from fastreg.ops.layout import ceil_div
from fastreg.ops.linear import dual_linear, expectation
from fastreg.ops.linear.checks import cast_by_autocast, on_kernels, torch_refuses
from fastreg.ops.operator import apply, by_definition, empty_gradients, keep, kept, needs_definition, operator
from fastreg.random import EXAMPLES_PER_LANE, Chance, Stream

if backend.HAS_TRITON:
    from fastreg.kernels import drop_connect as kernels

MODES = ("example", "group", "batch", "flipout", "gaussian")
INFERENCE = ("gaussian", "mean", "probit")
INFINITE = "with p = 1 and inverted scaling the variance of the sum is infinite"


BATCH = 2**31 - 1
"""The group size that is larger than any batch."""

TILE_EXAMPLES = 128
"""Most examples of a group that share a tile of masked weights in registers."""

REGISTER_TILES = 4
"""How many of these tiles cost as much as masking W in memory, at one binary digit. An estimate for an H100: the random
numbers and the AND take about 9 instructions a weight and tile, 5.5 us at 4096 x 4096, where one pass over W in 16 bits
takes 22 us. To be replaced by a measurement."""


class Form(NamedTuple):
    """What distinguishes one masked product from another."""

    keep: int
    digits: int
    group_size: int
    scale: float
    activation: str | None = None
    in_aten: bool = False  # then there is no activation

    @property
    def chance(self) -> Chance:
        return Chance(self.keep, self.digits)

    def for_batch(self, examples: int) -> "Form":
        """With groups no larger than the batch, which changes no mask and leaves no program idle."""
        return self._replace(group_size=min(self.group_size, examples))

    def groups(self, examples: int) -> int:
        return ceil_div(examples, self.group_size)

    def words(self, examples: int) -> int:
        """How many words of lanes serve so many examples."""
        return ceil_div(self.groups(examples), EXAMPLES_PER_LANE)

    def fills_tiles(self, examples: int) -> bool:
        """Whether a tile of 16 examples is better filled by one group than by several and their zero columns."""
        return self.group_size >= min(EXAMPLES_PER_LANE, examples)

    def masks_in_registers(self, examples: int) -> bool:
        """Whether every tile of examples masks its weights anew, rather than one pass over W for a group.

        Each tile draws the random numbers of W again, one a digit. Up to ``REGISTER_TILES`` digits that takes less
        than reading and writing W once. With more the pass is bound by random numbers too, and only the first tile of
        a group is for free.
        """
        tiles = ceil_div(min(self.group_size, examples), TILE_EXAMPLES)
        return tiles <= max(1, REGISTER_TILES // self.digits)


# --- in ATen ----------------------------------------------------------------------------------------------


PORTION = 1 << 18
"""Elements of W that are masked at a time, so that mask and masked weights stay in the cache."""

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # integers by their bytes


def _masks(v: Tensor, weight: Tensor, stream: Stream, form: Form, whole: bool):
    """Yields (slice of examples that share a mask, slice of outputs, their mask): all bits set, or none.

    whole: masks are of all outputs. Others are cut, unless there is but one.
    """
    integer = _BITS[weight.element_size()]
    width = 8 * weight.element_size()
    outputs, inputs = weight.shape
    rows = outputs if whole or form.groups(len(v)) == 1 else max(1, PORTION // inputs)
    for word, first in itertools.product(range(form.words(len(v))), range(0, outputs, rows)):
        part = slice(first, min(first + rows, outputs))
        size = part.stop - first, inputs
        lanes = random.connection_lanes(word, *size, form.chance, stream, v.device, first)
        lanes = lanes.to(integer) << width - 16
        for bit in range(EXAMPLES_PER_LANE):
            start = (word * EXAMPLES_PER_LANE + bit) * form.group_size
            if start < len(v):
                yield slice(start, start + form.group_size), part, lanes << bit >> width - 1


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    """x where it is kept, else 0, whatever was dropped: an AND, which a CPU does ten times as fast as torch.where."""
    return (x.view(mask.dtype) & mask).view(x.dtype)


def _aten_forward(
    v: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, stream: Stream, form: Form
) -> None:
    for examples, outputs, mask in _masks(v, weight, stream, form, whole=False):
        z[examples, outputs] = v[examples] @ _kept(weight[outputs], mask).t()
    z *= form.scale
    if bias is not None:
        z += bias


def _aten_backward(
    dz: Tensor,
    v: Tensor,
    weight: Tensor,
    dv: Tensor | None,
    dweight: Tensor | None,
    stream: Stream,
    form: Form,
) -> None:
    wide = None if dv is None else torch.zeros_like(dv, dtype=torch.promote_types(v.dtype, torch.float32))
    if dweight is not None:
        dweight.zero_()
    for examples, outputs, mask in _masks(v, weight, stream, form, whole=False):
        if wide is not None:
            wide[examples] += dz[examples, outputs] @ _kept(weight[outputs], mask)
        if dweight is not None:
            dweight[outputs] += _kept(dz[examples, outputs].t() @ v[examples], mask)
    if dv is not None and wide is not None:
        torch.mul(wide, form.scale, out=dv)
    if dweight is not None:
        dweight *= form.scale


def _definition(v: Tensor, weight: Tensor, bias: Tensor | None, stream: Stream, form: Form) -> Tensor:
    """Differentiable any number of times, for which every group's masked weights stay in memory."""
    z = form.scale * torch.cat(
        [
            v[examples] @ torch.where(mask != 0, weight, 0).t()
            for examples, _, mask in _masks(v, weight, stream, form, whole=True)
        ]
    )
    return activated(z if bias is None else z + bias, form.activation)


# --- launches ---------------------------------------------------------------------------------------------


def _stream_arguments(stream: Stream, form: Form) -> dict:
    return {
        **number("seed", stream.seed, 0),
        "offset": stream.offset,
        "keep": form.keep,
    }


BLOCK_ROWS, BLOCK_COLUMN_BYTES = 64, 128
BLOCK_GRADIENT = 128, 32  # outputs, inputs
BLOCK_SHARED_GRADIENT = 128, 64
BLOCK_MASK = 8, 256


def _power_of_2(number: int, least: int, most: int) -> int:
    """The next one from ``number`` on, within limits."""
    return min(most, max(least, 1 << (number - 1).bit_length()))


@planned
def product_launches(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    before: Tensor | None,
    stream: Stream,
    form: Form,
    transposed: bool,
    three: bool,
) -> list[Launch]:
    """z[b, r] = activation(scale sum_c m W u[b, c] + bias): one launch, or two where the columns are split.

    u: [examples, columns], weight: [rows, columns] (transposed: [columns, rows], and no activation), z, and before,
    which is given what stands before the activation, if wanted: [examples, rows]; contiguous.
    three: ``_takes_three`` products of TF32.
    """
    (examples, columns), rows = u.shape, z.shape[1]
    form = form.for_batch(examples)
    shared = form.fills_tiles(examples)
    if shared:
        span = form.group_size
        block_examples = _power_of_2(span, EXAMPLES_PER_LANE, TILE_EXAMPLES)
    else:
        span = EXAMPLES_PER_LANE * form.group_size
        block_examples = EXAMPLES_PER_LANE if form.group_size == 1 else 32
    chunks = ceil_div(min(span, examples), block_examples)
    parts = ceil_div(examples, span)
    row_blocks = ceil_div(rows, BLOCK_ROWS)
    block_columns = BLOCK_COLUMN_BYTES // u.element_size()
    tiles = ceil_div(columns, block_columns)
    # Four programs of four warps on every multiprocessor (two where a tile is large), at least four tiles for each.
    wanted = (2 if block_examples > 32 else 4) * backend.multiprocessors(u.device)
    splits = max(1, min(ceil_div(tiles, 4), wanted // (row_blocks * parts * chunks)))
    trips = ceil_div(tiles, splits)
    splits = ceil_div(tiles, trips)
    partial = z if splits == 1 else torch.empty(splits, examples, rows, dtype=torch.float32, device=u.device)
    activation = None if transposed else form.activation
    shape = kernels.Shape(examples, rows, columns, form.group_size, chunks, trips)
    plan = kernels.Plan(
        rows=BLOCK_ROWS,
        columns=block_columns,
        digits=form.digits,
        examples=block_examples,
        transposed=transposed,
        even=rows % BLOCK_ROWS == 0 and columns % (block_columns * trips) == 0,
        shared=shared,
        own=not shared and form.group_size == 1,
        three=three,
        split=splits > 1,
        activation=activation,
    )
    main = Launch(
        kernels.product,
        (parts * chunks * row_blocks, splits),
        {
            "operands": kernels.Operands(u, weight),
            "epilogue": kernels.Epilogue(bias, partial, before),
            **_stream_arguments(stream, form),
            "scale": form.scale,
            "shape": shape,
            "plan": plan,
            "num_warps": 4,
            # Without a limit the assembler may spill to fit more programs.
            "maxnreg": 128 if block_examples <= 32 else 255,
        },
    )
    if splits == 1:
        return [main]
    merge = {
        "partial_ptr": partial,
        "epilogue": kernels.Epilogue(bias, z, before),
        "scale": form.scale,
        "examples": examples,
        "rows": rows,
        "splits": splits,
        "ACTIVATION": activation,
        "BLOCK": 1024,
    }
    return [main, Launch(kernels.merge, (examples, ceil_div(rows, 1024)), merge)]


def _takes_three(x: Tensor) -> bool:
    """Whether fp32 takes three products of TF32."""
    return x.dtype == torch.float32 and not backend.allows_tf32()


@planned
def weight_gradient_launches(
    dz: Tensor, v: Tensor, dweight: Tensor, stream: Stream, form: Form, three: bool
) -> list[Launch]:
    (examples, outputs), inputs = dz.shape, v.shape[1]
    form = form.for_batch(examples)
    shared = form.fills_tiles(examples)
    blocks = BLOCK_SHARED_GRADIENT if shared else BLOCK_GRADIENT
    plan = kernels.Plan(*blocks, form.digits, shared=shared, own=form.group_size == 1, three=three)
    arguments = {
        "tensors": kernels.GradientTensors(dz, v, dweight),
        **_stream_arguments(stream, form),
        "scale": form.scale,
        "shape": kernels.GradientShape(examples, outputs, inputs, form.group_size),
    }
    if shared:
        kernel = kernels.shared_weight_gradient
        count = _power_of_2(form.group_size, EXAMPLES_PER_LANE, 64 if v.itemsize == 2 else 32)
        plan = plan._replace(examples=count)
        arguments |= {"groups": form.groups(examples), "num_warps": 8}
    else:
        kernel = kernels.weight_gradient
        registers = 168 if v.itemsize == 2 else 255  # for three programs a multiprocessor, or two
        arguments |= {"words": form.words(examples), "num_warps": 4, "maxnreg": registers}
    grid = (ceil_div(outputs, blocks[0]) * ceil_div(inputs, blocks[1]),)
    return [Launch(kernel, grid, arguments | {"plan": plan})]


@planned
def mask_launches(weight: Tensor, masked: Tensor, group: int, stream: Stream, form: Form) -> list[Launch]:
    """masked = the weights that a group keeps, unscaled. ``masked`` may be ``weight``."""
    outputs, inputs = weight.shape
    arguments = {
        "w_ptr": weight,
        "masked_ptr": masked,
        **_stream_arguments(stream, form),
        "outputs": outputs,
        "inputs": inputs,
        "group": group,
        "plan": kernels.Plan(*BLOCK_MASK, form.digits),
        "num_warps": 4,
    }
    grid = (ceil_div(outputs, BLOCK_MASK[0]) * ceil_div(inputs, BLOCK_MASK[1]),)
    return [Launch(kernels.mask_weights, grid, arguments)]


def _masked_products(u, weight, bias, z, stream: Stream, form: Form, transposed: bool) -> None:
    """As ``product_launches``, with a copy of W that is masked for one group after the other, and dense products."""
    masked = torch.empty_like(weight)
    for group in range(form.groups(len(u))):
        mask_launches.run(weight, masked, group, stream, form)
        examples = slice(group * form.group_size, (group + 1) * form.group_size)
        matrix = masked if transposed else masked.t()
        start, beta = (u.new_empty(()), 0) if bias is None else (bias, 1)
        torch.addmm(start, u[examples], matrix, beta=beta, alpha=form.scale, out=z[examples])


def _product(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    before: Tensor | None,
    stream: Stream,
    form: Form,
    transposed: bool = False,
) -> None:
    """As ``product_launches``, wherever the weights are masked."""
    if form.masks_in_registers(len(u)):
        product_launches.run(u, weight, bias, z, before, stream, form, transposed, _takes_three(u))
        return
    product = z if before is None else before
    _masked_products(u, weight, bias, product, stream, form, transposed)
    if form.activation is not None and not transposed:
        activation_forward(product, z, form.activation)


def _weight_gradient(dz: Tensor, v: Tensor, dweight: Tensor, stream: Stream, form: Form) -> None:
    # fp32 alone would be better off with a dense product: the tensor cores take TF32 only along the examples.
    if form.groups(len(v)) > 1 or (v.itemsize == 2 and form.masks_in_registers(len(v))):
        weight_gradient_launches.run(dz, v, dweight, stream, form, _takes_three(v))
    else:
        torch.addmm(v.new_empty(()), dz.t(), v, beta=0, alpha=form.scale, out=dweight)
        mask_launches.run(dweight, dweight, 0, stream, form)


# --- operators --------------------------------------------------------------------------------------------


@operator("fastreg::drop_connect", writes=["z", "before"])
def _forward(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    before: Tensor | None,
    stream: Stream,
    form: Form,
) -> None:
    """z, before: contiguous. before: what stands before the activation, if wanted."""
    if form.in_aten:
        _aten_forward(v, weight, bias, z, stream, form)
    else:
        bias = None if bias is None else bias.contiguous()
        _product(v.contiguous(), weight.contiguous(), bias, z, before, stream, form)


@operator("fastreg::drop_connect_backward", writes=["dv", "dweight", "dbias"])
def _backward(
    dy: Tensor,
    v: Tensor,
    weight: Tensor,
    y_or_before: Tensor | None,
    dv: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    stream: Stream,
    form: Form,
) -> None:
    """dv, dweight, dbias: contiguous; None where they are not wanted. y_or_before: what the activation has kept."""
    dz, sums = dy, None
    if form.activation is not None:
        assert y_or_before is not None
        dz, sums = activation_backward(dy, y_or_before, form.activation, dbias is not None)
    if dbias is not None and sums is not None:
        dbias.copy_(sums)
    elif dbias is not None:
        torch.sum(dz, 0, out=dbias)
    if form.in_aten:
        _aten_backward(dz, v, weight, dv, dweight, stream, form)
        return
    dz = dz.contiguous()
    if dv is not None:
        _product(dz, weight.contiguous(), None, dv, None, stream, form, transposed=True)
    if dweight is not None:
        _weight_gradient(dz, v.contiguous(), dweight, stream, form)


# --- autograd ---------------------------------------------------------------------------------------------


class _DropConnect(torch.autograd.Function):
    """activation(scale (M ∘ W) v + bias). Saves the inputs, the stream, and what the derivative of the activation
    needs: the result, or its argument."""

    @staticmethod
    def forward(ctx, v, weight, bias, seed, offset, form):
        stream = Stream(seed, offset)
        z = v.new_empty(v.shape[0], weight.shape[0])
        before = (
            torch.empty_like(z) if needs_argument(form.activation) and any(ctx.needs_input_grad) else None
        )
        _forward(v, weight, bias, z, before, stream, form)
        ctx.form = form
        keep(ctx, stream, v, weight, bias, kept_of(z, before, form.activation))
        return z

    @staticmethod
    def backward(ctx, dy):
        stream, v, weight, bias, y_or_before = kept(ctx)
        inputs = v, weight, bias
        if needs_definition(dy):
            found = by_definition(partial(_definition, stream=stream, form=ctx.form), inputs, dy)
        else:
            found = empty_gradients(ctx, inputs)
            _backward(dy, v, weight, y_or_before, *found, stream, ctx.form)
        return *found, None, None, None


def _masked_linear(v: Tensor, weight: Tensor, bias: Tensor | None, stream: Stream, form: Form) -> Tensor:
    """activation(scale (M ∘ W) v + bias) for examples v [B, inputs]."""
    if on_kernels(v, weight, bias):
        return apply(_DropConnect, v, weight, bias, *stream, form)
    if not torch.compiler.is_compiling() and backend.watched():
        return _definition(v, weight, bias, stream, form)
    z = apply(_DropConnect, v, weight, bias, *stream, form._replace(activation=None, in_aten=True))
    return activated(z, form.activation)


# --- the public function ----------------------------------------------------------------------------------


def drop_connect_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    mode: str = "example",
    group_size: int | None = None,
    inverted: bool = True,
    inference: str = "gaussian",
    samples: int | None = None,
    activation: str | None = None,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """activation(scale (M ∘ W) v + b): a linear layer that drops connections with probability ``p``.

    In training, with inverted scaling, scale is 1 / (1 - p): the expectation of the sum is Wv, its variance
    p / (1 - p) (W ∘ W)(v ∘ v). ``inverted=False`` is the paper's form, with scale 1 in training and an expectation of
    (1 - p) Wv.

    Args:
        input: ``[*, inputs]``; all leading dimensions count examples.
        weight: ``[outputs, inputs]``, the dtype of the input.
        bias: ``[outputs]`` or None. Never dropped.
        p: probability of dropping a connection. It is applied to 8 binary digits (more for p near 0 or 1), and the
            scale is that of the probability applied: see ``fastreg.random.chance``.
        mode: what a mask belongs to. "example": every example has its own, as in the paper. "group": ``group_size``
            neighbouring examples share one. "batch": all share one, that of a group as large as the batch.
            Two that need dense products only: "flipout" (p = 1/2) gives every example a mask with the right
            distribution, the connections of any two examples pairwise independent, but not four and more: where two
            examples agree and where they differ has an even number of differences at the corners of any rectangle of
            outputs and inputs (Wen et al. 2018). "gaussian" has no masks but noise: every sum is normal, with the mean
            and the variance that it has over masks (local reparameterization: Kingma et al. 2015).
            On the CPU (64 examples, 1,024 x 1,024 weights, p = 1/2) "example" takes 50 to 70 times as long as the dense
            product, half of it to draw its bits, and three times that with p = 0.1; "batch" takes 6 to 10 times as
            long as the product, "flipout" 5 times, "gaussian" 3 times.
        group_size: of mode="group".
        inverted: scale in training, not in evaluation.
        inference: in evaluation, "gaussian" is the paper's: the expectation of ``activation`` over a Gaussian with the
            mean and the variance that the sum has over the masks. In closed form for no activation (where it is the
            mean), relu, leaky_relu, relu6, gelu, elu, hardswish and hardsigmoid, else by quadrature. "mean" is the
            activation of the mean. "probit" is, for sigmoid alone, an approximation in closed form, off by less than
            0.02.
        samples: so many draws in place of the quadrature, as in the paper, which takes 1000. The error of these is
            larger than that of the quadrature, see ``fastreg/ops/linear/expectation.py``.
        activation: a name of ``fastreg.functional.ACTIVATIONS``.
        seed, generator: as in :func:`fastreg.functional.dropout`.

    Returns: ``[*, outputs]``.

    Raises:
        ValueError: p outside [0, 1]; mode="flipout" with another p than 1/2; inference="probit" without the sigmoid; an
            unknown mode, inference or activation; a group_size without mode="group", or below 1; samples below 1.
        RuntimeError: torch's own of ``linear``, for shapes, dtypes and devices that do not fit.

    Source: Wan, Zeiler, Zhang, LeCun, Fergus 2013 (Regularization of neural networks using DropConnect, ICML).
    """
    p, group_size, samples = checked_arguments(p, mode, group_size, inference, samples, activation)
    if not training:
        return _inference(input, weight, bias, p, inverted, inference, samples, activation, seed, generator)
    if mode == "gaussian" and p == 1 and inverted:
        raise ValueError(INFINITE)
    chance = random.chance(p)
    if mode != "gaussian" and not chance.digits:  # all connections, or none
        weight = weight if chance.keep else weight * 0
        return activated(F.linear(input, weight, bias), activation)
    input, weight, bias = cast_by_autocast(input, weight, bias)
    if torch_refuses(input, weight, bias):
        F.linear(input, weight, bias)  # raises
    examples = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    if examples.numel() == 0 or weight.numel() == 0:
        return activated(F.linear(input, weight, bias), activation)
    if mode == "flipout":
        scale = 1.0 if inverted else 0.5
        z = dual_linear.flipout_linear(examples, weight, bias, scale, activation, seed, generator)
    elif mode == "gaussian":
        scale = 1.0 if inverted else 1 - p
        sigma = math.sqrt(_variance(p, inverted))
        z = dual_linear.gaussian_linear(examples, weight, bias, scale, sigma, activation, seed, generator)
    else:
        scale = 1 / chance.probability if inverted else 1.0
        form = Form(*chance, BATCH if mode == "batch" else group_size or 1, scale, activation)
        stream = random.stream(input.device, seed, generator)
        z = _masked_linear(examples, weight, bias, stream, form)
    return z.view(*input.shape[:-1], weight.shape[0])


def checked_arguments(
    p: float,
    mode: str = "example",
    group_size: int | None = None,
    inference: str = "gaussian",
    samples: int | None = None,
    activation: str | None = None,
) -> tuple[float, int | None, int | None]:
    """p, group_size and samples as Python's numbers."""
    p = probability(p)
    group_size = None if group_size is None else arguments.integer("group_size", group_size)
    samples = None if samples is None else arguments.integer("samples", samples)
    for name, value, choices in (("mode", mode, MODES), ("inference", inference, INFERENCE)):
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
    if (mode == "group") != (group_size is not None):
        raise ValueError('mode="group" needs a group_size, and no other mode has one')
    if mode == "flipout" and p != 0.5:
        raise ValueError(f'mode="flipout" is exact for p = 0.5 alone, but got p = {p}')
    if inference == "probit" and activation != "sigmoid":
        raise ValueError(
            f'inference="probit" approximates the sigmoid alone, but got activation = {activation!r}'
        )
    for name, count in (("group_size", group_size), ("samples", samples)):
        if count is not None and count < 1:
            raise ValueError(f"{name} has to be at least 1, but got {count}")
    check_activation(activation)
    return p, group_size, samples


# --- inference --------------------------------------------------------------------------------------------


def _variance(p: float, inverted: bool) -> float:
    """The variance of a connection with weight 1 and input 1."""
    return p / (1 - p) if inverted else p * (1 - p)


def _moments(input, weight, bias, p: float, inverted: bool) -> tuple[Tensor, Tensor]:
    """Mean of the sum over masks, bias included, and its standard deviation (fp32 at least)."""
    if p == 1 and inverted:
        raise ValueError(INFINITE)
    mean = F.linear(input, weight if inverted else weight * (1 - p), bias)
    return mean, dual_linear.root(dual_linear.squares(input, weight) * _variance(p, inverted))


def _inference(input, weight, bias, p, inverted, inference, samples, activation, seed, generator) -> Tensor:
    if inference == "mean" or activation is None or p == 0:
        mean = F.linear(input, weight if inverted else weight * (1 - p), bias)
        return activated(mean, activation)
    mean, deviation = _moments(input, weight, bias, p, inverted)
    dtype, mean = mean.dtype, mean.to(deviation.dtype)
    if inference == "probit":
        expected = expectation.probit_sigmoid(mean, deviation)
    elif activation in expectation.CLOSED_FORMS:
        expected = expectation.closed_form(mean, deviation, activation)
    else:
        expected = expectation.average(mean, deviation, activation, samples or 0, seed, generator)
    return expected.to(dtype)

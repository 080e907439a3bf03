"""What batch, group and instance normalization share: y = f((x - mean) / sqrt(var + eps) weight + bias + residual).

``normalize`` is the one function behind all of them, on the kernels of ``kernels/channel_norm/``. What they do not
take (CPU tensors, ``torch.func`` transforms, bad input) its callers give to ATen, with torch's own errors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.arguments import is_number, plain
from fastreg.ops.backend import Launch, number
from fastreg.ops.fused import activated, result_dtype, sum_dtype
from fastreg.ops.launch import planned
from fastreg.ops.layout import ceil_div, dense_strides, with_strides
from fastreg.ops.norms.lines import (
    Plan,
    View,
    indexable,
    laid_out,
    merge_plan,
    split_plan,
    view,
    view_of,
    whole_plan,
)
from fastreg.ops.operator import apply, by_definition, needs_definition, operator
from fastreg.ops.partial_sums import sum_launch

if backend.HAS_TRITON:
    from fastreg.kernels import channel_norm as kernels

SIGNED = ("relu", "leaky_relu")
"""Activations whose derivative is known from the sign of their argument."""


class Form(NamedTuple):
    """What distinguishes one normalization from another."""

    groups: int  # 0: statistics of a channel over the batch; else of a group of channels in a sample
    eps: float
    activation: str | None = None


class Running(NamedTuple):
    """Running statistics to be updated: any float dtype [channels]."""

    mean: Tensor | None
    var: Tensor | None
    momentum: float | Tensor


# --- the definition, in ATen ------------------------------------------------------------------------------


def by_torch(norm: Callable[..., Tensor], x: Tensor, *arguments, one_sample: bool = False) -> Tensor:
    """norm(x, *arguments), where ``norm`` is torch's batch or instance normalization.

    It sees one dimension behind the channels where with more of them it might misread a gradient.
    one_sample: all samples are channels of one, as in torch's instance normalization.
    """
    if _may_be_misread(x, one_sample):
        return norm(x.flatten(2), *arguments).view(x.shape)
    return norm(x, *arguments)


def _may_be_misread(x: Tensor, one_sample: bool) -> bool:
    """Whether torch's backward pass on the CPU may read x or its gradient in the order of the other.

    It takes the fast path where each of them is contiguous or channels last, and asks whether they are the same of the
    two by strides that mean nothing where the size is 1. Tensors of three dimensions are never channels last.
    """
    if type(x) not in backend.PLAIN or x.dim() not in (4, 5) or not (one_sample or 1 in x.shape):
        return False
    channels, values = x.shape[:2].numel() if one_sample else x.shape[1], x.shape[2:].numel()
    if channels == 1 or values == 1 or x.device.type != "cpu":  # the first two have one order
        return False
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or backend.is_tracing():
        return False
    if x.is_contiguous():
        return True
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    unmistakable = torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=last).stride()
    return x.is_contiguous(memory_format=last) and x.stride() != unmistakable


def definition(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    form: Form,
) -> Tensor:
    """mean, var: given statistics of the channels (evaluation), or None: those of ``x``. Computes in fp32 or fp64."""
    dtype = sum_dtype(x.dtype)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch's second derivatives are wrong with a bias alone
    x = x.to(dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    if form.groups:
        y = torch.group_norm(x, form.groups, weight, bias, form.eps, False)
    else:
        y = by_torch(torch.batch_norm, x, weight, bias, mean, var, mean is None, 0.0, form.eps, False)
    return activated(y, form.activation, residual)


# --- launches --------------------------------------------------------------------------------------------
# Tensors of activations are dense and laid out alike; statistics and sums are fp32 (fp64 for fp64 x).


def _view(seen: View, plan: Plan) -> Any:
    """``seen`` as the kernels are given it, for programs with the lines of ``plan``."""
    return kernels.View(
        outer=seen.along if seen.last else seen.lines,
        inner_vectors=seen.innermost // plan.vector,
        segments=seen.segments,
        channels=seen.channels,
        width=seen.width,
        block=plan.block // plan.vector if seen.last else plan.block,
    )


def _tile(seen: View, plan: Plan) -> Any:
    segmented = seen.segments > 1
    return kernels.Tile(
        plan.lines, plan.along, plan.vector, seen.last, segmented, plan.even(seen), seen.repeat > 1
    )


def _units(seen: View, plan: Plan) -> Any:
    return kernels.Units(plan.units, plan.run(seen), plan.touched(seen))


def _geometry(seen: View, plan: Plan) -> dict[str, Any]:
    return {"view": _view(seen, plan), "tile": _tile(seen, plan), "num_warps": plan.warps, "maxnreg": 128}


def _whole_geometry(seen: View, plan: Plan) -> dict[str, Any]:
    kept = kernels.Plan(plan.kept, plan.parts, plan.full(seen), plan.reread)
    return {"units": _units(seen, plan), "plan": kept, **_geometry(seen, plan)}


def _merge_geometry(seen: View, plan: Plan, splits: int) -> dict[str, Any]:
    return {
        "merged": kernels.Merged(seen.batches * seen.lines, splits, seen.channels, seen.width, plan.block),
        "units": _units(seen, plan),
        "merge": kernels.Merge(plan.lines, plan.along, seen.repeat > 1),
        "num_warps": plan.warps,
    }


PROGRAMS = 4  # of 4 warps and at most 128 registers a thread, which a multiprocessor runs at a time


def _few_splits(seen: View, plan: Plan, device: torch.device) -> int:
    """The number of splits where the sums of each are merged: as many programs as run at a time."""
    programs = PROGRAMS * backend.multiprocessors(device)
    return max(1, min(plan.tiles(seen), programs // plan.blocks(seen)))


def _many_splits(seen: View, plan: Plan, device: torch.device) -> int:
    """The number of splits where nothing is merged: a program has four tiles, and reads its lines' values once."""
    wanted = max(_few_splits(seen, plan, device), ceil_div(plan.tiles(seen), 4))
    return min(wanted, backend.MOST_PROGRAMS // plan.blocks(seen))


def _running(running: Running | None) -> dict[str, Any]:
    if running is None:
        return {"running": kernels.Running(None, None, None), "momentum": 0.0}
    in_memory = isinstance(running.momentum, Tensor)
    momentum = (running.momentum, 0.0) if in_memory else (None, running.momentum)
    return {"running": kernels.Running(running.mean, running.var, momentum[0]), "momentum": momentum[1]}


@planned
def forward_launches(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    signs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    form: Form,
) -> list[Launch]:
    """From ``x`` to ``y``, ``mean``, ``var`` and ``signs``: one launch, or three."""
    seen, running = view_of(x, form.groups), Running(running_mean, running_var, momentum)
    plan = whole_plan(seen, (x.element_size(),), x.device)
    if plan is None:
        return [
            *statistics_launches(x, mean, var, running, seen),
            *apply_launches(x, weight, bias, residual, y, signs, mean, var, form),
        ]
    arguments = {
        "tensors": kernels.Forward(x, residual, y, signs),
        "moments": kernels.Moments(mean, var),
        "affine": kernels.Affine(weight, bias),
        **_running(running),
        "eps": form.eps,
        "activation": form.activation,
        **_whole_geometry(seen, plan),
    }
    return [Launch(kernels.whole_forward, plan.grid(seen), arguments)]


def statistics_launches(
    x: Tensor, mean: Tensor, var: Tensor, running: Running | None, seen: View
) -> list[Launch]:
    plan = split_plan(seen, x.element_size())
    splits = _few_splits(seen, plan, x.device)
    all_lines = seen.batches * seen.lines
    partial_mean, partial_var = mean.new_empty(2, splits, all_lines)
    partials = kernels.Partials(partial_mean, partial_var, mean.new_empty(splits))
    arguments = {
        "x_ptr": x,
        "partials": partials,
        "batches": seen.batches,
        "splits": splits,
        **_geometry(seen, plan),
    }
    return [
        Launch(kernels.statistics, (plan.blocks(seen) * splits,), arguments),
        merge_statistics_launch(partials, mean, var, running, seen),
    ]


def merge_statistics_launch(
    partials: tuple[Tensor, Tensor, Tensor], mean: Tensor, var: Tensor, running: Running | None, seen: View
) -> Launch:
    """partials: means and variances [splits, lines] and numbers of elements [splits]."""
    plan = merge_plan(seen)
    arguments = {
        "partials": kernels.Partials(*partials),
        "moments": kernels.Moments(mean, var),
        **_running(running),
        **_merge_geometry(seen, plan, partials[2].numel()),
    }
    grid = ceil_div(seen.batches * seen.lines, plan.block)
    return Launch(kernels.merge_statistics, (grid,), arguments)


@planned
def apply_launches(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    signs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    form: Form,
) -> list[Launch]:
    """From ``x``, ``mean`` and ``var`` to ``y`` and ``signs``."""
    seen = view_of(x, form.groups)
    plan = split_plan(seen, x.element_size())
    splits = _many_splits(seen, plan, x.device)
    arguments = {
        "tensors": kernels.Forward(x, residual, y, signs),
        "moments": kernels.Moments(mean, var),
        "affine": kernels.Affine(weight, bias),
        "eps": form.eps,
        "splits": splits,
        "activation": form.activation,
        **_geometry(seen, plan),
    }
    return [Launch(kernels.apply, (plan.blocks(seen) * splits,), arguments)]


class Gradients(NamedTuple):
    """The tensors that the backward pass writes."""

    dx: Tensor  # laid out as x
    dweight: Tensor  # of each line, or of each channel where several lines are of one
    dbias: Tensor
    dv: Tensor | None  # the residual's gradient, where an activation makes it another than dy


@planned
def backward_launches(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    signs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    dv: Tensor | None,
    training: bool,
    form: Form,
) -> list[Launch]:
    """From ``dy`` to the four gradients: one launch, or three (two in evaluation), and one that sums over samples."""
    seen = view_of(x, form.groups)
    if form.groups and len(x) > 1:
        sums = torch.empty(2, len(x), seen.channels, dtype=sum_dtype(x.dtype), device=x.device)
        launches = _gradient_launches(
            dy,
            x,
            weight,
            bias,
            residual,
            signs,
            mean,
            var,
            Gradients(dx, sums[0], sums[1], dv),
            training,
            form,
            seen,
        )
        return [*launches, sum_launch(sums, dweight, dbias)]
    out = Gradients(dx, dweight, dbias, dv)
    return _gradient_launches(dy, x, weight, bias, residual, signs, mean, var, out, training, form, seen)


def _gradient_launches(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    signs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    out: Gradients,
    training: bool,
    form: Form,
    seen: View,
) -> list[Launch]:
    tensors = kernels.Backward(dy, x, residual, signs)
    forward = forward_arguments(weight, bias, mean, var, form)
    sizes = x.element_size(), dy.element_size()
    plan = whole_plan(seen, sizes, x.device, form.activation is not None) if training else None
    if plan is not None:
        arguments = {
            "tensors": tensors,
            "gradients": kernels.Gradients(out.dx, out.dv),
            "sums": kernels.Sums(out.dbias, out.dweight),
            "elements": float(seen.unit_elements),
            "activation": form.activation,
            **forward,
            **_whole_geometry(seen, plan),
        }
        return [Launch(kernels.whole_backward, plan.grid(seen), arguments)]

    if training and (residual is not None or signs is not None) and out.dv is None:
        # The residual's gradient is not wanted, but it is what the second pass starts from.
        out = out._replace(dv=torch.empty_like(x))
    gradients = kernels.Gradients(None if training else out.dx, out.dv)
    launch, partials = gradient_sums_launch(tensors, gradients, forward, form, seen)
    means = mean.new_empty(2, seen.units) if training else None
    launches = [
        launch,
        merge_gradients_launch(partials, var, weight, out, means, float(seen.unit_elements), form, seen),
    ]
    if means is not None:
        # With dv, it is what the sums were taken of: no activation any more.
        dv, activation = (dy, form.activation) if out.dv is None else (out.dv, None)
        launches.append(dx_launch(dv, x, out.dx, means, forward, activation, seen))
    return launches


def forward_arguments(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, form: Form
) -> dict[str, Any]:
    """Parameters and statistics of the forward pass, under the names of the backward kernels' arguments."""
    return {
        "moments": kernels.Moments(mean, var),
        "affine": kernels.Affine(weight, bias),
        "eps": form.eps,
    }


def gradient_sums_launch(
    tensors: Any, gradients: Any, forward: dict[str, Any], form: Form, seen: View
) -> tuple[Launch, Tensor]:
    """tensors, gradients: the kernels' structs. Returns also where the sums go, of g and of g (x - mean):
    [2, splits, lines]."""
    x = tensors.x
    plan = split_plan(seen, x.element_size())
    splits = _few_splits(seen, plan, x.device)
    partials = forward["moments"].mean.new_empty(2, splits, seen.batches * seen.lines)
    arguments = {
        "tensors": tensors,
        "gradients": gradients,
        "sums": kernels.Sums(*partials),
        "batches": seen.batches,
        "splits": splits,
        "activation": form.activation,
        **forward,
        **_geometry(seen, plan),
    }
    return Launch(kernels.gradient_sums, (plan.blocks(seen) * splits,), arguments), partials


def merge_gradients_launch(
    partials: Tensor,
    var: Tensor,
    weight: Tensor | None,
    out: Gradients,
    means: Tensor | None,
    elements: float | Tensor,
    form: Form,
    seen: View,
) -> Launch:
    """partials: what ``gradient_sums`` wrote. elements: of a unit. means: [2, units], where to write what
    ``gradient_apply`` needs."""
    plan = merge_plan(seen)
    all_lines = seen.batches * seen.lines
    arguments = {
        "partials": kernels.Sums(*partials),
        "var_ptr": var,
        "weight_ptr": weight,
        "sums": kernels.Sums(out.dbias, out.dweight),
        "means": kernels.Means(None, None) if means is None else kernels.Means(*means),
        **number("elements", elements, 0.0),
        "eps": form.eps,
        **_merge_geometry(seen, plan, partials[0].numel() // all_lines),
    }
    return Launch(kernels.merge_gradient_sums, (ceil_div(all_lines, plan.block),), arguments)


def dx_launch(
    dy: Tensor,
    x: Tensor,
    dx: Tensor,
    means: Tensor,
    forward: dict[str, Any],
    activation: str | None,
    seen: View,
) -> Launch:
    plan = split_plan(seen, dy.element_size())
    splits = _many_splits(seen, plan, dx.device)
    arguments = {
        "tensors": kernels.Backward(dy, x, None, None),
        "dx_ptr": dx,
        "means": kernels.Means(*means),
        "splits": splits,
        "activation": activation,
        **forward,
        **_geometry(seen, plan),
    }
    return Launch(kernels.gradient_apply, (plan.blocks(seen) * splits,), arguments)


# --- operators, on tensors of any layout ------------------------------------------------------------------


def keeps_signs(residual: Tensor | None, form: Form, y: Tensor) -> bool:
    """y: dense, laid out as the input."""
    if residual is None or form.activation not in SIGNED:
        return False
    # Only then: the view of odd planes depends on the number of samples, which would be a guard of torch.compile.
    seen = view(y, form.groups) or view_of(torch.empty(y.shape, dtype=y.dtype, device="meta"), form.groups)
    return seen.innermost % 8 == 0


def _laid_out(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, form: Form
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The four of them in layouts that the kernels take: themselves wherever possible."""
    x = laid_out(x, form.groups)
    residual = None if residual is None else with_strides(residual, x.stride())
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return x, weight, bias, residual


@operator("fastreg::channel_norm", writes=["y", "signs", "mean", "var", "running_mean", "running_var"])
def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    signs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    momentum_in_memory: Tensor | None,
    form: Form,
) -> None:
    """Normalizes with the statistics of ``x``. y: laid out as ``dense(x)``. running: contiguous [channels]."""
    x, weight, bias, residual = _laid_out(x, weight, bias, residual, form)
    result = y if y.stride() == x.stride() else torch.empty_like(x, dtype=y.dtype)
    share = momentum if momentum_in_memory is None else momentum_in_memory
    forward_launches.run(
        x, weight, bias, residual, result, signs, mean, var, running_mean, running_var, share, form
    )
    if result is not y:
        y.copy_(result)


@operator("fastreg::channel_norm_apply", writes=["y", "signs"])
def forward_with(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    signs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    form: Form,
) -> None:
    """Normalizes with the given statistics."""
    x, weight, bias, residual = _laid_out(x, weight, bias, residual, form)
    mean, var = (t.to(sum_dtype(x.dtype)).contiguous() for t in (mean, var))
    result = y if y.stride() == x.stride() else torch.empty_like(x, dtype=y.dtype)
    apply_launches.run(x, weight, bias, residual, result, signs, mean, var, form)
    if result is not y:
        y.copy_(result)


@operator("fastreg::channel_norm_backward", writes=["dx", "dweight", "dbias", "dv"])
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    signs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    dv: Tensor | None,
    training: bool,
    form: Form,
) -> None:
    """dx, dv: laid out as ``dense(x)``. dweight, dbias: [channels]."""
    x, weight, bias, residual = _laid_out(x, weight, bias, residual, form)
    dy = with_strides(dy, x.stride())
    mean, var = (t.to(sum_dtype(x.dtype)).contiguous() for t in (mean, var))
    aside = dx.stride() != x.stride()
    of_input = torch.empty_like(x) if aside else dx
    of_residual = torch.empty_like(x, dtype=dv.dtype) if aside and dv is not None else dv
    backward_launches.run(
        dy, x, weight, bias, residual, signs, mean, var, of_input, dweight, dbias, of_residual, training, form
    )
    if aside:
        dx.copy_(of_input)
        if dv is not None and of_residual is not None:
            dv.copy_(of_residual)


def unpacked_signs(signs: Tensor, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """The bits of ``signs`` as a bool tensor with these dense strides."""
    bits = signs[:, None] >> torch.arange(8, dtype=torch.uint8, device=signs.device) & 1
    return bits.bool().flatten().as_strided(size, stride)


# --- autograd ---------------------------------------------------------------------------------------------


class _ChannelNorm(torch.autograd.Function):
    """Saves x, a mean and a variance a unit, and what the activation needs."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, mean, var, running, form, dtype):
        y = torch.empty_like(x, dtype=dtype)
        signs = None
        if any(ctx.needs_input_grad) and keeps_signs(residual, form, y):
            signs = torch.empty(x.numel() // 8, dtype=torch.uint8, device=x.device)
        ctx.form, ctx.training = form, mean is None
        if mean is None:
            mean, var = _normalized(x, weight, bias, residual, y, signs, running, form)
        else:
            forward_with(x, weight, bias, residual, y, signs, mean, var, form)
        ctx.residual_dtype = None if residual is None else residual.dtype
        again = residual if form.activation is not None and signs is None else None
        ctx.save_for_backward(x, weight, bias, again, signs, mean, var)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, residual, signs, mean, var = ctx.saved_tensors
        form = ctx.form
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        own = needs_residual and form.activation is not None
        dx = dweight = dbias = dv = None
        if needs_definition(dy):
            given = (None, None) if ctx.training else (mean, var)
            dx, dweight, dbias, dv = _gradients_by_definition(
                dy, x, weight, bias, residual, signs, given, form
            )
        elif needs_x or needs_weight or needs_bias or own:
            dx = torch.empty_like(x)
            dweight, dbias = (_of_parameter(t, x) for t in (weight, bias))
            dv = torch.empty_like(x, dtype=ctx.residual_dtype) if own else None
            backward(
                dy, x, weight, bias, residual, signs, mean, var, dx, dweight, dbias, dv, ctx.training, form
            )
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            (dv if own and dv is not None else dy).to(ctx.residual_dtype) if needs_residual else None,
            *[None] * 5,
        )


def _normalized(x, weight, bias, residual, y, signs, running, form) -> tuple[Tensor, Tensor]:
    """Writes ``y`` and ``signs``, updates ``running``, and returns the mean and the variance of each unit."""
    units = x.shape[0] * form.groups if form.groups else x.shape[1]
    dtype, device = sum_dtype(x.dtype), x.device
    mean = torch.empty(units, dtype=dtype, device=device)
    var = torch.empty(units, dtype=dtype, device=device)
    # The kernels update statistics of channels that lie side by side. Not in a graph: computed again in the backward
    # pass, as checkpoints are, it would need the statistics from before, which are overwritten by then.
    updates = running is not None and not form.groups and not torch.compiler.is_compiling()
    updates = updates and all(t is None or t.is_contiguous() for t in running[:2])
    kept = running if updates else Running(None, None, 0.0)
    in_memory = isinstance(kept.momentum, Tensor)
    momentum = (0.0, kept.momentum) if in_memory else (kept.momentum, None)
    forward(x, weight, bias, residual, y, signs, mean, var, *kept[:2], *momentum, form)
    if running is not None and kept is not running:
        update_running(running, *_of_channels(mean, var, x, form.groups))
    return mean, var


def _of_parameter(parameter: Tensor | None, x: Tensor) -> Tensor:
    """The gradient of a parameter. The kernels write one even if there is no parameter."""
    dtype = sum_dtype(x.dtype) if parameter is None else parameter.dtype
    return torch.empty(x.shape[1], dtype=dtype, device=x.device)


def _gradients_by_definition(dy, x, weight, bias, residual, signs, given, form):
    """The gradients of x, weight, bias and residual in ATen. given: statistics of evaluation, or (None, None)."""
    inner = form
    if signs is not None:
        positive = unpacked_signs(signs, x.shape, dense_strides(x))
        dy = torch.where(positive, dy, dy * (0.01 if form.activation == "leaky_relu" else 0.0))
        inner = form._replace(activation=None)
    mean, var = given

    def y(x, weight, bias, residual):
        return definition(x, weight, bias, residual, mean, var, inner).to(dy.dtype)

    gradients = by_definition(y, (x, weight, bias, residual), dy)
    if signs is not None:
        gradients[3] = dy
    return gradients


# --- the function behind all public ones ------------------------------------------------------------------


def takes(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor | None, Tensor | None],
    groups: int,
    fused: bool,
) -> bool:
    """Whether the kernels take it. All else, also whatever is wrong with it, is for ATen to do, or to refuse.

    groups: 0 where the statistics are those of the batch. fused: something stands around the normalization.
    """
    if not (backend.runs_kernels(input) and input.dim() >= 2 and input.numel() > 0):
        return False
    if not (
        fused
        or backend.worth_a_launch(input, "channel_norm")
        # which ATen's group norm refuses on a GPU
        or any(t is not None and t.dtype != input.dtype for t in (weight, bias))
    ):
        return False
    if not (torch.compiler.is_compiling() or indexable(input, groups)):  # compiled, the size would be a guard
        return False
    if (statistics[0] is None) != (statistics[1] is None):
        return False
    size, device, dtype = input.shape[1:2], input.device, input.dtype
    for t in (weight, bias, *statistics):
        if t is not None:
            if not (backend.is_plain(t) and t.shape == size and t.device == device):
                return False
            if t.dtype != dtype and not (t.dtype == torch.float32 and dtype.itemsize == 2):
                return False
    return True


def plain_momentum(momentum: float | Tensor, x: Tensor) -> float | Tensor | None:
    """``momentum`` as Python's number, or a tensor of one element beside ``x``. None if torch has to refuse it."""
    if type(momentum) is float:
        return momentum
    if isinstance(momentum, Tensor) and momentum.device == x.device and momentum.is_floating_point():
        return momentum if momentum.numel() == 1 and not momentum.requires_grad else None
    momentum = plain(momentum)
    return momentum if is_number(momentum) else None


def normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: tuple[Tensor | None, Tensor | None] | None,
    running: Running | None,
    form: Form,
    dtype: torch.dtype,
) -> Tensor:
    """f(normalized input + residual) on the kernels.

    given: mean and variance of evaluation, or None: those of the input.
    running: updated with the statistics of the input: of channels, or the average over samples of those of
        instances.
    dtype: of the normalized input. The result has the promoted dtype of that and the residual.
    """
    mean, var = given or (None, None)
    arguments = (weight, bias, residual, mean, var, running, form, result_dtype(dtype, residual))
    y = apply(_ChannelNorm, input, *arguments)
    if running is not None and not torch.compiler.is_compiling():
        # The kernels wrote into them: whoever saved them for a backward pass has to hear of it.
        torch.autograd.graph.increment_version([t for t in running[:2] if t is not None])
    return y


def _of_channels(mean: Tensor, var: Tensor, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of channels; of instance normalization, averaged over the samples."""
    samples = x.shape[0] if groups else 1
    count = x.numel() // (samples * x.shape[1])
    mean, var = (t.view(samples, x.shape[1]).mean(0) for t in (mean, var))
    return mean, var * (count / (count - 1))


def update_running(running: Running, mean: Tensor | None, unbiased_var: Tensor | None) -> None:
    """running = (1 - momentum) running + momentum new."""
    with torch.no_grad():
        for old, new in ((running.mean, mean), (running.var, unbiased_var)):
            if old is not None and new is not None:
                old.copy_((1 - running.momentum) * old.to(new.dtype) + running.momentum * new)

"""Tensors of drawn shapes and layouts: what public functions launch for them keeps the promises of test_plans.py."""

import contextlib
import functools
import math
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from drawing import ACTIVATIONS, DTYPES, FLOATS, drawn, laid_out, layouts, shapes, sizes
from hypothesis import strategies as st
from test_plans import check, check_call, checked, recorded, tensors_at

import fastreg
import fastreg.functional as F
import fastreg.optim
from fastreg.ops import backend
from fastreg.ops.dropout import activation_backward
from fastreg.ops.multi_tensor import averages as averages_of_lists
from fastreg.ops.norms import channel_norm, lines

pytestmark = pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")

if backend.HAS_TRITON:
    from fastreg.kernels import (
        averages,
        drop_connect,
        dropout,
        dual_linear,
        expectation,
        layer_norm,
        local_response_norm,
        noise,
        noisy_linear,
        optimizers,
        penalties,
    )
    from fastreg.kernels import channel_norm as norms


# --- drawn tensors ----------------------------------------------------------------------------------------


multiprocessor_counts = st.sampled_from([1, 3, 16, 108, 132, 148])


@st.composite
def tensors(draw, least: int = 1, most: int = 5) -> torch.Tensor:
    """From tiny ones to some of far more than 2^31 elements, on the meta device."""
    shape = draw(shapes(least, most, 1 << draw(st.integers(8, 36)), longest=5000))
    if draw(st.integers(0, 9)) == 0:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(1 << 16, 1 << 33))
        while math.prod(shape) > 1 << 36:
            shape[int(np.argsort(shape)[-2])] = 1
    x = torch.empty(shape, device="meta", dtype=draw(st.sampled_from(DTYPES)))
    return laid_out(x, draw(layouts(x.dim())))


def grad(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def reaches(kernels: ModuleType, names: str):
    """The sample has to launch all these kernels."""

    def decorate(test):
        @functools.wraps(test)
        def run(start, count):
            checked.clear()
            test(start, count)
            assert start or {getattr(kernels, name) for name in names.split()} <= checked

        return run

    return decorate


# --- the sweeps -------------------------------------------------------------------------------------------


def check_norm(data, x, groups, function) -> None:
    """With a plan that is chosen, or one that is not the best."""
    if not lines.indexable(x, groups):
        return
    plan = data.draw(st.sampled_from(["chosen", "chosen", "read twice", "split"]), label="plan")
    forced = contextlib.nullcontext()
    if plan == "split":
        forced = mock.patch.object(channel_norm, "whole_plan", return_value=None)
    elif plan == "read twice":
        forced = mock.patch.object(lines, "_kept_plan", return_value=None)
    residual = None
    if data.draw(st.booleans(), label="residual"):
        residual = torch.empty_like(x).requires_grad_()
    parameters = (None, None)
    if data.draw(st.booleans(), label="parameters"):
        parameters = grad(2, x.shape[1], dtype=x.dtype).unbind()
    options = {"activation": data.draw(st.sampled_from(ACTIVATIONS)), "residual": residual}
    with forced:
        check_call(
            lambda x, *parameters: function(x, *parameters, **options),
            x.requires_grad_(), *parameters, multiprocessors=data.draw(multiprocessor_counts),
        )  # fmt: skip


@reaches(
    norms,
    "whole_forward whole_backward statistics apply gradient_sums gradient_apply merge_statistics merge_gradient_sums",
)
@drawn(700, 7000)
def test_batch_norms(data):
    x = data.draw(tensors(least=2))
    training = data.draw(st.booleans(), label="training") and x.numel() >= 2 * x.shape[1]
    running = torch.empty(2, x.shape[1], device="meta", dtype=x.dtype).unbind()
    check_norm(
        data, x, 0,
        lambda x, *parameters, **options: F.batch_norm(x, *running, *parameters, training=training, **options),
    )  # fmt: skip


@reaches(
    norms,
    "whole_forward whole_backward statistics apply gradient_sums gradient_apply merge_statistics merge_gradient_sums",
)
@drawn(700, 7000)
def test_group_norms(data):
    x = data.draw(tensors(least=2))
    width = data.draw(sizes(data.draw(st.sampled_from([1, 16, 64]))), label="width")
    groups = data.draw(sizes(64), label="groups")
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    x = laid_out(x.new_empty(x.shape[0], groups * width, *x.shape[2:]), order)
    if x.numel() > groups:
        check_norm(
            data, x, groups,
            lambda x, *parameters, **options: F.group_norm(x, groups, *parameters, **options),
        )  # fmt: skip


@reaches(dropout, "forward backward backward_bias_columns")
@drawn(500, 5000)
def test_dropouts(data):
    x = data.draw(tensors()).requires_grad_()
    channels = data.draw(st.booleans(), label="mask of channels") and x.dim() >= 3
    function = data.draw(st.sampled_from([F.dropout1d, F.dropout2d, F.dropout3d])) if channels else F.dropout
    if channels and x.dim() != {F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5}[function]:
        function = F.drop_path
    bias = None
    if data.draw(st.booleans(), label="bias"):
        dim = data.draw(st.integers(0, x.dim() - 1))
        bias = grad(x.shape[dim], *[1] * (x.dim() - 1 - dim), dtype=x.dtype)
    residual = None
    if data.draw(st.booleans(), label="residual"):
        residual = torch.empty_like(x, dtype=data.draw(st.sampled_from(DTYPES)))
    options = {"activation": data.draw(st.sampled_from(ACTIVATIONS)), "residual": residual, "seed": 1}
    check_call(
        lambda x, bias: function(x, 0.3, True, bias=bias, **options),
        x, bias, multiprocessors=data.draw(multiprocessor_counts),
    )  # fmt: skip


@reaches(dropout, "backward backward_bias_columns")
@drawn(300, 3000)
def test_activations_behind_products(data):
    dy = data.draw(tensors(least=2, most=2))
    with recorded(data.draw(multiprocessor_counts)) as launches:
        activation_backward(dy, torch.empty_like(dy), "relu", data.draw(st.booleans(), label="bias"))
    check(launches)


@reaches(layer_norm, "forward forward_long backward backward_long backward_columns")
@drawn(500, 5000)
def test_layer_norms(data):
    x = data.draw(tensors()).requires_grad_()
    normalized = data.draw(st.integers(1, x.dim()))
    parameters = [None, None]
    for i in range(2):
        if data.draw(st.booleans(), label=("weight", "bias")[i]):
            parameters[i] = grad(*x.shape[-normalized:], dtype=x.dtype)
    counts = data.draw(multiprocessor_counts)
    around = {"activation": data.draw(st.sampled_from(ACTIVATIONS))}
    residual = None
    if data.draw(st.booleans(), label="residual"):
        others = [torch.float64] if x.dtype == torch.float64 else FLOATS
        residual = torch.empty_like(x, dtype=data.draw(st.sampled_from(others))).requires_grad_()
    if data.draw(st.booleans(), label="dropout"):
        around |= {"p": 0.3, "seed": 1, "prenorm": data.draw(st.booleans())}
        check_call(
            lambda x, residual, *parameters: F.dropout_add_layer_norm(
                x, residual, x.shape[-normalized:], *parameters, **around
            ),
            x, residual, *parameters, multiprocessors=counts,
        )  # fmt: skip
    else:
        check_call(
            lambda x, residual, *parameters: F.layer_norm(
                x, x.shape[-normalized:], *parameters, residual=residual, **around
            ),
            x, residual, *parameters, multiprocessors=counts,
        )  # fmt: skip


@reaches(local_response_norm, "forward backward")
@drawn(250, 2500)
def test_local_response_norms(data):
    x = data.draw(tensors(least=3)).requires_grad_()
    size = data.draw(st.integers(1, 9))
    beta = data.draw(st.sampled_from([0.75, 0.5]))
    around = {"activation": data.draw(st.sampled_from(ACTIVATIONS))}
    check_call(lambda x: F.local_response_norm(x, size, beta=beta, **around), x)


@reaches(noise, "add_noise")
@drawn(300, 3000)
def test_noise(data):
    x = data.draw(tensors()).requires_grad_()
    mode = data.draw(st.sampled_from(["additive", "multiplicative"]))
    check_call(lambda x: F.gaussian_noise(x, mode=mode, seed=1), x)


matrices = st.tuples(*[sizes(5000)] * 3)  # examples, outputs, inputs


def linear(data) -> tuple[torch.Tensor, ...]:
    examples, outputs, inputs = data.draw(matrices)
    dtype = data.draw(st.sampled_from(FLOATS))
    bias = grad(outputs, dtype=dtype) if data.draw(st.booleans(), label="bias") else None
    return grad(examples, inputs, dtype=dtype), grad(outputs, inputs, dtype=dtype), bias


@reaches(drop_connect, "product merge weight_gradient shared_weight_gradient mask_weights")
@drawn(300, 3000)
def test_drop_connect(data):
    operands = linear(data)
    mode = data.draw(st.sampled_from(["example", "group", "batch"]))
    options = {"mode": mode, "p": data.draw(st.sampled_from([0.5, 0.3])), "seed": 1}
    if mode == "group":
        options["group_size"] = data.draw(sizes(300))
    options["activation"] = data.draw(st.sampled_from(ACTIVATIONS))
    counts = data.draw(multiprocessor_counts)
    check_call(F.drop_connect_linear, *operands, multiprocessors=counts, **options)


@reaches(dual_linear, "second_input product weight_gradient")
@drawn(300, 3000)
def test_products_of_noise(data):
    options = {"activation": data.draw(st.sampled_from(ACTIVATIONS)), "seed": 1}
    mode = data.draw(st.sampled_from(["flipout", "gaussian"]))
    check_call(F.drop_connect_linear, *linear(data), mode=mode, **options)


@reaches(expectation, "integrate integrate_backward average average_backward")
@drawn(200, 2000)
def test_inference_of_drop_connect(data):
    operands = linear(data)
    samples = data.draw(st.one_of(st.none(), st.integers(1, 9)))
    check_call(
        lambda *operands: F.drop_connect_linear(
            *operands, training=False, activation="tanh", samples=samples, seed=1
        ),
        *operands,
    )


@reaches(noisy_linear, "row_noise row_noise_backward")
@drawn(300, 3000)
def test_noisy_linear(data):
    operands = linear(data)
    mode = data.draw(st.sampled_from(["additive", "multiplicative", "factorised"]))
    sigma = 0.1
    options = {"mode": mode, "seed": 1, "activation": data.draw(st.sampled_from(ACTIVATIONS))}
    if mode == "factorised":
        sigma = torch.empty_like(operands[1]).requires_grad_()
        if operands[2] is not None:
            options["bias_sigma"] = torch.empty_like(operands[2]).requires_grad_()
    elif data.draw(st.booleans(), label="learned"):
        sigma = grad(dtype=operands[0].dtype)
    check_call(lambda *operands: F.noisy_linear(*operands, sigma, **options), *operands)


@st.composite
def parameters(draw) -> list[torch.Tensor]:
    """A few tensors on the CPU, some of them views that begin anywhere."""
    found = []
    tensors_at.clear()
    dtype = draw(st.sampled_from(DTYPES))
    for _ in range(draw(st.integers(1, 6))):
        shape = [draw(sizes(draw(st.sampled_from([4, 300, 5000])))) for _ in range(draw(st.integers(1, 3)))]
        while math.prod(shape) > 1 << 17:
            shape[int(np.argmax(shape))] = draw(sizes(16))
        start = draw(st.integers(0, 3))
        x = torch.empty(math.prod(shape) + start, dtype=dtype)[start:].view(shape)
        x = torch.nn.Parameter(x)
        x.grad = torch.empty_like(x)
        tensors_at[x.data_ptr()] = x
        found.append(x)
    return found


@reaches(optimizers, "advance step squares fold project")
@drawn(150, 1500)
def test_optimizers(data):
    params = data.draw(parameters())
    function = data.draw(st.sampled_from([fastreg.optim.SGD, fastreg.optim.AdamW]))
    options = {}
    if data.draw(st.booleans(), label="max_norm"):
        options |= {"max_norm": 1.0, "max_norm_dim": data.draw(st.sampled_from([None, 0]))}
    if data.draw(st.booleans(), label="max_grad_norm"):
        options["max_grad_norm"] = 1.0
    with recorded() as launches:
        function(params, lr=0.1, **options).step()
    check(launches)


@reaches(penalties, "penalize project_rows shorten")
@drawn(100, 1000)
def test_penalties(data):
    params = data.draw(parameters())
    with recorded() as launches:
        fastreg.penalties.l2(params, 0.1)
        fastreg.penalties.max_norm_(params, 1.0, dim=data.draw(st.sampled_from([None, 0])))
    check(launches)


@reaches(averages, "follow copy_if")
@drawn(100, 1000)
def test_averages(data):
    params = data.draw(parameters())
    others = [torch.empty_like(p) for p in params]
    with recorded() as launches, torch.no_grad():
        averages_of_lists.follow_(params, others, 0.9)
        averages_of_lists.copy_if_(params, others, torch.tensor(True))
    check(launches)

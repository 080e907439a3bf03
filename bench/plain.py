"""The plain kernels (``kernels/plain``) as functions of tensors: the peer "plain", and a second reference of the tests.

Each takes contiguous tensors, launches one program a row, and leaves the last sums to torch.
"""

import math
import random as host_random
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import Function

from fastreg.kernels.plain import averages as average_kernels
from fastreg.kernels.plain import channel_norm as channel_kernels
from fastreg.kernels.plain import drop_connect as connect_kernels
from fastreg.kernels.plain import dropout as dropout_kernels
from fastreg.kernels.plain import layer_norm as layer_kernels
from fastreg.kernels.plain import local_response_norm as response_kernels
from fastreg.kernels.plain import noise as noise_kernels
from fastreg.kernels.plain import optimizers as optimizer_kernels
from fastreg.kernels.plain import penalties as penalty_kernels
from fastreg.ops import backend
from fastreg.random import chance, threshold

BLOCK = 1024  # of tensors that have no rows


def available() -> None:
    """Raises where the kernels cannot run."""
    if not torch.cuda.is_available() and not backend.INTERPRETED:
        raise RuntimeError("the kernels need a GPU")


def rows_of(x: Tensor) -> tuple[int, int, int]:
    """Rows, columns, and the block that a row fits into."""
    columns = x.shape[-1]
    return x.numel() // columns, columns, triton.next_power_of_2(columns)


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, BLOCK: int, **constants: Any) -> None:
    """Launches without fused multiply-adds: one lane would fuse its product into ``tl.sum(a * b)``, another its
    neighbour's, and their sums would differ. (``ptxas.terms`` is the tuned kernels' answer.)"""
    kernel[grid](*arguments, BLOCK=BLOCK, **constants, enable_fp_fusion=False)


def drawn(seed: int | None) -> int:
    return host_random.getrandbits(63) if seed is None else seed


class _Dropout(Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.draw = seed, threshold(p), 65536 / (65536 - threshold(p))
        y, (rows, columns, block) = torch.empty_like(x), rows_of(x)
        run(dropout_kernels.forward, (rows,), x, y, *ctx.draw, columns, BLOCK=block)
        return y

    @staticmethod
    def backward(ctx, dy):
        dx, (rows, columns, block) = torch.empty_like(dy), rows_of(dy)
        run(dropout_kernels.backward, (rows,), dy.contiguous(), dx, *ctx.draw, columns, BLOCK=block)
        return dx, None, None


def dropout(x: Tensor, p: float = 0.5, seed: int | None = None) -> Tensor:
    return _Dropout.apply(x, p, drawn(seed))


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, rms):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.rms = eps, rms
        y, (rows, columns, block) = torch.empty_like(x), rows_of(x)
        run(layer_kernels.forward, (rows,), x, weight, bias, y, columns, eps, RMS=rms, BLOCK=block)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx, (rows, columns, block) = torch.empty_like(x), rows_of(x)
        dweight = torch.empty(rows, columns, device=x.device)
        dbias = None if ctx.rms else torch.empty_like(dweight)
        tensors = (x, weight, dy.contiguous(), dx, dweight, dbias)
        run(layer_kernels.backward, (rows,), *tensors, columns, ctx.eps, RMS=ctx.rms, BLOCK=block)
        dbias = None if dbias is None else dbias.sum(0).to(weight.dtype)
        return dx, dweight.sum(0).to(weight.dtype), dbias, None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Over the last dimension."""
    return _LayerNorm.apply(x, weight, bias, eps, False)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Over the last dimension."""
    return _LayerNorm.apply(x, weight, None, eps, True)


class _ChannelNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        samples, channels, inner = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        if groups is None:
            units, numbers = channels, (samples, 1, channels, channels, inner)
        else:
            units = samples * groups
            numbers = (channels // groups, channels // groups, 1, channels, inner)
        ctx.grid, ctx.numbers, ctx.block = (units,), numbers, triton.next_power_of_2(inner)
        mean, rstd = torch.empty(2, units, device=x.device)
        y = torch.empty_like(x)
        tensors = (x, weight, bias, y, mean, rstd)
        run(channel_kernels.forward, ctx.grid, *tensors, *numbers, eps, BLOCK=ctx.block)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight, dbias = torch.empty(2, *x.shape[:2], device=x.device)
        tensors = (x, weight, mean, rstd, dy.contiguous(), dx, dweight, dbias)
        run(channel_kernels.backward, ctx.grid, *tensors, *ctx.numbers, BLOCK=ctx.block)
        return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype), None, None


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """In training, without running statistics."""
    return _ChannelNorm.apply(x, weight, bias, None, eps)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return _ChannelNorm.apply(x, weight, bias, groups, eps)


class _LocalResponseNorm(Function):
    @staticmethod
    def forward(ctx, x, size, *numbers):
        ctx.save_for_backward(x)
        ctx.size, ctx.numbers = size, numbers
        y, channels, inner = torch.empty_like(x), x.shape[1], math.prod(x.shape[2:])
        grid, block = (x.shape[0] * channels,), triton.next_power_of_2(inner)
        run(response_kernels.forward, grid, x, y, channels, inner, *numbers, SIZE=size, BLOCK=block)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx, channels, inner = torch.empty_like(x), x.shape[1], math.prod(x.shape[2:])
        grid, block = (x.shape[0] * channels,), triton.next_power_of_2(inner)
        tensors = (x, dy.contiguous(), dx)
        run(
            response_kernels.backward,
            grid,
            *tensors,
            channels,
            inner,
            *ctx.numbers,
            SIZE=ctx.size,
            BLOCK=block,
        )
        return dx, None, None, None, None


def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    return _LocalResponseNorm.apply(x, size, alpha, beta, k)


class _DropConnectLinear(Function):
    @staticmethod
    def forward(ctx, v, weight, bias, p, seed):
        kept = chance(p)
        ctx.save_for_backward(v, weight)
        ctx.draw, ctx.kept = (seed, 1 / kept.probability), {"KEEP": kept.keep, "DIGITS": kept.digits}
        (examples, inputs), outputs = v.shape, len(weight)
        z, block = v.new_empty(examples, outputs), triton.next_power_of_2(inputs)
        tensors = (v, weight, bias, z)
        run(
            connect_kernels.forward,
            (examples, outputs),
            *tensors,
            outputs,
            inputs,
            *ctx.draw,
            **ctx.kept,
            BLOCK=block,
        )
        return z

    @staticmethod
    def backward(ctx, dz):
        v, weight = ctx.saved_tensors
        (examples, inputs), outputs, dz = v.shape, len(weight), dz.contiguous()
        dv, dweight = torch.empty_like(v), torch.empty_like(weight)
        sizes, block = (outputs, inputs), triton.next_power_of_2(outputs)
        run(
            connect_kernels.backward_input,
            (examples, inputs),
            weight,
            dz,
            dv,
            *sizes,
            *ctx.draw,
            **ctx.kept,
            BLOCK=block,
        )
        block = triton.next_power_of_2(examples)
        tensors = (v, dz, dweight, examples, *sizes)
        run(connect_kernels.backward_weight, (outputs, inputs), *tensors, *ctx.draw, **ctx.kept, BLOCK=block)
        return dv, dweight, dz.sum(0), None, None


def drop_connect_linear(
    v: Tensor, weight: Tensor, bias: Tensor, p: float = 0.5, seed: int | None = None
) -> Tensor:
    """With a mask for every example."""
    return _DropConnectLinear.apply(v, weight, bias, p, drawn(seed))


class _Noise(Function):
    @staticmethod
    def forward(ctx, x, std, multiplicative, seed):
        ctx.draw, ctx.multiplicative = (seed, std), multiplicative
        y, (rows, columns, block) = torch.empty_like(x), rows_of(x)
        run(
            noise_kernels.add_noise,
            (rows,),
            x,
            y,
            *ctx.draw,
            columns,
            MULTIPLICATIVE=multiplicative,
            BLOCK=block,
        )
        return y

    @staticmethod
    def backward(ctx, dy):
        if not ctx.multiplicative:
            return dy, None, None, None
        dx, (rows, columns, block) = torch.empty_like(dy), rows_of(dy)
        tensors = (dy.contiguous(), dx)
        run(noise_kernels.add_noise, (rows,), *tensors, *ctx.draw, columns, MULTIPLICATIVE=True, BLOCK=block)
        return dx, None, None, None


def gaussian_noise(x: Tensor, std: float, mode: str = "additive", seed: int | None = None) -> Tensor:
    return _Noise.apply(x, std, mode == "multiplicative", drawn(seed))


class _ElasticNet(Function):
    @staticmethod
    def forward(ctx, p, l1, l2):
        blocks = triton.cdiv(p.numel(), BLOCK)
        gradient, values = torch.empty_like(p), torch.empty(blocks, device=p.device)
        run(penalty_kernels.penalize, (blocks,), p, gradient, values, p.numel(), l1, l2, BLOCK=BLOCK)
        ctx.save_for_backward(gradient)
        return values.sum()

    @staticmethod
    def backward(ctx, dy):
        (gradient,) = ctx.saved_tensors
        return gradient * dy, None, None


def elastic_net(p: Tensor, l1: float, l2: float) -> Tensor:
    return _ElasticNet.apply(p, l1, l2)


def max_norm_rows_(p: Tensor, radius: float) -> None:
    rows, columns, block = rows_of(p)
    run(penalty_kernels.project_rows, (rows,), p, columns, radius, BLOCK=block)


def follow_(average: Tensor, p: Tensor, decay: float) -> None:
    """average = decay average + (1 - decay) p."""
    blocks = triton.cdiv(p.numel(), BLOCK)
    run(average_kernels.follow, (blocks,), average, p, p.numel(), 1 - decay, BLOCK=BLOCK)


class SGD(torch.optim.Optimizer):
    def __init__(self, params, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            numbers = [group[name] for name in ("lr", "momentum", "weight_decay")]
            for p in group["params"]:
                first = not self.state[p]
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                blocks = triton.cdiv(p.numel(), BLOCK)
                run(
                    optimizer_kernels.sgd,
                    (blocks,),
                    p,
                    p.grad,
                    m,
                    p.numel(),
                    *numbers,
                    FIRST=first,
                    BLOCK=BLOCK,
                )


class AdamW(torch.optim.Optimizer):
    def __init__(
        self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                beta1, beta2 = group["betas"]
                corrections = (1 - beta1 ** state["step"], 1 - beta2 ** state["step"])
                tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"], p.numel())
                numbers = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"], *corrections)
                run(
                    optimizer_kernels.adamw, (triton.cdiv(p.numel(), BLOCK),), *tensors, *numbers, BLOCK=BLOCK
                )

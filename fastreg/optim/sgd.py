"""Stochastic gradient descent with coupled (SGD) and decoupled (SGDW) weight decay."""

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.sgd import sgd

from fastreg.ops.multi_tensor.optimizers import Numbers, Rule
from fastreg.optim.base import Regularized
from fastreg.optim.distributed import local
from fastreg.optim.options import OPTIONS_DOC, numbers_of, rule_of


class SGD(Regularized, torch.optim.SGD):
    __doc__ = f"""Stochastic gradient descent with L2 regularization, in one pass over memory.

    As :class:`torch.optim.SGD`, whose arguments, groups and state these are. ``weight_decay`` is coupled: the gradient
    of ``weight_decay / 2 |p|^2``, which goes through the momentum. Without momentum that is :class:`SGDW` with the
    same numbers.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused: as in torch.
            On the kernels foreach and fused choose nothing. lr may be a tensor, read in every step.{OPTIONS_DOC}
    Raises:
        ValueError: an argument out of range.
        RuntimeError: gradients or state of another shape or device than their parameter; parameters in pieces whose
            max-norm needs them whole, sparse or complex ones with our options.

    Source: Sutskever, Martens, Dahl, Hinton 2013 (ICML); the options have theirs in ``kernels/optimizers.py``.
    """

    _theirs: type[Optimizer] | None = torch.optim.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        l1: float = 0.0,
        l1_mode: str = "proximal",
        max_norm: float | None = None,
        max_norm_dim: int | None = None,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        cautious: bool = False,
        decouple_lr: bool = False,
        stochastic_rounding: bool = False,
        master_weights: bool = False,
    ) -> None:
        arguments = locals()
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._take(arguments)

    def _decoupled(self, group: dict) -> bool:
        return False

    def _rule(self, group: dict) -> Rule:
        momentum = group["momentum"] != 0
        return rule_of(group, adam=False, momentum=momentum, nesterov=momentum and bool(group["nesterov"]))

    def _numbers(self, group: dict) -> Numbers:
        return numbers_of(group, self._decoupled(group), beta_1=group["momentum"], beta_2=group["dampening"])

    def _moments(self, group: dict) -> list[str]:
        return ["momentum_buffer"] if group["momentum"] != 0 else []

    def _torch_step(
        self, group: dict, params: list[Tensor], pieces: list[Tensor], grads: list[Tensor]
    ) -> None:
        states = [self.state[p] for p in params] if group["momentum"] != 0 else []
        aside = self.__dict__.get("_aside", {}) if group["dampening"] != 0 else {}
        counters = [aside.get(p, {}) for p in params[: len(states)]]
        # To torch a buffer that has seen no gradient is none.
        seen = [
            state.get("momentum_buffer") is not None and counter.get("step", 1) != 0
            for state, counter in zip(states, counters, strict=True)
        ]
        buffers = [local(s["momentum_buffer"]) if old else None for s, old in zip(states, seen, strict=True)]
        buffers = buffers or [None] * len(params)
        decay = group["weight_decay"]
        if self._decoupled(group):
            torch._foreach_mul_(pieces, 1 - float(group["lr"]) * float(decay))
            decay = 0
        sgd(
            pieces,
            grads,
            buffers,
            has_sparse_grad=any(g.is_sparse for g in grads),
            foreach=bool(group["foreach"]),
            fused=False,
            weight_decay=decay,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        for state, buffer, old in zip(states, buffers, seen, strict=False):
            if old or buffer is None:
                continue
            if state.get("momentum_buffer") is not None:
                local(state["momentum_buffer"]).copy_(buffer)
            else:
                state["momentum_buffer"] = buffer
        steps = [counter["step"] for counter in counters if "step" in counter]
        if steps:
            torch._foreach_add_(steps, 1)


class SGDW(SGD):
    __doc__ = f"""Stochastic gradient descent with decoupled weight decay, in one pass over memory.

    ``p <- p (1 - lr weight_decay)`` beside the step of SGD, whose momentum the decay does not enter.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused: as in
            :class:`torch.optim.SGD`, but that weight_decay is decoupled and differentiable is refused.{OPTIONS_DOC}
    Raises:
        ValueError, RuntimeError: as :class:`SGD`.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization" (ICLR), algorithm 1; the decay is
    multiplied by lr, as in torch's AdamW, and not by the schedule alone (``decouple_lr=True`` does that).
    """

    _theirs = None

    def _decoupled(self, group: dict) -> bool:
        return True

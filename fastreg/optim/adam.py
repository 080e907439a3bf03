"""Adam with coupled (Adam) and decoupled (AdamW) weight decay."""

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from fastreg.ops.multi_tensor.optimizers import Numbers, Rule
from fastreg.optim.base import Regularized
from fastreg.optim.distributed import local
from fastreg.optim.options import OPTIONS_DOC, numbers_of, rule_of

MOMENTS = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]


class _Adam(Regularized, torch.optim.Adam):
    """The part that Adam and AdamW share."""

    def _decoupled(self, group: dict) -> bool:
        return group.get("decoupled_weight_decay", False)

    def _rule(self, group: dict) -> Rule:
        return rule_of(group, adam=True, momentum=True, amsgrad=bool(group["amsgrad"]))

    def _numbers(self, group: dict) -> Numbers:
        beta_1, beta_2 = group["betas"]
        return numbers_of(group, self._decoupled(group), beta_1=beta_1, beta_2=beta_2, eps=group["eps"])

    def _moments(self, group: dict) -> list[str]:
        return MOMENTS if group["amsgrad"] else MOMENTS[:2]

    def _torch_step(
        self, group: dict, params: list[Tensor], pieces: list[Tensor], grads: list[Tensor]
    ) -> None:
        lists: list[list[Tensor]] = [[], [], [], [], [], []]
        has_complex = self._init_group({**group, "params": params}, *lists)
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs = ([local(t) for t in found] for found in lists[2:5])
        adam(
            pieces,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            lists[5],
            foreach=bool(group["foreach"]),
            capturable=group["capturable"],
            differentiable=False,
            fused=False,
            has_complex=has_complex,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            decoupled_weight_decay=self._decoupled(group),
        )


class Adam(_Adam, torch.optim.Adam):
    __doc__ = f"""Adam with L2 regularization, in one pass over memory.

    As :class:`torch.optim.Adam`, whose arguments, groups and state these are. ``weight_decay`` is coupled: the gradient
    of ``weight_decay / 2 |p|^2``, which the second moment divides again. (No such penalty decays the weights, see
    :class:`AdamW`.)

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused,
            decoupled_weight_decay: as in torch. On the kernels foreach and fused choose nothing. lr may be a tensor,
            which is read in every step.{OPTIONS_DOC}
    Raises:
        ValueError: an argument out of range.
        RuntimeError: sparse gradients; gradients or state of another shape or device than their parameter; capture in a
            CUDA graph without capturable; parameters in pieces whose max-norm needs them whole; complex ones with our
            options.

    Source: Kingma and Ba 2015 (ICLR); Reddi, Kale, Kumar 2018 (ICLR) for AMSGrad.
    """

    _theirs = torch.optim.Adam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
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
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._take(arguments)


class AdamW(_Adam, torch.optim.AdamW):
    __doc__ = f"""Adam with decoupled weight decay, in one pass over memory.

    As :class:`torch.optim.AdamW`, whose arguments, groups and state these are: ``p <- p (1 - lr weight_decay)`` beside
    the step of Adam, whose moments the decay does not enter.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: as in
            torch. On the kernels foreach and fused choose nothing. lr may be a tensor, read in every step.{OPTIONS_DOC}
    Raises:
        ValueError, RuntimeError: as :class:`Adam`.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization" (ICLR), algorithm 2.
    """

    _theirs = torch.optim.AdamW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
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
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._take(arguments)

"""The options that our optimizers have beside those of torch, and what they are to the kernels."""

import math
from operator import itemgetter
from typing import Any

from fastreg.ops.arguments import plain, real
from fastreg.ops.multi_tensor.optimizers import Numbers, Rule

OPTIONS: dict[str, Any] = {
    "l1": 0.0,
    "l1_mode": "proximal",
    "max_norm": None,
    "max_norm_dim": None,
    "max_grad_norm": None,
    "ema_decay": None,
    "cautious": False,
    "decouple_lr": False,
    "stochastic_rounding": False,
    "master_weights": False,
}
"""Our options of a group and their defaults. ``lr_0`` comes to them: the lr a group was made with."""

OPTIONS_DOC = """
        l1: strength of an L1 penalty, not negative.
        l1_mode: "proximal" (p shrinks by lr l1 after the step, to exact zeros) or "subgradient" (l1 sign(p) is added
            to the gradient).
        max_norm: radius of the ball a parameter is projected into after the step, or None.
        max_norm_dim: None: the norm of the whole parameter; 0: of each row, the incoming weights of a unit. Parameters
            of fewer than two dimensions have no rows and stay free. What lies inside stays as it is, to the bit.
        max_grad_norm: the gradients of all groups with this option are scaled together so that their norm is at most
            that, or None. The norm before that is then ``optimizer.grad_norm``.
        ema_decay: keeps an exponential moving average of the parameter, in fp32, as ``state[p]["ema"]``; or None.
        cautious: decoupled decay acts only where it does not work against the update.
        decouple_lr: decoupled decay is p <- (1 - weight_decay) p whatever lr is; it follows a schedule of lr by
            lr / lr_0, lr_0 being what the group was made with.
        stochastic_rounding: parameters of bf16 are rounded up or down at random, so that small updates are not lost;
            the bits depend on the place of the parameter and its step alone. Others are rounded to the nearest.
        master_weights: keeps an fp32 copy of parameters of 16 bits as ``state[p]["master"]``, and the moments in fp32.
            It is the copy that is trained: weights loaded into the model later need a new optimizer.

        On the CPU these take what torch's fused step and torch's functions take together, with these exceptions.
        Plain SGD over many small tensors takes up to 15 % more, to see that nothing has changed since the last step.
        max_grad_norm and ``torch.amp.GradScaler`` leave ``.grad`` as it is, and scale a copy: up to a third more
        where torch scales in place. stochastic_rounding and master_weights go tensor by tensor through the definition,
        and so do 16-bit parameters if SGD has options, or Adam cautious, max_grad_norm, a subgradient or an average.
"""


NUMBERS = ("l1", "max_norm", "max_grad_norm", "ema_decay")

values_of = itemgetter(*OPTIONS)
"""values_of(group): our options of a group."""


def check(group: dict[str, Any], decoupled: bool) -> None:
    """Makes the numbers of a group Python's. Raises ValueError for one out of range, TypeError for what is none."""
    for name in NUMBERS:
        if group[name] is not None or name == "l1":
            group[name] = real(name, group[name])
    group["max_norm_dim"] = plain(group["max_norm_dim"])
    if not 0 <= group["l1"] < math.inf:
        raise ValueError(f"Invalid l1 value: {group['l1']}")
    if group["l1_mode"] not in ("proximal", "subgradient"):
        raise ValueError(f"Invalid l1_mode: {group['l1_mode']!r}, choose 'proximal' or 'subgradient'")
    for name in ("max_norm", "max_grad_norm"):
        if group[name] is not None and not group[name] > 0:
            raise ValueError(f"Invalid {name} value: {group[name]}")
    if group["max_norm_dim"] not in (None, 0):
        raise ValueError(f"Invalid max_norm_dim: {group['max_norm_dim']}, choose None or 0")
    if group["ema_decay"] is not None and not 0 <= group["ema_decay"] <= 1:
        raise ValueError(f"Invalid ema_decay value: {group['ema_decay']}")
    for name in ("cautious", "decouple_lr"):
        if group[name] and not decoupled:
            raise ValueError(f"{name} is a way of decoupled weight decay: use SGDW or AdamW")
    if group["master_weights"] and group["stochastic_rounding"]:
        raise ValueError("master_weights and stochastic_rounding exclude each other")


_NONE = {key: value for key, value in OPTIONS.items() if key not in ("l1_mode", "max_norm_dim")}


def has_options(group: dict[str, Any]) -> bool:
    """Whether a group has more than torch's arguments."""
    return not _NONE.items() <= group.items()


def changes_before(group: dict[str, Any]) -> bool:
    """Whether an option changes gradients or weights before torch's step, not only after it."""
    subgradient = group["l1"] != 0 and group["l1_mode"] == "subgradient"
    return group["max_grad_norm"] is not None or bool(group["cautious"]) or subgradient


def rule_of(group: dict[str, Any], **rest: bool) -> Rule:
    """The rule of a group, as far as all the optimizers share it."""
    return Rule(
        cautious=bool(group["cautious"]),
        rows=None if group["max_norm"] is None else group["max_norm_dim"] == 0,
        master=bool(group["master_weights"]),
        average=group["ema_decay"] is not None,
        at_random=bool(group["stochastic_rounding"]),
        **rest,
    )


def numbers_of(group: dict[str, Any], decoupled: bool, **rest: float) -> Numbers:
    """The numbers of a group, as far as all the optimizers share them."""
    proximal = group["l1_mode"] == "proximal"
    return Numbers(
        lr=group["lr"],
        lr_0=group["lr_0"] if group["decouple_lr"] else 0.0,
        l2=0.0 if decoupled else group["weight_decay"],
        decay=group["weight_decay"] if decoupled else 0.0,
        sign=-1.0 if group["maximize"] else 1.0,
        l1_subgradient=0.0 if proximal else group["l1"],
        l1_proximal=group["l1"] if proximal else 0.0,
        max_norm=math.inf if group["max_norm"] is None else group["max_norm"],
        max_grad_norm=math.inf if group["max_grad_norm"] is None else group["max_grad_norm"],
        follow=0.0 if group["ema_decay"] is None else 1.0 - group["ema_decay"],
        **rest,
    )

"""Layers that drop connections: ``torch.nn``'s with masked weights."""

from typing import Literal

import torch
from torch import Tensor
from torch.types import Device

from fastreg.nn.layer import Layer
from fastreg.ops.dropout import dropout
from fastreg.ops.fused import activated
from fastreg.ops.linear import drop_connect as ops


class DropConnectLinear(Layer, torch.nn.Linear):
    """A linear layer whose connections are dropped in training: see :func:`fastreg.functional.drop_connect_linear`.

    Args:
        in_features, out_features, bias, device, dtype: as of :class:`torch.nn.Linear`; device and dtype by keyword.
        p: probability of dropping a connection.
        mode: "example" (every example has its own), "group" (``group_size`` examples share one), "batch", "flipout",
            "gaussian".
        inverted: False scales by 1 - p in evaluation instead of 1 / (1 - p) in training.
        inference: in evaluation, "gaussian" (the paper's), "mean", or "probit" (approximate, sigmoid alone).
        samples: draws of the Gaussian where ``activation`` has no closed form; None: quadrature, which draws nothing.
        activation: applied to the sum. The Gaussian inference needs to know it, so give it here, not to a layer behind.

    Shape: ``[*, in_features]`` to ``[*, out_features]``.

    Source: Wan, Zeiler, Zhang, LeCun, Fergus 2013 (ICML).
    """

    stochastic = True  # for mc_dropout

    # Defaults for layers whose class was changed: __init__ did not run.
    p = 0.5
    mode = "example"
    group_size: int | None = None
    inverted = True
    inference = "gaussian"
    samples: int | None = None
    activation: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.5,
        *,
        mode: str = "example",
        group_size: int | None = None,
        inverted: bool = True,
        inference: str = "gaussian",
        samples: int | None = None,
        activation: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        p, group_size, samples = ops.checked_arguments(p, mode, group_size, inference, samples, activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.p = p
        self.mode = mode
        self.group_size = group_size
        self.inverted = inverted
        self.inference = inference
        self.samples = samples
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return ops.drop_connect_linear(
            input,
            self.weight,
            self.bias,
            self.p,
            self.training,
            mode=self.mode,
            group_size=self.group_size,
            inverted=self.inverted,
            inference=self.inference,
            samples=self.samples,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, p={self.p}, mode={self.mode}"
        for name, default in (
            ("group_size", None),
            ("inverted", True),
            ("inference", "gaussian"),
            ("samples", None),
            ("activation", None),
        ):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


class DropConnectConv2d(Layer, torch.nn.Conv2d):
    """A convolution whose weights are dropped in training, with one mask a step for all examples and places.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in :class:`torch.nn.Conv2d`; device and dtype by keyword.
        p: probability of dropping a weight.
        activation: applied to the result.

    In evaluation it is torch's convolution: kept weights are scaled by 1 / (1 - p) in training.
    """

    stochastic = True  # for mc_dropout

    # Defaults for layers whose class was changed: __init__ did not run.
    p = 0.5
    activation: str | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        p: float = 0.5,
        *,
        activation: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        p, _, _ = ops.checked_arguments(p, activation=activation)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype,
        )  # fmt: skip
        self.p = p
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        weight = dropout(self.weight, self.p, self.training)
        return activated(self._conv_forward(input, weight, self.bias), self.activation)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, p={self.p}"
        return text if self.activation is None else f"{text}, activation={self.activation}"

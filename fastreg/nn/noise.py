"""Noise layers: regularization by noise on inputs and activations."""

import torch
from torch import Tensor

from fastreg.nn.layer import Layer
from fastreg.ops.noise import checked_std, gaussian_noise


class GaussianNoise(Layer, torch.nn.Module):
    """Adds normal noise in training, and is the identity otherwise. torch has no such layer.

    Args:
        std: standard deviation of the noise, finite and not negative.
        inplace: write into the input.
        mode: "additive", ``input + std * eps``, or "multiplicative", ``input * (1 + std * eps)``: Gaussian dropout,
            where ``std = sqrt(p / (1 - p))`` corresponds to dropout with probability ``p``.

    Any floating-point input; the output has its shape, dtype and layout. See :func:`fastreg.functional.gaussian_noise`.

    Source: Bishop 1995 (additive); Srivastava et al. 2014 (multiplicative).
    """

    stochastic = True  # for mc_dropout

    def __init__(self, std: float = 0.1, inplace: bool = False, *, mode: str = "additive") -> None:
        super().__init__()
        self.std = checked_std(std, mode)
        self.inplace = inplace
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        return gaussian_noise(input, self.std, self.training, self.inplace, mode=self.mode)

    def extra_repr(self) -> str:
        return f"std={self.std}, inplace={self.inplace}, mode={self.mode}"

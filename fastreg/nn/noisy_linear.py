"""A linear layer with noise on its weights: ``torch.nn.Linear`` in evaluation."""

import math

import torch
from torch import Tensor
from torch.types import Device

from fastreg.nn.layer import Layer
from fastreg.ops.linear import noisy_linear as ops


class NoisyLinear(Layer, torch.nn.Linear):
    """A linear layer whose weights are noisy in training: see :func:`fastreg.functional.noisy_linear`.

    Args:
        in_features, out_features, bias, device, dtype: as of :class:`torch.nn.Linear`.
        sigma: standard deviation of the noise. With mode="factorised" it is the paper's sigma, 0.5 there: the noise of
            a weight starts at sigma / sqrt(in_features).
        mode: "additive", "multiplicative" or "factorised".
        learn_sigma: the deviation is a parameter, ``sigma``; of mode="factorised", where this is the default, one for
            every weight and, as ``bias_sigma``, for every bias. Otherwise it is a fixed number, and the
            ``state_dict`` that of torch's layer.
        activation: applied to the sum.

    Shape: ``[*, in_features]`` to ``[*, out_features]``.

    With mode="factorised" weights and biases start uniform in ±1 / sqrt(in_features), as in the paper.

    Source: Fortunato et al. 2018 (arXiv 1706.10295).
    """

    stochastic = True  # for mc_dropout

    # Defaults for layers whose class was changed: __init__ did not run. (sigma and bias_sigma may be parameters, which
    # an attribute of the class would hide.)
    sigma: float | torch.nn.Parameter
    bias_sigma: float | torch.nn.Parameter | None
    initial_sigma = 0.1
    mode = "additive"
    learn_sigma = False
    activation: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        sigma: float = 0.1,
        *,
        mode: str = "additive",
        learn_sigma: bool | None = None,
        activation: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sigma, _ = ops.checked_arguments(sigma, mode, None, activation)
        self.mode, self.activation = mode, activation
        self.initial_sigma = sigma
        super().__init__(in_features, out_features, bias, device, dtype)
        self.learn_sigma = mode == "factorised" if learn_sigma is None else learn_sigma
        factorised = mode == "factorised"
        noisy_bias = factorised and bias
        if not self.learn_sigma:
            self.sigma = self._start()
            self.bias_sigma = self.sigma if noisy_bias else None
            return
        self.sigma = torch.nn.Parameter(self.weight.new_empty(self.weight.shape if factorised else ()))
        self.register_parameter(
            "bias_sigma", torch.nn.Parameter(self.weight.new_empty(out_features)) if noisy_bias else None
        )
        self._reset_sigma()

    def _start(self) -> float:
        """Where the deviation of a weight starts."""
        scale = 1 / math.sqrt(max(1, self.in_features)) if self.mode == "factorised" else 1.0
        return self.initial_sigma * scale

    def _reset_sigma(self) -> None:
        for sigma in (self.sigma, self.bias_sigma):
            if isinstance(sigma, Tensor):
                torch.nn.init.constant_(sigma, self._start())

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.mode == "factorised" and self.bias is not None and self.in_features:
            bound = 1 / math.sqrt(self.in_features)
            torch.nn.init.uniform_(self.weight, -bound, bound)
            torch.nn.init.uniform_(self.bias, -bound, bound)
        if "sigma" in self._parameters:
            self._reset_sigma()

    def forward(self, input: Tensor) -> Tensor:
        return ops.noisy_linear(
            input,
            self.weight,
            self.bias,
            getattr(self, "sigma", self.initial_sigma),
            self.training,
            mode=self.mode,
            bias_sigma=getattr(self, "bias_sigma", None),
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, sigma={self.initial_sigma}, mode={self.mode}"
        if self.learn_sigma:
            text += ", learn_sigma=True"
        return text if self.activation is None else f"{text}, activation={self.activation}"

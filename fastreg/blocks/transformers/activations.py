"""Activation modules of transformers, by the names that the kernels know."""

from torch import nn
from transformers import activations

from fastreg.blocks.activations import register
from fastreg.blocks.swap import Swap

register(
    {
        activations.GELUActivation: lambda m: "gelu" if m.act is nn.functional.gelu else None,
        activations.NewGELUActivation: lambda m: "gelu_tanh",
        activations.FastGELUActivation: lambda m: "gelu_tanh",
        activations.GELUTanh: lambda m: "gelu_tanh",
        activations.QuickGELUActivation: lambda m: "quick_gelu",
        activations.SiLUActivation: lambda m: "silu",
        activations.MishActivation: lambda m: "mish",
    }
)

SWAPS: list[Swap] = []

"""The networks of the whole-step benchmark: ResNet-50, and blocks of a GPT. They differ between implementations in two
kinds of layers, the norm behind a convolution and the seam between the halves of a block, and in nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastreg.nn as fnn


class PlainNorm(nn.BatchNorm2d):
    """activation(norm(x) + residual) as PyTorch users write it."""

    def __init__(self, channels: int, activation: str | None = None) -> None:
        super().__init__(channels)
        self.rectified = activation == "relu"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        y = y if residual is None else y + residual
        return F.relu(y, inplace=True) if self.rectified else y


class PlainSeam(nn.LayerNorm):
    """(norm(h), h) for h = skip + dropout(x)."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__(width)
        self.p = p

    def forward(self, x: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = F.dropout(x, self.p, self.training)
        h = h if skip is None else h + skip
        return super().forward(h), h


class FusedNorm(fnn.BatchNorm2d):
    def __init__(self, channels: int, activation: str | None = None) -> None:
        super().__init__(channels, activation=activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x, residual=residual)


class FusedSeam(fnn.DropoutAddLayerNorm):
    def __init__(self, width: int, p: float) -> None:
        super().__init__(width, p=p, prenorm=True)


@dataclass(frozen=True)
class Layers:
    """The makers of what differs: norm(channels, activation), called with (x, residual); seam(width, p): (x, skip)."""

    norm: Callable[..., nn.Module]
    seam: Callable[..., nn.Module]


PLAIN = Layers(PlainNorm, PlainSeam)
FUSED = Layers(FusedNorm, FusedSeam)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the channels, and the shortcut (He et al. 2016, version 1.5)."""

    def __init__(self, layers: Layers, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * channels
        self.reduce = nn.Conv2d(inputs, channels, 1, bias=False)
        self.norm1 = layers.norm(channels, "relu")
        self.conv = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.norm2 = layers.norm(channels, "relu")
        self.expand = nn.Conv2d(channels, outputs, 1, bias=False)
        self.norm3 = layers.norm(outputs, "relu")
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), layers.norm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        y = self.norm2(self.conv(self.norm1(self.reduce(x))))
        return self.norm3(self.expand(y), residual)


class ResNet(nn.Module):
    """ResNet-50 of ImageNet, as the defaults have it. x: ``[N, 3, H, W]``, logits: ``[N, classes]``."""

    def __init__(self, layers: Layers, depths=(3, 4, 6, 3), channels: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.norm = layers.norm(channels, "relu")
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks, inputs = [], channels
        for stage, depth in enumerate(depths):
            width = channels << stage
            for index in range(depth):
                blocks.append(Bottleneck(layers, inputs, width, stride=2 if stage and not index else 1))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.pool(self.norm(self.stem(x))))
        return self.head(y.mean((2, 3)))


class GPTBlock(nn.Module):
    """x + D(attention(norm(x))), then x + D(mlp(norm(x))) (Radford et al. 2019), each dropout at the next norm."""

    def __init__(self, layers: Layers, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads = heads
        self.seam1 = layers.seam(width, p)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.seam2 = layers.seam(width, p)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor]:
        """The branch that the next seam drops and adds, and the stream beside it."""
        y, skip = self.seam1(x, skip)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(y).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y, skip = self.seam2(self.project(attended.transpose(1, 2).flatten(2)), skip)
        return self.down(F.gelu(self.up(y), approximate="tanh")), skip


class GPT(nn.Module):
    """``depth`` blocks between an embedding and a head. tokens: int64 ``[N, T]``, logits ``[N, T, vocabulary]``."""

    def __init__(
        self,
        layers: Layers,
        depth: int = 12,
        width: int = 768,
        heads: int = 12,
        context: int = 1024,
        vocabulary: int = 50304,
        p: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(context, width) * 0.01)
        self.blocks = nn.ModuleList(GPTBlock(layers, width, heads, p) for _ in range(depth))
        self.seam = layers.seam(width, p)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, skip = self.embedding(tokens) + self.positions[: tokens.shape[1]], None
        for block in self.blocks:
            x, skip = block(x, skip)
        return self.head(self.seam(x, skip)[0])

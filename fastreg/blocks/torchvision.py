"""torchvision's layers and blocks. Written for the sources whose hashes stand beside them."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision import ops
from torchvision.models import convnext, densenet, efficientnet, mobilenetv2, mobilenetv3, resnet
from torchvision.models import swin_transformer as swin
from torchvision.models import vision_transformer as vit

from fastreg import functional as F
from fastreg import nn as fnn
from fastreg.blocks import ends, seams
from fastreg.blocks.swap import Seam, Swap, pairs
from fastreg.nn.fused import FusedNorm

# --- layers -----------------------------------------------------------------------------------------------


class StochasticDepth(fnn.DropPath, ops.StochasticDepth):
    """Stochastic depth of samples (mode="row"), which is ``DropPath``."""

    def forward(self, input: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        if self.p < 0.0 or self.p > 1.0:  # torchvision's error, in its words
            ops.stochastic_depth(input, self.p, self.mode, self.training)
        return super().forward(input, bias=bias, residual=residual)

    def __repr__(self) -> str:
        return ops.StochasticDepth.__repr__(self)


def _mode(module: ops.StochasticDepth) -> str | None:
    return None if module.mode == "row" else f"mode={module.mode!r} drops whole batches, which no kernel does"


class FrozenBatchNorm2d(FusedNorm, ops.FrozenBatchNorm2d):
    """Batch normalization whose statistics and parameters are buffers that stay as they are."""

    eps: float
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(norm(x) + residual)."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.batch_norm(
            x.to(dtype),
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            eps=self.eps,
            activation=self.activation,
            residual=residual,
        )


class LayerNorm2d(fnn.LayerNorm, convnext.LayerNorm2d):
    """Layer normalization over the channels of ``[N, C, H, W]``."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(norm(x) + residual)."""
        residual = None if residual is None else residual.permute(0, 2, 3, 1)
        return super().forward(x.permute(0, 2, 3, 1), residual=residual).permute(0, 3, 1, 2)


# --- blocks -----------------------------------------------------------------------------------------------


class BasicBlock(resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        branch = self.relu(self.bn1(self.conv1(x)))
        return seams.norm_add_act(self.bn2, self.relu, self.conv2(branch), skip)


class Bottleneck(resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        return seams.norm_add_act(self.bn3, self.relu, self.conv3(branch), skip)


def _residual(*norms: str) -> list[Seam]:
    """Norms with the block's one ReLU behind each, the last one after the addition."""
    *inner, last = norms
    sum_ = Seam("norm -> add -> activation", (last, "relu"), absorbs=(last, "relu"))
    return [*pairs(*((norm, "relu") for norm in inner)), sum_]


class InvertedResidual(mobilenetv2.InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return seams.sequence_add(self.conv, None, x, x) if self.use_res_connect else self.conv(x)


class MobileNetV3:
    """A namespace for the block of MobileNetV3, which has the name of another block."""

    class InvertedResidual(mobilenetv3.InvertedResidual):
        def forward(self, input: Tensor) -> Tensor:
            if not self.use_res_connect:
                return self.block(input)
            return seams.sequence_add(self.block, None, input, input)


class MBConv(efficientnet.MBConv):
    def forward(self, input: Tensor) -> Tensor:
        if not self.use_res_connect:
            return self.block(input)
        return seams.sequence_add(self.block, self.stochastic_depth, input, input)


class FusedMBConv(efficientnet.FusedMBConv):
    def forward(self, input: Tensor) -> Tensor:
        if not self.use_res_connect:
            return self.block(input)
        return seams.sequence_add(self.block, self.stochastic_depth, input, input)


class CNBlock(convnext.CNBlock):
    def forward(self, input: Tensor) -> Tensor:
        return seams.add(self.stochastic_depth, self.layer_scale * self.block(input), input)


class SwinTransformerBlock(swin.SwinTransformerBlock):
    def forward(self, x: Tensor) -> Tensor:
        x, y = seams.add_norm(self.stochastic_depth, self.attn(self.norm1(x)), x, self.norm2)
        return seams.sequence_add(self.mlp, self.stochastic_depth, y, x)


class SwinTransformerBlockV2(swin.SwinTransformerBlockV2):
    def forward(self, x: Tensor) -> Tensor:
        x = seams.norm_drop_add(self.norm1, self.stochastic_depth, self.attn(x), x)
        return seams.norm_drop_add(self.norm2, self.stochastic_depth, self.mlp(x), x)


class EncoderBlock(vit.EncoderBlock):
    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        y = self.ln_1(input)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x, y = seams.add_norm(self.dropout, y, input, self.ln_2)
        return seams.sequence_add(self.mlp, None, y, x)


def _block_seams(module: Any) -> list[Seam]:
    if not module.use_res_connect:
        return []
    layers, name = (module.conv, "conv") if hasattr(module, "conv") else (module.block, "block")
    last, layer = seams.last_layer(layers, name)
    return ends.layer_end(layer, last, getattr(module, "stochastic_depth", None), "stochastic_depth")


def _swin_seams(module: Any) -> list[Seam]:
    last, layer = seams.last_layer(module.mlp, "mlp")
    return [
        *ends.prenorm(module.stochastic_depth, "stochastic_depth", "norm2"),
        *ends.layer_end(layer, last, module.stochastic_depth, "stochastic_depth"),
        ends.next_norm(),
    ]


def _encoder_seams(module: Any) -> list[Seam]:
    last, layer = seams.last_layer(module.mlp, "mlp")
    return [
        *ends.prenorm(module.dropout, "dropout", "ln_2"),
        *ends.layer_end(layer, last, None, ""),
        ends.next_norm(),
    ]


def _postnorm_seams(module: Any) -> list[Seam]:
    found = []
    for norm in ("norm1", "norm2"):
        found += ends.norm_end(norm, module.stochastic_depth, "stochastic_depth")
    return found


def _convnext_seams(block: Any) -> list[Seam]:
    return ends.plain_end(block.stochastic_depth, "stochastic_depth")


def _block(theirs: type[nn.Module], ours: type[nn.Module] | None, found: Any, **written_for: str) -> Swap:
    hashes = {method: (known,) for method, known in written_for.items()}
    return Swap(theirs, ours, hashes, seams=found, block=True)


SWAPS = [
    Swap(ops.StochasticDepth, StochasticDepth, {"forward": ("8a1a82c99408",)}, _mode),
    Swap(ops.FrozenBatchNorm2d, FrozenBatchNorm2d, {"forward": ("8eae6f60c90d",)}),
    Swap(convnext.LayerNorm2d, LayerNorm2d, {"forward": ("d44d8a0d33b6",)}),
    _block(resnet.ResNet, None, lambda _: pairs(("bn1", "relu")), _forward_impl="ad7fa25a67f8"),
    _block(resnet.BasicBlock, BasicBlock, lambda _: _residual("bn1", "bn2"), forward="a1ef458c00df"),
    _block(resnet.Bottleneck, Bottleneck, lambda _: _residual("bn1", "bn2", "bn3"), forward="e7386993a49b"),
    _block(
        densenet._DenseLayer, None, lambda _: pairs(("norm1", "relu1"), ("norm2", "relu2")),
        forward="600b60b2b0ec", bn_function="e44d5a81d4dc",
    ),
    _block(mobilenetv2.InvertedResidual, InvertedResidual, _block_seams, forward="11ddfcc68000"),
    _block(mobilenetv3.InvertedResidual, MobileNetV3.InvertedResidual, _block_seams, forward="e4c3d8bcbd27"),
    _block(efficientnet.MBConv, MBConv, _block_seams, forward="01bbf9e6efd6"),
    _block(efficientnet.FusedMBConv, FusedMBConv, _block_seams, forward="01bbf9e6efd6"),
    _block(convnext.CNBlock, CNBlock, _convnext_seams, forward="2106744d9612"),
    _block(swin.SwinTransformerBlock, SwinTransformerBlock, _swin_seams, forward="2fe18c0a9f82"),
    _block(swin.SwinTransformerBlockV2, SwinTransformerBlockV2, _postnorm_seams, forward="ce891cb6316a"),
    _block(vit.EncoderBlock, EncoderBlock, _encoder_seams, forward="9c6a6bb672b9"),
]  # fmt: skip

"""timm's layers and blocks. Written for the sources whose hashes stand beside them."""

from typing import Any

from timm import layers
from timm.layers import activations
from timm.models import _efficientnet_blocks as efficientnet
from timm.models import convnext, mlp_mixer, resnet
from timm.models import swin_transformer as swin
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from fastreg import nn as fnn
from fastreg.blocks import ends, seams
from fastreg.blocks.activations import register
from fastreg.blocks.swap import Seam, Swap, pairs
from fastreg.nn.fused import FusedNorm

register(
    {
        activations.GELU: lambda m: "gelu",
        activations.GELUTanh: lambda m: "gelu_tanh",
        activations.Swish: lambda m: "silu",
        activations.Mish: lambda m: "mish",
        activations.HardSwish: lambda m: "hardswish",
        activations.HardSigmoid: lambda m: "hardsigmoid",
        activations.QuickGELU: lambda m: "quick_gelu",
        activations.Sigmoid: lambda m: "sigmoid",
        activations.Tanh: lambda m: "tanh",
    }
)

# --- layers -----------------------------------------------------------------------------------------------


class DropPath(fnn.DropPath, layers.DropPath):
    drop_prob: float | None

    @property
    def p(self) -> float:  # type: ignore[override]  # timm's name of it can be set
        return self.drop_prob or 0.0


def _unscaled(module: layers.DropPath) -> str | None:
    return None if module.scale_by_keep else "scale_by_keep=False"


def _fast(module: Any) -> str | None:
    return "timm's fast norm is switched on" if module._fast_norm else None


class LayerNorm(fnn.LayerNorm, layers.LayerNorm):
    pass


class GroupNorm(fnn.GroupNorm, layers.GroupNorm):
    pass


class GroupNorm1(fnn.GroupNorm, layers.GroupNorm1):
    pass


class _ChannelsLast(fnn.LayerNorm):
    """Layer normalization over the channels of ``[N, C, H, W]``."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(norm(x) + residual)."""
        residual = None if residual is None else residual.permute(0, 2, 3, 1)
        return super().forward(x.permute(0, 2, 3, 1), residual=residual).permute(0, 3, 1, 2)


class LayerNorm2d(_ChannelsLast, layers.LayerNorm2d):
    pass


class _NormAct(FusedNorm):
    """A norm with its activation as a child, which it applies itself where it is fused."""

    drop: nn.Module
    act: nn.Module

    def applies_all(self) -> bool:
        applied = self.activation is not None or type(self.act) is nn.Identity
        return applied and type(self.drop) is nn.Identity and not seams.hooked(self.act, self.drop)

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(norm(x) + residual)."""
        if self.activation is None:
            return self.act(self.drop(super().forward(x, residual=residual)))
        if not seams.hooked(self.act):
            return super().forward(x, residual=residual)
        fused, self.activation = self.activation, None
        try:
            return self.act(super().forward(x, residual=residual))
        finally:
            self.activation = fused


class BatchNormAct2d(_NormAct, fnn.BatchNorm2d, layers.BatchNormAct2d):
    pass


class SyncBatchNormAct(_NormAct, fnn.SyncBatchNorm, layers.SyncBatchNormAct):
    pass


class GroupNormAct(_NormAct, fnn.GroupNorm, layers.GroupNormAct):
    pass


class GroupNorm1Act(_NormAct, fnn.GroupNorm, layers.GroupNorm1Act):
    pass


class LayerNormAct(_NormAct, fnn.LayerNorm, layers.LayerNormAct):
    pass


class LayerNormAct2d(_NormAct, _ChannelsLast, layers.LayerNormAct2d):
    pass


def _bare(module: Any) -> str | None:
    """timm's function for synchronized norms leaves out what is not there."""
    return None if hasattr(module, "act") and hasattr(module, "drop") else "it has no activation"


def _act(module: Any) -> list[Seam]:
    if type(module.act) is nn.Identity:
        return []
    (seam,) = pairs(("", "act"))
    if type(module.drop) is not nn.Identity:
        seam = seam._replace(why_not=f"{type(module.drop).__name__} stands between norm and activation")
    return [seam]


# --- blocks -----------------------------------------------------------------------------------------------


class BasicBlock(resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        branch = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        return _resnet_end(self, self.bn2, self.conv2(branch), skip, self.act2)


class Bottleneck(resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        branch = self.act1(self.bn1(self.conv1(x)))
        branch = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(branch)))))
        return _resnet_end(self, self.bn3, self.conv3(branch), skip, self.act3)


def _resnet_end(block: Any, norm: nn.Module, branch: Tensor, skip: Tensor, act: nn.Module) -> Tensor:
    if block.se is None and block.drop_path is None:
        return seams.norm_add_act(norm, act, branch, skip)
    branch = norm(branch)
    if block.se is not None:
        branch = block.se(branch)
    return act(seams.add(block.drop_path, branch, skip).to(branch.dtype))


def _resnet_seams(*norms: str, dropped: str) -> Any:
    def found(block: Any) -> list[Seam]:
        *inner, last = pairs(*((f"bn{i}", f"act{i}") for i in range(1, len(norms) + 1)))
        blocked = "DropBlock stands between norm and activation"
        found = [
            seam._replace(why_not=blocked)
            if seam.parts[0] == dropped and type(block.drop_block) is not nn.Identity
            else seam
            for seam in inner
        ]
        between = "squeeze and excitation" if block.se is not None else "stochastic depth"
        if block.se is None and block.drop_path is None:
            return [*found, last._replace(kind="norm -> add -> activation")]
        why_not = f"{between} stands between norm and addition"
        seam = Seam("norm -> add -> activation", last.parts, why_not)
        return [*found, seam, *ends.plain_end(block.drop_path, "drop_path")]

    return found


class ConvBnAct(efficientnet.ConvBnAct):
    def forward(self, x: Tensor) -> Tensor:
        branch = self.aa(self.bn1(self.conv(x)))
        return seams.add(self.drop_path, branch, x) if self.has_skip else branch


class DepthwiseSeparableConv(efficientnet.DepthwiseSeparableConv):
    def forward(self, x: Tensor) -> Tensor:
        branch = x if self.conv_s2d is None else self.bn_s2d(self.conv_s2d(x))
        branch = self.se(self.aa(self.bn1(self.conv_dw(branch))))
        return _inverted_end(self, self.bn2, self.conv_pw(branch), x)


class InvertedResidual(efficientnet.InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        branch = x if self.conv_s2d is None else self.bn_s2d(self.conv_s2d(x))
        branch = self.bn1(self.conv_pw(branch))
        branch = self.se(self.aa(self.bn2(self.conv_dw(branch))))
        return _inverted_end(self, self.bn3, self.conv_pwl(branch), x)


class EdgeResidual(efficientnet.EdgeResidual):
    def forward(self, x: Tensor) -> Tensor:
        branch = self.se(self.aa(self.bn1(self.conv_exp(x))))
        return _inverted_end(self, self.bn2, self.conv_pwl(branch), x)


def _is_linear(norm: Any) -> bool:
    """Whether no activation follows the norm, so that an addition behind it may join its pass."""
    return all(type(getattr(norm, name, None)) in (nn.Identity, type(None)) for name in ("act", "drop"))


def _inverted_end(block: Any, norm: nn.Module, branch: Tensor, skip: Tensor) -> Tensor:
    if not block.has_skip:
        return norm(branch)
    if _is_linear(norm):
        return seams.norm_drop_add(norm, block.drop_path, branch, skip)
    return seams.add(block.drop_path, norm(branch), skip)


def _inverted_seams(norm: str) -> Any:
    def found(block: Any) -> list[Seam]:
        if not block.has_skip:
            return []
        if _is_linear(block.get_submodule(norm)):
            return ends.norm_end(norm, block.drop_path, "drop_path")
        return ends.plain_end(block.drop_path, "drop_path")

    return found


class ConvNeXtBlock(convnext.ConvNeXtBlock):
    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv_dw(x)
        if self.use_conv_mlp:
            branch = self.mlp(self.norm(branch))
        else:
            branch = self.mlp(self.norm(branch.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        if self.gamma is not None:
            branch = branch * self.gamma.reshape(1, -1, 1, 1)
        return seams.add(self.drop_path, branch, self.shortcut(x))


class Block(vit.Block):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        branch = self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        x, y = seams.add_norm(self.drop_path1, branch, x, self.norm2)
        return seams.add(self.drop_path2, self.ls2(self.mlp(y)), x)


class ResPostBlock(vit.ResPostBlock):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        branch = self.attn(x, attn_mask=attn_mask, is_causal=is_causal)
        x = seams.norm_drop_add(self.norm1, self.drop_path1, branch, x)
        return seams.norm_drop_add(self.norm2, self.drop_path2, self.mlp(x), x)


class SwinTransformerBlock(swin.SwinTransformerBlock):
    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x, y = seams.add_norm(self.drop_path1, self._attn(self.norm1(x)), x, self.norm2)
        x, y = (t.reshape(shape[0], -1, shape[3]) for t in (x, y))
        return seams.add(self.drop_path2, self.mlp(y), x).reshape(shape)


class MixerBlock(mlp_mixer.MixerBlock):
    def forward(self, x: Tensor) -> Tensor:
        branch = self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x, y = seams.add_norm(self.drop_path, branch, x, self.norm2)
        return seams.add(self.drop_path, self.mlp_channels(y), x)


def _prenorm_seams(first: str, second: str) -> Any:
    def found(block: Any) -> list[Seam]:
        return [
            *ends.prenorm(block.get_submodule(first), first, "norm2"),
            *ends.plain_end(block.get_submodule(second), second),
            ends.next_norm(),
        ]

    return found


_two_drops = _prenorm_seams("drop_path1", "drop_path2")


def _postnorm_seams(block: Any) -> list[Seam]:
    return [
        *ends.norm_end("norm1", block.drop_path1, "drop_path1"),
        *ends.norm_end("norm2", block.drop_path2, "drop_path2"),
    ]


def _mlp_seams(module: Any) -> list[Seam]:
    if not ends.dropping(module.drop1):
        return []
    return [Seam("activation -> dropout", ("act", "drop1"), absorbs=("drop1", "act"))]


def _layer(theirs: type[nn.Module], ours: type[nn.Module], forward: str, **rest: Any) -> Swap:
    return Swap(theirs, ours, {"forward": (forward,)}, **rest)


def _convnext_seams(block: Any) -> list[Seam]:
    return ends.plain_end(block.drop_path, "drop_path")


def _block(theirs: type[nn.Module], ours: type[nn.Module] | None, found: Any, **written_for: str) -> Swap:
    hashes = {method: (known,) for method, known in written_for.items()}
    return Swap(theirs, ours, hashes, seams=found, block=True)


SWAPS = [
    Swap(layers.DropPath, DropPath, {"forward": ("1f365999d6d5",)}, _unscaled),
    _layer(layers.LayerNorm, LayerNorm, "d7a47c1356fd", obstacle=_fast),
    _layer(layers.GroupNorm, GroupNorm, "77c5d8b53bf7", obstacle=_fast),
    _layer(layers.GroupNorm1, GroupNorm1, "5d4199d71444", obstacle=_fast),
    _layer(layers.LayerNorm2d, LayerNorm2d, "977420598e36", obstacle=_fast),
    _layer(layers.BatchNormAct2d, BatchNormAct2d, "84306deb07fc", seams=_act),
    _layer(layers.SyncBatchNormAct, SyncBatchNormAct, "e9d792251791", obstacle=_bare, seams=_act),
    _layer(layers.GroupNormAct, GroupNormAct, "4c0d7e38c9b1", obstacle=_fast, seams=_act),
    _layer(layers.GroupNorm1Act, GroupNorm1Act, "4c0d7e38c9b1", obstacle=_fast, seams=_act),
    _layer(layers.LayerNormAct, LayerNormAct, "d629540fa575", obstacle=_fast, seams=_act),
    _layer(layers.LayerNormAct2d, LayerNormAct2d, "f1c1d1685986", obstacle=_fast, seams=_act),
    _block(layers.Mlp, None, _mlp_seams, forward="5290129212d8"),
    _block(resnet.ResNet, None, lambda _: pairs(("bn1", "act1")), forward_features="bcd9fdc5d770"),
    _block(resnet.BasicBlock, BasicBlock, _resnet_seams("bn1", "bn2", dropped="bn1"), forward="1e6f3f3e7796"),
    _block(
        resnet.Bottleneck,
        Bottleneck,
        _resnet_seams("bn1", "bn2", "bn3", dropped="bn2"),
        forward="345d2e6bded6",
    ),
    _block(
        efficientnet.ConvBnAct,
        ConvBnAct,
        lambda m: ends.plain_end(m.drop_path, "drop_path") if m.has_skip else [],
        forward="90992dbef5c4",
    ),
    _block(
        efficientnet.DepthwiseSeparableConv,
        DepthwiseSeparableConv,
        _inverted_seams("bn2"),
        forward="024f0136b08e",
    ),
    _block(efficientnet.InvertedResidual, InvertedResidual, _inverted_seams("bn3"), forward="82eb86abf111"),
    _block(efficientnet.EdgeResidual, EdgeResidual, _inverted_seams("bn2"), forward="19ef735a01a0"),
    _block(
        convnext.ConvNeXtBlock,
        ConvNeXtBlock,
        lambda m: ends.plain_end(m.drop_path, "drop_path"),
        forward="eb5e07f5b164",
    ),
    _block(vit.Block, Block, _two_drops, forward="eceda86f42cb"),
    _block(vit.ResPostBlock, ResPostBlock, _postnorm_seams, forward="89cbd9b9ec39"),
    _block(
        swin.SwinTransformerBlock,
        SwinTransformerBlock,
        _prenorm_seams("drop_path1", "drop_path2"),
        forward="2536eff4020d",
    ),
    _block(
        mlp_mixer.MixerBlock, MixerBlock, _prenorm_seams("drop_path", "drop_path"), forward="94fbddbf413d"
    ),
]

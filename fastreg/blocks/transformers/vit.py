"""ViT: dropout -> add -> norm behind attention; behind the feed-forward layers the norm is the next block's."""

from typing import Any

from torch import Tensor
from transformers.models.vit import modeling_vit as vit

from fastreg.blocks import ends, seams
from fastreg.blocks.swap import Seam, Swap


class ViTLayer(vit.ViTLayer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        branch, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        x, y = seams.add_norm(self.dropout, branch, hidden_states, self.layernorm_after)
        return seams.add(self.dropout, self.mlp(y), x)


def _seams(module: Any) -> list[Seam]:
    return [
        *ends.prenorm(module.dropout, "dropout", "layernorm_after"),
        *ends.plain_end(module.dropout, "dropout"),
        ends.next_norm(),
    ]


SWAPS = [Swap(vit.ViTLayer, ViTLayer, {"forward": ("6adb1b7a39b9",)}, seams=_seams, block=True)]

"""GPT-2: add -> norm behind attention. Its dropout is inside attention and the feed-forward layers."""

from typing import Any

from torch import Tensor
from transformers.models.gpt2 import modeling_gpt2 as gpt2

from fastreg.blocks import ends, seams
from fastreg.blocks.swap import Seam, Swap


class GPT2Block(gpt2.GPT2Block):
    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Tensor:
        crosses = kwargs.get("encoder_hidden_states") is not None
        if args or crosses or "past_key_values" in kwargs:  # the ways of a call that are not fused
            return super().forward(hidden_states, *args, **kwargs)
        kwargs.pop("encoder_hidden_states", None)
        kwargs.pop("encoder_attention_mask", None)
        branch, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        x, y = seams.add_norm(None, branch, hidden_states, self.ln_2)
        return x + self.mlp(y)


def _seams(module: Any) -> list[Seam]:
    inside = "the dropout is inside the attention"
    return [
        *([Seam("dropout -> add", ("attn.resid_dropout",), inside)] if module.attn.resid_dropout.p else []),
        Seam(ends.SUM_REUSED, ("ln_2",)),
        ends.next_norm(),
    ]


SWAPS = [Swap(gpt2.GPT2Block, GPT2Block, {"forward": ("14ccecbf5e3b",)}, seams=_seams, block=True)]

"""BERT: dropout -> add -> norm behind attention and behind the feed-forward layers, normalized last."""

from typing import Any

from torch import Tensor
from transformers.models.bert import modeling_bert as bert

from fastreg.blocks import seams
from fastreg.blocks.swap import Seam, Swap


class BertSelfOutput(bert.BertSelfOutput):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        branch = self.dense(hidden_states)
        return seams.dropout_add_postnorm(self.dropout, branch, input_tensor, self.LayerNorm)


class BertOutput(bert.BertOutput):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        branch = self.dense(hidden_states)
        return seams.dropout_add_postnorm(self.dropout, branch, input_tensor, self.LayerNorm)


def _seams(module: Any) -> list[Seam]:
    return [Seam("dropout -> add -> norm", ("dropout", "LayerNorm"))]


SWAPS = [
    Swap(bert.BertSelfOutput, BertSelfOutput, {"forward": ("2d4b572f7c26",)}, seams=_seams, block=True),
    Swap(bert.BertOutput, BertOutput, {"forward": ("2d4b572f7c26",)}, seams=_seams, block=True),
]

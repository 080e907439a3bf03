"""The end of a branch that BERT and its relatives share: norm(input_tensor + dropout(dense(hidden_states)))."""

from typing import Any

from torch import Tensor, nn

from fastreg.blocks import seams
from fastreg.blocks.swap import Seam, Swap


class PostNorm(nn.Module):
    """Mixed into a class of transformers, before it."""

    dense: nn.Module
    dropout: nn.Module
    LayerNorm: nn.Module

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        branch = self.dense(hidden_states)
        return seams.dropout_add_postnorm(self.dropout, branch, input_tensor, self.LayerNorm)


def _seams(module: Any) -> list[Seam]:
    return [Seam("dropout -> add -> norm", ("dropout", "LayerNorm"))]


def postnorm(theirs: type[nn.Module], ours: type[nn.Module]) -> Swap:
    return Swap(theirs, ours, {"forward": ("2d4b572f7c26",)}, seams=_seams, block=True)

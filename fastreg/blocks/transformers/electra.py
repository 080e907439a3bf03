"""ELECTRA: dropout -> add -> norm behind attention and behind the feed-forward layers, normalized last."""

from transformers.models.electra import modeling_electra as electra

from fastreg.blocks.transformers.postnorm import PostNorm, postnorm


class ElectraSelfOutput(PostNorm, electra.ElectraSelfOutput):
    pass


class ElectraOutput(PostNorm, electra.ElectraOutput):
    pass


SWAPS = [
    postnorm(electra.ElectraSelfOutput, ElectraSelfOutput),
    postnorm(electra.ElectraOutput, ElectraOutput),
]

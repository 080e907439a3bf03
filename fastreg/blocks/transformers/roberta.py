"""RoBERTa: dropout -> add -> norm behind attention and behind the feed-forward layers, normalized last."""

from transformers.models.roberta import modeling_roberta as roberta

from fastreg.blocks.transformers.postnorm import PostNorm, postnorm


class RobertaSelfOutput(PostNorm, roberta.RobertaSelfOutput):
    pass


class RobertaOutput(PostNorm, roberta.RobertaOutput):
    pass


SWAPS = [
    postnorm(roberta.RobertaSelfOutput, RobertaSelfOutput),
    postnorm(roberta.RobertaOutput, RobertaOutput),
]

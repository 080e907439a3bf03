"""XLM-RoBERTa: dropout -> add -> norm behind attention and behind the feed-forward layers, normalized last."""

from transformers.models.xlm_roberta import modeling_xlm_roberta as xlm_roberta

from fastreg.blocks.transformers.postnorm import PostNorm, postnorm


class XLMRobertaSelfOutput(PostNorm, xlm_roberta.XLMRobertaSelfOutput):
    pass


class XLMRobertaOutput(PostNorm, xlm_roberta.XLMRobertaOutput):
    pass


SWAPS = [
    postnorm(xlm_roberta.XLMRobertaSelfOutput, XLMRobertaSelfOutput),
    postnorm(xlm_roberta.XLMRobertaOutput, XLMRobertaOutput),
]

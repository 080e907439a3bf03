"""BERT: dropout -> add -> norm behind attention and behind the feed-forward layers, normalized last."""

from transformers.models.bert import modeling_bert as bert

from fastreg.blocks.transformers.postnorm import PostNorm, postnorm


class BertSelfOutput(PostNorm, bert.BertSelfOutput):
    pass


class BertOutput(PostNorm, bert.BertOutput):
    pass


SWAPS = [postnorm(bert.BertSelfOutput, BertSelfOutput), postnorm(bert.BertOutput, BertOutput)]

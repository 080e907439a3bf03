"""Whisper: dropout -> add -> norm behind attention, activation -> dropout between the feed-forward layers."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.whisper import modeling_whisper as whisper

from fastreg import functional as F
from fastreg.blocks import ends, seams
from fastreg.blocks.activations import activation_name
from fastreg.blocks.swap import Seam, Swap


def _feed_forward(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    """x + dropout(fc2(dropout(act(fc1(y)))))"""
    y = layer.fc1(y)
    name, p, training = _activation(layer), layer.activation_dropout, layer.training
    if name is None:
        y = layer.activation_fn(y)
    y = F.dropout(y, p, training, activation=name)
    return seams.dropout_add(layer.fc2(y), x, layer.dropout, training)


def _activation(layer: Any) -> str | None:
    """The name of its activation, where that is fused: with a dropout that drops."""
    if not (layer.training and layer.activation_dropout) or seams.hooked(layer.activation_fn):
        return None
    return activation_name(layer.activation_fn)


class WhisperEncoderLayer(whisper.WhisperEncoderLayer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        y = self.self_attn_layer_norm(hidden_states)
        branch, _ = self.self_attn(hidden_states=y, attention_mask=attention_mask, **kwargs)
        x, y = seams.dropout_add_norm(
            branch, hidden_states, self.final_layer_norm, self.dropout, self.training
        )
        x = _feed_forward(self, x, y)
        if x.dtype == torch.float16:
            most = torch.finfo(x.dtype).max - 1000
            x = x.clamp(min=-most, max=most)
        return x


class WhisperDecoderLayer(whisper.WhisperDecoderLayer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        if "past_key_values" in kwargs:  # the former name of cache
            cache = kwargs.pop("past_key_values")
        norm = self.final_layer_norm if encoder_hidden_states is None else self.encoder_attn_layer_norm
        y = self.self_attn_layer_norm(hidden_states)
        branch, _ = self.self_attn(y, cache=cache, attention_mask=attention_mask, **kwargs)
        x, y = seams.dropout_add_norm(branch, hidden_states, norm, self.dropout, self.training)
        if encoder_hidden_states is not None:
            branch, _ = self.encoder_attn(
                y,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                cache=cache,
                **kwargs,
            )
            x, y = seams.dropout_add_norm(branch, x, self.final_layer_norm, self.dropout, self.training)
        return _feed_forward(self, x, y)


def _seams(*norms: str) -> Any:
    def found(module: Any) -> list[Seam]:
        kind = f"dropout -> {ends.SUM_REUSED}" if module.dropout else ends.SUM_REUSED
        found = [Seam(kind, (norm,)) for norm in norms]
        if module.activation_dropout:
            name = activation_name(module.activation_fn)
            why_not = (
                None if name else f"{type(module.activation_fn).__name__} is no activation of the kernels"
            )
            found.append(Seam("activation -> dropout", ("activation_fn",), why_not))
        if module.dropout:
            found.append(Seam("dropout -> add", ("fc2",)))
        return [*found, ends.next_norm()]

    return found


SWAPS = [
    Swap(
        whisper.WhisperEncoderLayer,
        WhisperEncoderLayer,
        {"forward": ("8d35a05207d8",)},
        seams=_seams("final_layer_norm"),
        block=True,
    ),
    Swap(
        whisper.WhisperDecoderLayer,
        WhisperDecoderLayer,
        {"forward": ("6b0085992c10",)},
        seams=_seams("encoder_attn_layer_norm", "final_layer_norm"),
        block=True,
    ),
]

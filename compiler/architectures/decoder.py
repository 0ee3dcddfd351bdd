"""The frame of a decoder-only model: embedding, layers one after the other, a norm, the head.

These modules exist to be traced: attention, masks, experts and the cache are whatever stands in transformers'
registries while `moec.compiler.trace` runs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, MixtralRotaryEmbedding


class Decoder(nn.Module):
    """Tokens to normalised hidden states.

    Args:
        config: with the fields of a ``MixtralConfig``.
        layer: made with the config and the layer's number; called with ``[1, T, H]`` and the keyword arguments of
            attention, it returns ``[1, T, H]``.
        embedding_scale: what the embedding is multiplied by.
    """

    def __init__(self, config: Any, layer: type[nn.Module], embedding_scale: float) -> None:
        super().__init__()
        self.config = config
        self.embedding_scale = embedding_scale
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = MixtralRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, past_key_values: Any) -> Any:
        """``[1, T]`` tokens and positions to ``[1, T, H]``."""
        hidden = self.embed_tokens(input_ids)
        if self.embedding_scale != 1.0:
            hidden = hidden * self.embedding_scale
        mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        options = {
            "attention_mask": mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=None,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
            "position_embeddings": self.rotary_emb(hidden, position_ids),
            "past_key_values": past_key_values,
        }
        for layer in self.layers:
            hidden = layer(hidden, **options)
        return self.norm(hidden)


class CausalModel(PreTrainedModel):  # type: ignore[misc]
    """A decoder and its head; subclasses name the layer, and the scales of both ends."""

    base_model_prefix = "model"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _supports_attention_backend = True
    _can_set_experts_implementation_cached_value = True
    layer: ClassVar[type[nn.Module]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Decoder(config, self.layer, self.embedding_scale(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Any,
        use_cache: bool = True,
    ) -> CausalLMOutputWithPast:
        """``[1, T]`` tokens and positions to logits ``[1, T, V]``."""
        del use_cache  # keys and values always go to the cache
        logits = self.lm_head(self.model(input_ids, position_ids, past_key_values))
        scale = self.output_scale(self.config)
        return CausalLMOutputWithPast(logits=logits if scale == 1.0 else logits * scale)

    @staticmethod
    def embedding_scale(config: Any) -> float:
        """What the embedding is multiplied by."""
        del config
        return 1.0

    @staticmethod
    def output_scale(config: Any) -> float:
        """What the logits are multiplied by."""
        del config
        return 1.0

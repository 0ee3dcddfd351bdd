"""Grok-1 by the release at github.com/xai-org/grok-1, for the tensor names of both of its Hugging Face layouts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from tests.support.references.model import Array, attend, read_checkpoint, rms_norm, rotate, softmax

if TYPE_CHECKING:
    from pathlib import Path

LAYOUTS = {
    "grok-1": {
        "embedding": "model.embed_tokens.weight",
        "last norm": "model.norm.scale",
        "layer": "model.layers.{}.",
        "norms": ("pre_attn_norm.scale", "post_attn_norm.scale", "pre_moe_norm.scale", "post_moe_norm.scale"),
        "attention": tuple(f"attn.{part}_proj.weight" for part in "qkvo"),
        "router": "moe_block.gate.weight",
        "expert": "moe_block.experts.{}.",
    },
    "grok": {
        "embedding": "transformer.in_out_embed.weight",
        "last norm": "transformer.rms_norm.weight",
        "layer": "transformer.decoder_layer.{}.",
        "norms": ("rms_norm.weight", "rms_norm_1.weight", "rms_norm_2.weight", "rms_norm_3.weight"),
        "attention": tuple(f"multi_head_attention.{part}.weight" for part in ("query", "key", "value", "linear")),
        "router": "router.weight",
        "expert": "moe.{}.",
    },
}  # fmt: skip


class Grok:
    """The checkpoint in ``folder``; what is switched off shows that a test would notice."""

    def __init__(self, folder: Path, *, cap: float = 30.0, exact_gelu: bool = False) -> None:
        self.config, self.tensors = read_checkpoint(folder)
        self.names = LAYOUTS[self.config["model_type"]]
        self.cap, self.exact_gelu = cap, exact_gelu

    def logits(self, tokens: list[int]) -> Array:
        """``[T, V]``."""
        config, embedding = self.config, self.tensors[str(self.names["embedding"])]
        x = embedding[tokens] * config["embedding_multiplier_scale"]
        for number in range(config["num_hidden_layers"]):
            x = self._layer(x, str(self.names["layer"]).format(number))
        x = rms_norm(x, self.tensors[str(self.names["last norm"])], config["rms_norm_eps"])
        return x @ embedding.T * config["output_multiplier_scale"]

    def _layer(self, x: Array, prefix: str) -> Array:
        epsilon = self.config["rms_norm_eps"]
        before, after, inner, last = (self.tensors[prefix + name] for name in self.names["norms"])
        x = x + rms_norm(self._attention(rms_norm(x, before, epsilon), prefix), after, epsilon)
        return x + rms_norm(self._experts(rms_norm(x, inner, epsilon), prefix), last, epsilon)

    def _attention(self, x: Array, prefix: str) -> Array:
        query, key, value, output = (self.tensors[prefix + name] for name in self.names["attention"])
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q = rotate((x @ query.T).reshape(len(x), heads, -1), 10000.0)
        k = rotate((x @ key.T).reshape(len(x), groups, -1), 10000.0)
        v = (x @ value.T).reshape(len(x), groups, -1)
        return attend(q, k, v, self.config["attn_output_multiplier"], self.cap) @ output.T

    def _experts(self, x: Array, prefix: str) -> Array:
        share = softmax(x @ self.tensors[prefix + str(self.names["router"])].T)
        result = np.zeros_like(x)
        for row, shares in enumerate(share):
            chosen = np.argsort(-shares)[: self.config["num_experts_per_tok"]]
            for expert in chosen:
                matrices = prefix + str(self.names["expert"]).format(expert)
                gate = self.tensors[f"{matrices}linear.weight"] @ x[row]
                up = self.tensors[f"{matrices}linear_v.weight"] @ x[row]
                down = self.tensors[f"{matrices}linear_1.weight"]
                result[row] += shares[expert] * (down @ (self._gelu(gate) * up))
        return result

    def _gelu(self, x: Array) -> Array:
        """JAX's, which is the approximation unless told otherwise."""
        if self.exact_gelu:
            return 0.5 * x * (1 + np.array([math.erf(value) for value in x / math.sqrt(2)]))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

"""Snowflake Arctic by the model card's description of its dense-MoE hybrid layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.support.references.model import Array, attend, read_checkpoint, rms_norm, rotate, softmax

if TYPE_CHECKING:
    from pathlib import Path


class Arctic:
    """The checkpoint in ``folder``; ``late``: experts read what attention has made, as in other models."""

    def __init__(self, folder: Path, *, late: bool = False) -> None:
        self.config, self.tensors = read_checkpoint(folder)
        self.late = late

    def logits(self, tokens: list[int]) -> Array:
        """``[T, V]``."""
        x = self.tensors["model.embed_tokens.weight"][tokens]
        for number in range(self.config["num_hidden_layers"]):
            x = self._layer(x, number)
        return self._norm(x, "model.norm") @ self.tensors["lm_head.weight"].T

    def _layer(self, x: Array, number: int) -> Array:
        layer = f"model.layers.{number}"
        routed = (number + 1) % self.config["moe_layer_frequency"] == 0
        attended = x + self._attention(self._norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
        if not routed:
            inner = self._norm(attended, f"{layer}.post_attention_layernorm")
            return attended + self._network(inner, f"{layer}.block_sparse_moe.mlp")
        if not self.config["parallel_attn_mlp_res"]:
            inner = self._norm(attended, f"{layer}.post_attention_layernorm")
            return attended + self._experts(inner, f"{layer}.block_sparse_moe")
        dense = self._network(self._norm(attended, f"{layer}.residual_layernorm"), f"{layer}.residual_mlp")
        source = attended if self.late else x
        inner = self._norm(source, f"{layer}.post_attention_layernorm")
        return attended + dense + self._experts(inner, f"{layer}.block_sparse_moe")

    def _attention(self, x: Array, prefix: str) -> Array:
        query, key, value, output = (self.tensors[f"{prefix}.{part}_proj.weight"] for part in "qkvo")
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q = rotate((x @ query.T).reshape(len(x), heads, -1), self.config["rope_theta"])
        k = rotate((x @ key.T).reshape(len(x), groups, -1), self.config["rope_theta"])
        v = (x @ value.T).reshape(len(x), groups, -1)
        return attend(q, k, v, q.shape[-1] ** -0.5) @ output.T

    def _experts(self, x: Array, prefix: str) -> Array:
        share = softmax(x @ self.tensors[f"{prefix}.gate.weight"].T)
        result = np.zeros_like(x)
        for row, shares in enumerate(share):
            chosen = np.argsort(-shares)[: self.config["num_experts_per_tok"]]
            for expert in chosen:
                output = self._network(x[row : row + 1], f"{prefix}.experts.{expert}")
                result[row] += shares[expert] / shares[chosen].sum() * output[0]
        return result

    def _network(self, x: Array, prefix: str) -> Array:
        gate, down, up = (self.tensors[f"{prefix}.w{number}.weight"] for number in (1, 2, 3))
        inner = x @ gate.T
        return inner / (1 + np.exp(-inner)) * (x @ up.T) @ down.T

    def _norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self.tensors[f"{name}.weight"], self.config["rms_norm_eps"])

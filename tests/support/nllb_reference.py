"""NLLB-MoE written from its description, not from transformers' code, whose 5.23 runs the wrong experts.

A pre-norm transformer (arXiv 2207.04672, section 6.2; fairseq's ``moe`` models): sinusoidal positions after the padding
index, ReLU feed-forward layers, and in every ``sparse_step``-th layer top-2 routing in float32 with weights that sum
to 1, each expert's result times ``1 - moe_token_dropout``. An expert takes ``moe_eval_capacity_token_fraction`` of the
tokens of a call, first choices before second ones (GShard, arXiv 2006.16668); published models have 1, which never
binds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import layer_norm, linear, relu, softmax

Choice = Callable[[torch.Tensor], list[tuple[int, float]]]


def published(probabilities: torch.Tensor) -> list[tuple[int, float]]:
    """The two likeliest experts, weights normalised."""
    weight, expert = torch.topk(probabilities, 2)
    return list(zip(expert.tolist(), (weight / weight.sum()).tolist(), strict=True))


def as_transformers_5(probabilities: torch.Tensor) -> list[tuple[int, float]]:
    """What transformers 5.23 runs: expert 1 with the first weight and expert 0 with the second, whoever was chosen."""
    (_, first), (_, second) = published(probabilities)
    return [(1, first), (0, second)]


@dataclass
class NllbReference:
    """The model of a state dict with transformers' names.

    Args:
        state: tensors of one type, in which it computes.
        config: the checkpoint's.
        choose: from a token's probabilities ``[E]`` to experts and weights.
    """

    state: dict[str, torch.Tensor]
    config: Any
    choose: Choice = published

    def logits(self, source: list[int], tokens: list[int]) -> torch.Tensor:
        """Logits ``[T, V]`` of a decoder's tokens for one source."""
        encoded = self._stack("encoder", source, None)
        decoded = self._stack("decoder", tokens, encoded)
        return linear(decoded, self.state["model.shared.weight"])

    def greedy(self, source: list[int], count: int, forced: int | None = None) -> list[int]:
        """The likeliest continuation, from the model's start token."""
        tokens = [self.config.decoder_start_token_id]
        for number in range(count):
            best = int(self.logits(source, tokens)[-1].argmax())
            tokens.append(forced if forced is not None and number == 0 else best)
        return tokens

    def _stack(self, side: str, tokens: list[int], encoded: torch.Tensor | None) -> torch.Tensor:
        scale = math.sqrt(self.config.d_model) if self.config.scale_embedding else 1.0
        embedded = scale * self.state["model.shared.weight"][tokens]
        x = embedded + self._positions(len(tokens)).to(embedded.dtype)
        step = getattr(self.config, f"{side}_sparse_step")
        for number in range(getattr(self.config, f"{side}_layers")):
            name = f"model.{side}.layers.{number}"
            normed = self._norm(x, f"{name}.self_attn_layer_norm")
            x = x + self._attention(f"{name}.self_attn", normed, normed, causal=encoded is not None)
            if encoded is not None:
                normed = self._norm(x, f"{name}.cross_attention_layer_norm")
                x = x + self._attention(f"{name}.cross_attention", normed, encoded, causal=False)
            normed = self._norm(x, f"{name}.ff_layer_norm")
            sparse = (number + 1) % step == 0
            x = x + (self._experts(f"{name}.ffn", normed) if sparse else self._dense(f"{name}.ffn", normed))
        return self._norm(x, f"model.{side}.layer_norm")

    def _positions(self, count: int) -> torch.Tensor:
        half = self.config.d_model // 2
        frequency = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
        place = torch.arange(self.config.pad_token_id + 1, self.config.pad_token_id + 1 + count).float()
        angle = place[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], -1)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def _attention(self, name: str, x: torch.Tensor, keys: torch.Tensor, *, causal: bool) -> torch.Tensor:
        heads = self.config.decoder_attention_heads
        size = x.shape[-1] // heads
        q, k, v = (
            self._linear(item, f"{name}.{kind}_proj").view(-1, heads, size).transpose(0, 1)
            for kind, item in (("q", x), ("k", keys), ("v", keys))
        )
        scores = q @ k.mT / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        return self._linear((softmax(scores, -1) @ v).transpose(0, 1).flatten(1), f"{name}.out_proj")

    def _dense(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._linear(relu(self._linear(x, f"{name}.fc1")), f"{name}.fc2")

    def _experts(self, name: str, x: torch.Tensor) -> torch.Tensor:
        probabilities = softmax(self._linear(x, f"{name}.router.classifier"), -1)
        chosen = [self.choose(chances) for chances in probabilities]
        result = torch.zeros_like(x)
        for token, (row, kept) in enumerate(zip(x, self._kept(chosen), strict=True)):
            for expert, weight in kept:
                result[token] += weight * self._dense(f"{name}.experts.expert_{expert}", row)
        left: torch.Tensor = result * (1 - float(self.config.moe_token_dropout))
        return left

    def _kept(self, chosen: list[list[tuple[int, float]]]) -> list[list[tuple[int, float]]]:
        """Without the choices of a call that an expert has no room for; weights that are left sum to 1 again or not."""
        share = float(self.config.moe_eval_capacity_token_fraction)
        if share >= 1:
            return chosen
        room = Counter(dict.fromkeys(range(self.config.num_experts), math.ceil(share * len(chosen))))
        kept: list[dict[int, float]] = [{} for _ in chosen]
        for choice in range(2):
            for token, pairs in enumerate(chosen):
                expert, weight = pairs[choice]
                if room[expert] > 0:
                    kept[token][expert] = weight
                room[expert] -= 1
        if self.config.normalize_router_prob_before_dropping:
            return [list(own.items()) for own in kept]
        return [[(expert, w / sum(own.values())) for expert, w in own.items()] for own in kept]

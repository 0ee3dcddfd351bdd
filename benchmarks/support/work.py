"""What an end-to-end run does, and the least time that it can take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from moec.artifacts.footprint import dense_weights, footprint
from moec.artifacts.model import DTYPE_BYTES, ModelRecord
from moec.artifacts.steps import AttentionStep, SegmentStep
from moec.cli.bench import run_batch

if TYPE_CHECKING:
    from moec.artifacts.footprint import LayerFootprint
    from moec.runtime import Model


@dataclass(frozen=True)
class Work:
    """``batch`` sequences at once, each with a prompt and a continuation."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt_tokens}+{self.new_tokens}"


def run_work(model: Model, work: Work) -> tuple[float, list[float]]:
    """Seconds of the prefill, and of each decoding step."""
    return run_batch(model.engine, model.record.vocab_size, work.prompt_tokens, work.new_tokens, work.batch)


class WorkType(click.ParamType):  # type: ignore[type-arg]
    """``8x512+64``: 8 sequences of 512 tokens each, continued by 64."""

    name = "work"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Work:
        """Parse it."""
        if isinstance(value, Work):
            return value
        match = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", value)
        if match is None:
            self.fail(f"{value!r} is not like 8x512+64", param, ctx)
        return Work(*(int(group) for group in match.groups()))


def distinct_experts(layer: LayerFootprint, batch: int) -> float:
    """Experts of a layer that ``batch`` tokens choose together, expected of uniform routing."""
    return layer.experts * (1 - (1 - layer.top_k / layer.experts) ** batch)


def decode_bytes(model: ModelRecord, batch: int) -> float:
    """Weights that a decode step of ``batch`` sequences reads: dense ones once, each chosen expert once."""
    facts = footprint(model)
    experts = sum(distinct_experts(layer, batch) * layer.expert_bytes for layer in facts.layers)
    return facts.dense_bytes_per_token + experts


def prefill_flops(model: ModelRecord, tokens: int) -> float:
    """Multiplications and additions of a prompt: matrices, chosen experts, causal attention; one row of logits.

    Latents are attended to as the heads that they stand for: what that takes is least, their expansion included.
    """
    return 2.0 * (tokens * _matrix_values(model) + _last_values(model)) + attention_flops(model, tokens)


def _matrix_values(model: ModelRecord) -> float:
    """Values of the matrices that every token meets before the last steps."""
    return _segment_values(model, 0, model.last_step) + sum(
        layer.top_k * layer.expert_bytes / DTYPE_BYTES[model.dtype] for layer in footprint(model).layers
    )


def _last_values(model: ModelRecord) -> float:
    return _segment_values(model, model.last_step, len(model.steps))


def _segment_values(model: ModelRecord, first: int, last: int) -> float:
    weights, total = dense_weights(model), 0.0
    for step in model.steps[first:last]:
        if not isinstance(step, SegmentStep):
            continue
        for name in step.weights:
            spec = weights[name]
            looked_up = "tokens" in step.inputs and spec.shape[0] == model.vocab_size
            if len(spec.shape) > 1 and not looked_up:
                size = 1
                for extent in spec.shape:
                    size *= int(extent)
                total += size
    return total


def attention_flops(model: ModelRecord, tokens: int) -> float:
    """Of scores and weighted values, which a causal mask halves, and of expanding latents."""
    specs = {spec.name: spec for spec in model.attentions}
    total = 0.0
    for step in model.steps:
        if isinstance(step, AttentionStep):
            spec = specs[step.attention]
            reach = min(tokens, spec.window or tokens, spec.chunk or tokens)
            pairs = reach * (reach + 1) / 2 + (tokens - reach) * reach
            total += 2 * pairs * spec.query_heads * (spec.query_dim + spec.result_dim)
            if spec.heads is not None:
                width = spec.heads.nope_dim + spec.heads.value_dim
                total += 2 * tokens * spec.query_heads * spec.value_dim * width
    return total

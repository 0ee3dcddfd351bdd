"""What a step of many tokens has to do: operations of its products and attention, bytes of the rows between them.

An operation is a multiplication or an addition. Weights and their bytes are in `moec.artifacts.layout.footprint`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.layout.chain import step_values
from moec.artifacts.layout.footprint import VALUE_BYTES, looked_up, tensor_bytes
from moec.artifacts.steps import AttentionStep, SegmentStep

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moec.artifacts.model import AttentionSpec, ExpertBody, ModelRecord, TensorSpec
    from moec.artifacts.steps import Step

OPERAND_BYTES = 2
"""What enters products of many tokens is rounded to 16 bits."""
PASSES = 2
"""What is made for experts, or of latents, is written and read again; it is more than caches hold."""


@dataclass(frozen=True)
class Products:
    """Operations for one token, by how the weights are stored."""

    plain: int
    quantized: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.plain + self.quantized


@dataclass(frozen=True)
class LayerWork:
    """One MoE layer, for one of a token's choices."""

    top_k: int
    products: Products
    row_bytes: int
    """The gathered input, what lies between the two products, and the result."""


@dataclass(frozen=True)
class StepWork:
    """A model."""

    layers: tuple[LayerWork, ...]
    dense: Products
    """Outside routed experts, before the last steps."""
    row_bytes: int
    """For one token: values of the chain, and results of products within segments, moved once: they are read where they
    were written, in the second-level cache."""
    last_operations: int
    """Of one row whose logits are wanted."""
    last_bytes: int
    """Weights that such rows meet."""
    attentions: tuple[AttentionSpec, ...]
    """Of each layer that has one."""

    def operations(self, tokens: int) -> float:
        """Of a prompt of so many tokens, of which one row has its logits wanted."""
        routed = sum(layer.top_k * layer.products.total for layer in self.layers)
        return tokens * (self.dense.total + routed) + self.last_operations + self.attention_operations(tokens)

    def attention_operations(self, tokens: int) -> float:
        """Of a prompt of so many tokens, the expansion of its latents included."""
        return sum(attention_operations(spec, tokens) for spec in self.attentions)

    def expanded_bytes(self, tokens: int) -> float:
        """Keys and values that latents were expanded to."""
        widths = (
            spec.query_heads * (spec.heads.nope_dim + spec.heads.value_dim)
            for spec in self.attentions
            if spec.heads is not None
        )
        return PASSES * OPERAND_BYTES * tokens * sum(widths)


def step_work(model: ModelRecord) -> StepWork:
    """Add up what a token of ``model`` takes; a prompt goes through both chains of an encoder-decoder."""
    specs = {spec.name: spec for spec in model.attentions}
    bodies = {body.name: body for body in model.bodies}
    before, last = (*model.steps[: model.last_step], *model.encoder), model.steps[model.last_step :]
    matrices = [spec for step in before for spec in _matrices(model, step)]
    last_matrices = [spec for step in last for spec in _matrices(model, step)]
    outputs = [model.values[value] for step in before for value in step_values(step)[1]]
    results = sum(math.prod(int(extent) for extent in spec.shape[:-1]) for spec in matrices)
    return StepWork(
        layers=tuple(_layer_work(bodies[layer.body], layer.top_k) for layer in model.experts),
        dense=_products(matrices),
        row_bytes=sum(map(tensor_bytes, outputs)) + VALUE_BYTES * results,
        last_operations=sum(map(_operations, last_matrices)),
        last_bytes=sum(map(tensor_bytes, last_matrices)),
        attentions=tuple(
            specs[step.attention] for step in model.all_steps if isinstance(step, AttentionStep)
        ),
    )


def attention_operations(spec: AttentionSpec, tokens: int) -> float:
    """Of scores and weighted values of one layer, which a causal mask halves, and of expanding latents.

    Latents are attended to as the heads that they stand for: what that takes is least.
    """
    reach = min(tokens, spec.window or tokens, spec.chunk or tokens)
    pairs = reach * (reach + 1) / 2 + (tokens - reach) * reach if spec.causal else tokens * tokens
    total = 2 * pairs * spec.query_heads * (spec.query_dim + spec.result_dim)
    if spec.heads is not None:
        width = spec.heads.nope_dim + spec.heads.value_dim
        total += 2 * tokens * spec.query_heads * spec.value_dim * width
    return total


def expert_values(body: ExpertBody) -> int:
    """Elements of an expert's matrices."""
    return (3 if body.gated else 2) * body.hidden * body.intermediate


def _layer_work(body: ExpertBody, top_k: int) -> LayerWork:
    operations = 2 * expert_values(body)
    operands = OPERAND_BYTES * (body.hidden + body.intermediate)
    return LayerWork(
        top_k,
        Products(0, operations) if body.format else Products(operations, 0),
        PASSES * (operands + VALUE_BYTES * body.hidden),
    )


def _matrices(model: ModelRecord, step: Step) -> Iterator[TensorSpec]:
    """The weights that a step's tokens are multiplied with; of an embedding table a row is taken."""
    if not isinstance(step, SegmentStep):
        return
    function = next(function for function in model.functions if function.name == step.function)
    for spec in function.weights:
        if len(spec.shape) > 1 and not looked_up(model, step, spec):
            yield spec


def _products(matrices: Sequence[TensorSpec]) -> Products:
    return Products(
        sum(_operations(spec) for spec in matrices if spec.format is None),
        sum(_operations(spec) for spec in matrices if spec.format is not None),
    )


def _operations(spec: TensorSpec) -> int:
    return 2 * math.prod(int(extent) for extent in spec.shape)

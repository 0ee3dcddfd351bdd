"""A chain, run by torch in plain sight: no TVM, no paging, one expert at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moec.artifacts.model import AttentionSpec
from moec.artifacts.states import state_shape
from moec.artifacts.steps import (
    AttentionStep,
    ExpertsStep,
    LatentWeights,
    SegmentStep,
    SelectionStep,
    StateStep,
)
from moec.compiler.activation import activate
from moec.compiler.calibration.attention import attend, expand_latents
from moec.compiler.kernels.reference import advance, select
from moec.compiler.packing.tensors.recipes import evaluate

if TYPE_CHECKING:
    from moec.compiler.partition import PartitionedModel


@dataclass
class Sequence:
    """Tokens of one sequence so far, its keys and values by attention layer, and its states by their layer."""

    length: int = 0
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    states: dict[int, Any] = field(default_factory=dict)
    indexes: dict[int, torch.Tensor] = field(default_factory=dict)
    """Index keys by the layer that selects."""


class TorchChain:
    """Runs the steps of a partitioned model on the weights of the transformers model it was made from.

    Args:
        parts: the chain.
        model: a transformers model of the same config, of any dtype.
        exact_cache: keep keys and values in float32 whatever the chain's dtype.
    """

    def __init__(self, parts: PartitionedModel, model: torch.nn.Module, *, exact_cache: bool = False) -> None:
        self.parts = parts
        self._exact_cache = exact_cache
        self._state = model.state_dict()
        self._weights = {item.name: evaluate(item, self._load) for item in parts.packing.dense}
        self._attentions = {spec.name: spec for spec in parts.model.attentions}
        self._states = {spec.name: spec for spec in parts.model.states}
        self._bodies = {body.name: body for body in parts.model.bodies}

    def step(self, batch: list[tuple[Sequence, list[int]]], rows: list[int] | None = None) -> torch.Tensor:
        """Append new tokens to each sequence, all flattened into one step.

        Args:
            batch: each sequence with its new tokens.
            rows: flat indices of the tokens whose logits are wanted; all by default.

        Returns:
            Logits ``[rows, V]``.
        """
        positions = [sequence.length + i for sequence, new in batch for i in range(len(new))]
        values: dict[str, torch.Tensor] = {
            "tokens": torch.tensor([[token for _, new in batch for token in new]]),
            "positions": torch.tensor([positions]),
        }
        for number, step in enumerate(self.parts.model.steps):
            if number == self.parts.model.last_step and rows is not None:
                values = {name: self._rows(name, value, rows) for name, value in values.items()}
            if isinstance(step, SegmentStep):
                self._segment(step, values)
            elif isinstance(step, AttentionStep):
                values[step.output] = self._attention(step, values, batch)
            elif isinstance(step, SelectionStep):
                values[step.output] = self._select(step, values, batch)
            elif isinstance(step, StateStep):
                values[step.output] = self._advance(step, values, batch)
            else:
                assert isinstance(step, ExpertsStep), "it runs decoders only"
                values[step.output] = self._experts(step, values)
        for sequence, new in batch:
            sequence.length += len(new)
        return values["logits"][0]

    def _load(self, source: str) -> torch.Tensor:
        if source.startswith("constant:"):
            return self.parts.constants[source.removeprefix("constant:")]
        return self._parameter(source)

    def _parameter(self, name: str) -> torch.Tensor:
        """As packing reads it from the checkpoint."""
        found: torch.Tensor = self._state[name]
        return found.to(getattr(torch, self.parts.packing.parameter_dtypes[name]))

    def _rows(self, name: Any, value: torch.Tensor, rows: list[int]) -> torch.Tensor:
        shape = self.parts.model.values[name].shape
        return value.index_select(shape.index("T"), torch.tensor(rows))

    def _segment(self, step: SegmentStep, values: dict[str, torch.Tensor]) -> None:
        module = self.parts.functions[step.function].graph_module
        weights = [self._weights[name] for name in step.weights]
        outputs = module(*(values[name].contiguous() for name in step.inputs), *weights)
        for name, output in zip(step.outputs, outputs, strict=True):
            spec = self.parts.model.values[name]
            assert output.dtype == getattr(torch, spec.dtype), name
            assert output.dtype in (torch.float32, torch.int64), f"{name}: graphs compute in float32"
            assert len(output.shape) == len(spec.shape), name
            values[name] = output

    def _attention(
        self, step: AttentionStep, values: dict[str, torch.Tensor], batch: list[tuple[Sequence, list[int]]]
    ) -> torch.Tensor:
        spec, layer = self._attentions[step.attention], step.layer
        assert step.key is not None
        query, key = values[step.query][0], values[step.key][0]
        value = key[..., : spec.value_dim] if step.value is None else values[step.value][0]
        sinks = None if step.sinks is None else self._weights[step.sinks]
        if not self._exact_cache:
            key, value = (item.to(getattr(torch, spec.dtype)) for item in (key, value))
        results, begin = [], 0
        for sequence, new in batch:
            end = begin + len(new)
            if layer in sequence.keys:
                sequence.keys[layer] = torch.cat([sequence.keys[layer], key[begin:end]])
                sequence.values[layer] = torch.cat([sequence.values[layer], value[begin:end]])
            else:
                sequence.keys[layer], sequence.values[layer] = key[begin:end], value[begin:end]
            k, v = sequence.keys[layer], sequence.values[layer]
            alone, k, v = (spec, k, v) if step.weights is None else self._expand(spec, step.weights, k)
            chosen = None if step.selection is None else values[step.selection][begin:end]
            results.append(attend(alone, query[begin:end], k, v, sinks, chosen))
            begin = end
        return torch.cat(results)[None]

    def _select(
        self, step: SelectionStep, values: dict[str, torch.Tensor], batch: list[tuple[Sequence, list[int]]]
    ) -> torch.Tensor:
        """Which positions each token sees, ``[T, max_context]``; the kernels' has them as bits."""
        spec = next(spec for spec in self.parts.model.selections if spec.name == step.selection)
        query, weight, key = (values[name][0] for name in (step.query, step.weight, step.key))
        if not self._exact_cache:
            key = key.to(getattr(torch, spec.dtype))
        result = torch.zeros(len(query), self.parts.model.max_context, dtype=torch.bool)
        begin = 0
        for sequence, new in batch:
            end = begin + len(new)
            before = sequence.indexes.get(step.layer, key[:0])
            sequence.indexes[step.layer] = torch.cat([before, key[begin:end]])
            keys = sequence.indexes[step.layer].double().numpy()
            for token in range(begin, end):
                position = sequence.length + token - begin
                asked, weighed = (each[token].double().numpy() for each in (query, weight))
                result[token, : position + 1] = torch.from_numpy(select(spec, asked, weighed, keys, position))
            begin = end
        return result

    def _advance(
        self, step: StateStep, values: dict[str, torch.Tensor], batch: list[tuple[Sequence, list[int]]]
    ) -> torch.Tensor:
        spec = self._states[step.state]
        inputs = [values[name][0].double().numpy() for name in step.inputs]
        weights = [self._weights[name].double().numpy() for name in step.weights]
        results: list[Any] = []
        for sequence, new in batch:
            state = sequence.states.get(step.layer, np.zeros(state_shape(spec)))
            for number in range(len(new)):
                token = len(results)
                own = [each[token] for each in inputs]
                state, result = advance(spec, state, sequence.length + number, own, weights)
                results.append(result)
            sequence.states[step.layer] = state
        return torch.from_numpy(np.stack(results)).float()[None]

    def _expand(
        self, spec: AttentionSpec, weights: LatentWeights, key: torch.Tensor
    ) -> tuple[AttentionSpec, torch.Tensor, torch.Tensor]:
        """What cached latents ``[all, 1, Dk]`` stand for: the attention of their heads, keys, values."""
        absorb, expand, project = (
            self._weights[name].float() for name in (weights.absorb, weights.expand, weights.value)
        )
        assert torch.equal(absorb, expand.transpose(1, 2))
        return expand_latents(spec, key, expand, project)

    def _experts(self, step: ExpertsStep, values: dict[str, torch.Tensor]) -> torch.Tensor:
        layer, source = self.parts.model.experts[step.layer], self.parts.packing.experts[step.layer]
        body = self._bodies[layer.body]
        x, index, weight = values[step.hidden], values[step.index], values[step.weight]
        assert index.shape[1] == layer.top_k
        result = torch.zeros(x.shape, dtype=torch.float32)
        for expert in sorted(set(index.flatten().tolist())):
            assert 0 <= expert < layer.experts
            up, down = (self._parameter(name)[expert].float() for name in (source.up, source.down))
            if source.transposed:
                up, down = up.T, down.T
            hidden = x @ up.T
            if source.up_bias is not None:
                hidden = hidden + self._parameter(source.up_bias)[expert]
            variables = {"up": hidden}
            if body.gated:
                gate, own = (hidden[:, ::2], hidden[:, 1::2]) if source.interleaved else hidden.chunk(2, -1)
                variables = {"gate": gate, "up": own}
            assert variables["up"].shape[1] == body.intermediate
            output = activate(body.activation, variables) @ down.T
            if source.down_bias is not None:
                output = output + self._parameter(source.down_bias)[expert]
            token, choice = torch.where(index == expert)
            result[token] += output[token] * weight[token, choice, None]
        return result

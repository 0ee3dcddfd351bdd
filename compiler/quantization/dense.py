"""Formats of the weights outside routed experts: of tensors, of functions, and of the graphs behind these."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moec.artifacts.steps import SegmentStep
from moec.compiler.packing.dense_reader import CONSTANT, parameters_of
from moec.compiler.quantization.graphs import quantize_graph
from moec.compiler.quantization.roles import weight_roles

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moec.artifacts.ids import TensorName
    from moec.artifacts.model import FunctionSpec, TensorSpec
    from moec.artifacts.packing import DenseTensor, PackingRecord
    from moec.artifacts.quantization import Quantization
    from moec.artifacts.steps import Step
    from moec.compiler.partition import PartitionedModel
    from moec.compiler.partition.records import SegmentGraph


LEAST = 32
"""Rows or columns of the smallest matrix that is quantized: there is nothing to gain from smaller ones."""


def quantize_dense(
    parts: PartitionedModel, policy: Quantization, kept: Mapping[str, str]
) -> PartitionedModel:
    """Give dense weights their formats; functions that were equal are several where their weights' formats differ."""
    formats = _formats(parts, policy, kept)
    if not formats:
        return parts
    packing = _packing(parts.packing, formats)
    tensors = {tensor.name: tensor.spec for tensor in packing.dense}
    known = {spec.name: spec for spec in parts.model.functions}
    variants: dict[tuple[str, tuple[TensorSpec, ...]], FunctionSpec] = {}
    graphs: dict[str, SegmentGraph] = {}

    def changed(step: Step) -> Step:
        if not isinstance(step, SegmentStep):
            return step
        before = known[step.function]
        weights = tuple(
            tensors[name] if name in formats else spec
            for name, spec in zip(step.weights, before.weights, strict=True)
        )
        if (step.function, weights) not in variants:
            others = sum(name == step.function for name, _ in variants)
            name = f"{step.function}_{others}" if others else step.function
            spec = variants[step.function, weights] = replace(before, name=name, weights=weights)
            graphs[name] = quantize_graph(parts.functions[step.function], spec)
        return replace(step, function=variants[step.function, weights].name)

    steps, encoder = tuple(map(changed, parts.model.steps)), tuple(map(changed, parts.model.encoder))
    functions = tuple(variants.values())
    model = replace(parts.model, functions=functions, steps=steps, encoder=encoder)
    return replace(parts, model=model, functions=graphs, packing=packing)


def _formats(parts: PartitionedModel, policy: Quantization, kept: Mapping[str, str]) -> dict[TensorName, str]:
    """The format of each tensor that has one; what is made of constants alone has no name to go by."""
    tensors = {tensor.name: tensor for tensor in parts.packing.dense}
    found: dict[TensorName, str] = {}
    for name, role in weight_roles(parts).items():
        sources = parameters_of(tensors[name])
        own = kept.get(sources[0]) if sources and not tensors[name].steps else None
        kind = policy.format_for(sources[0], role, own) if sources else None
        if kind is not None and min(tensors[name].shape) >= LEAST:
            found[name] = kind
    return found


def _packing(packing: PackingRecord, formats: dict[TensorName, str]) -> PackingRecord:
    """What is only quantized is read in float32: nothing is lost on the way to its codes."""
    kept = {name for tensor in packing.dense if tensor.name not in formats for name in parameters_of(tensor)}
    wide = {
        name for tensor in packing.dense if tensor.name in formats for name in parameters_of(tensor)
    } - kept

    def quantized(tensor: DenseTensor) -> DenseTensor:
        if tensor.name not in formats:
            return tensor
        exact = all(source in wide or source.startswith(CONSTANT) for source in tensor.sources)
        return replace(tensor, format=formats[tensor.name], dtype="float32" if exact else tensor.dtype)

    return replace(
        packing,
        dense=tuple(map(quantized, packing.dense)),
        parameter_dtypes=packing.parameter_dtypes | dict.fromkeys(wide, "float32"),
    )

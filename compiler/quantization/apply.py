"""A policy applied to a partitioned model: its records say the format of each weight from here on."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from moec.compiler.quantization.dense import quantize_dense

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moec.artifacts.model import ExpertBody, ModelRecord
    from moec.artifacts.packing import ExpertSource
    from moec.artifacts.quantization import Quantization
    from moec.compiler.partition import PartitionedModel


def quantize(
    parts: PartitionedModel, policy: Quantization, kept: Mapping[str, str] = MappingProxyType({})
) -> PartitionedModel:
    """Give every weight the format that ``policy`` has for it; ``kept`` is what `kept_formats` found.

    MoE layers of equal experts in different formats have different bodies afterwards.
    """
    dense = quantize_dense(parts, policy, kept)
    packing = replace(dense.packing, quantization=policy)
    return replace(dense, model=_with_experts(dense.model, packing.experts, policy, kept), packing=packing)


def has_formats(parts: PartitionedModel) -> bool:
    """Whether any weight is quantized."""
    formats = [body.format for body in parts.model.bodies]
    return any((*formats, *(tensor.format for tensor in parts.packing.dense)))


def _with_experts(
    model: ModelRecord, sources: tuple[ExpertSource, ...], policy: Quantization, kept: Mapping[str, str]
) -> ModelRecord:
    """The name that rules are held against is that of the layer's down matrices: all of an expert has one format."""
    known = {body.name: body for body in model.bodies}
    downs = {source.layer: source.down for source in sources}
    bodies: dict[ExpertBody, ExpertBody] = {}
    layers = []
    for layer in model.experts:
        down = downs[layer.layer]
        kind = policy.format_for(down, "experts", kept.get(down))
        unnamed = replace(known[layer.body], name="", format=kind)
        body = bodies.setdefault(unnamed, replace(unnamed, name=f"body_{len(bodies)}"))
        layers.append(replace(layer, body=body.name))
    return replace(model, bodies=tuple(bodies.values()), experts=tuple(layers))

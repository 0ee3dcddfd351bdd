"""What of a model gets a format of its own, and which formats there are to choose from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moec.artifacts.layout.footprint import dense_bytes, layer_footprint, tensor_bytes
from moec.artifacts.quantization import PLAIN
from moec.artifacts.steps import SegmentStep
from moec.compiler.packing.dense_reader import parameters_of
from moec.compiler.quantization.dense import LEAST
from moec.compiler.quantization.roles import weight_roles
from moec.planning.fitting.units import FitUnit, FormatOption

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moec.artifacts.ids import LayerId, TensorName
    from moec.artifacts.quantization import Role
    from moec.compiler.partition import PartitionedModel

MENU = (PLAIN, "int8-g32", "int8-g128", "int4-g32-m", "int4-g32", "int4-g128")
"""Formats to choose from. Few, since a segment is a function of its own for each; the others would gain nothing more
(docs/decisions/0029-routers-decisions-have-a-gradient-of-their-own.md)."""


@dataclass(frozen=True)
class Unit:
    """Weights that have one format."""

    name: str
    role: Role
    parameters: tuple[str, ...]
    """Whose names a policy's rules are held against."""
    tensors: tuple[TensorName, ...]
    """Dense ones."""
    layer: LayerId | None
    """Of experts."""
    kept: str | None
    """The format that the checkpoint has all of them in; carried over, it costs nothing."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Those to choose from, ``plain`` first."""
        return MENU if self.kept is None or self.kept in MENU else (*MENU, self.kept)


def fit_units(parts: PartitionedModel, kept: Mapping[str, str]) -> tuple[Unit, ...]:
    """The units of a model without formats, in the order of its chain, then the layers' experts.

    All products of a segment step are one, so that a function has no more variants than there are formats. The
    embedding and the head are units of their own; routers stay as they are. Tensors made of the same parameter, which
    rules cannot tell apart, are together.

    Args:
        parts: the model.
        kept: the formats that `moec.compiler.quantization.kept_formats` found.
    """
    roles = weight_roles(parts)
    tensors = {tensor.name: tensor for tensor in parts.packing.dense}
    groups: dict[tuple[Role, int], list[TensorName]] = {}
    owners: dict[str, tuple[Role, int]] = {}
    seen: set[TensorName] = set()
    for number, step in enumerate(parts.model.all_steps):
        for name in step.weights if isinstance(step, SegmentStep) else ():
            role = roles.get(name, "router")
            if role == "router" or name in seen or min(tensors[name].shape) < LEAST:
                continue
            if parameters_of(tensors[name]):
                seen.add(name)
                parameter = parameters_of(tensors[name])[0]
                key = owners.setdefault(parameter, (role, number if role == "linear" else -1))
                groups.setdefault(key, []).append(name)
    units = []
    for (role, _), names in groups.items():
        parameters = tuple(dict.fromkeys(parameters_of(tensors[name])[0] for name in names))
        own = {kept.get(parameter) for parameter in parameters}
        plain = any(tensors[name].steps for name in names) or len(own) > 1
        units.append(Unit(parameters[0], role, parameters, tuple(names), None, None if plain else own.pop()))
    downs = {source.layer: source.down for source in parts.packing.experts}
    for layer in parts.model.experts:
        down = downs[layer.layer]
        units.append(Unit(layer.module, "experts", (down,), (), layer.layer, kept.get(down)))
    return tuple(units)


def with_losses(
    parts: PartitionedModel, unit: Unit, losses: Mapping[str, float], swaps: Mapping[str, float]
) -> FitUnit:
    """A unit as planning takes it; ``losses`` and ``swaps`` are by format (see `FormatOption`)."""
    options = (
        replace(option_of(parts, unit, kind), loss=losses[kind], swaps=swaps[kind]) for kind in unit.formats
    )
    return FitUnit(unit.name, tuple(options))


def option_of(parts: PartitionedModel, unit: Unit, kind: str) -> FormatOption:
    """A unit in a format, whether it is one of those to choose from or not, as if it lost nothing."""
    chosen = None if kind == PLAIN else kind
    if unit.layer is not None:
        layer = parts.model.experts[unit.layer]
        body = next(body for body in parts.model.bodies if body.name == layer.body)
        facts = layer_footprint(layer, replace(body, format=chosen))
        return FormatOption(kind, 0.0, layer.experts * facts.stride_bytes, 0, facts)
    specs = {
        tensor.name: replace(tensor.spec, format=chosen)
        for tensor in parts.packing.dense
        if tensor.name in unit.tensors
    }
    decoding = {name for step in parts.model.steps if isinstance(step, SegmentStep) for name in step.weights}
    read = [spec for name, spec in specs.items() if name in decoding]
    rows = parts.model.vocab_size if unit.role == "embedding" else 1
    return FormatOption(
        kind,
        0.0,
        sum(map(dense_bytes, specs.values())),
        sum(tensor_bytes(spec) // (rows if spec.shape[0] == rows else 1) for spec in read),
    )

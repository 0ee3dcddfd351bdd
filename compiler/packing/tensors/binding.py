"""How each parameter of the transformers model is made from tensors of the checkpoint.

The names are mapped with transformers' own conversion mapping, so that what ``from_pretrained`` loads is
understood; an architecture of our own brings its mapping along. The common conversions of experts (one tensor an
expert, gate and up apart) are taken as what they are, so that one expert can be read alone and in pieces. Any other
runs transformers' own operations.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moec.compiler.architectures import ARCHITECTURES
from moec.compiler.checkpoint.gguf.conversions import AlternateOutputs
from moec.compiler.tracing.model.foreign_experts import FOREIGN, Unflatten

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel

    from moec.compiler.packing.tensors.stored import Stored


@dataclass(frozen=True)
class Renamed:
    """The parameter is one tensor of the checkpoint."""

    stored: Stored
    transposed: bool
    """Its last two dimensions are the other way round (MXFP4, Qwen3-VL: transformers transposes what it reads)."""

    @property
    def stored_tensors(self) -> tuple[Stored, ...]:
        """What is read."""
        return (self.stored,)


@dataclass(frozen=True)
class Stacked:
    """Item e of the parameter is ``groups[0][e]``, ``groups[1][e]``, ... one below the other: gate and up."""

    groups: tuple[tuple[Stored, ...], ...]
    alternating: bool = False
    """Not one below the other: the parameter's rows come from each in turn (gpt-oss in GGUF)."""
    transposed: bool = False
    """The last two dimensions of what that gives are the other way round."""

    def joined(self, stacks: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parameter, of one stack ``[E, ...]`` a group."""
        rows = torch.stack(list(stacks), 2).flatten(1, 2) if self.alternating else torch.cat(list(stacks), 1)
        return rows.mT.contiguous() if self.transposed else rows

    @property
    def stored_tensors(self) -> tuple[Stored, ...]:
        """What is read."""
        return tuple(stored for group in self.groups for stored in group)


@dataclass(frozen=True, eq=False)
class Converted:
    """One or several parameters that transformers' ``converter`` makes."""

    target: str
    converter: WeightConverter
    sources: dict[str, tuple[Stored, ...]]
    """Source pattern -> tensors, in transformers' order."""

    @property
    def stored_tensors(self) -> tuple[Stored, ...]:
        """What is read."""
        return tuple(stored for group in self.sources.values() for stored in group)

    def convert(
        self, load: Callable[[Stored], torch.Tensor], model: PreTrainedModel
    ) -> dict[str, torch.Tensor]:
        """The parameters by name, made from what ``load`` gives for each tensor."""
        converter = copy.deepcopy(self.converter)
        for pattern, group in self.sources.items():
            converter.collected_tensors[pattern] = [load(stored) for stored in group]
        result = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}


Binding: TypeAlias = "Renamed | Stacked | Converted"


@dataclass(frozen=True)
class Bindings:
    """The parameters that the checkpoint has, and its tensors that belong to none."""

    parameters: dict[str, Binding]
    unexpected: tuple[str, ...]
    repeated: tuple[str, ...]
    """Tensors for a parameter that another tensor gives already."""


def bind(
    model: PreTrainedModel, tensors: Mapping[str, Stored], conversions: Sequence[WeightConverter] = ()
) -> Bindings:
    """Map the checkpoint's tensors to the parameters of ``model``, a model on the meta device.

    ``conversions`` are what the checkpoint needs beside its model's own.
    """
    own = ARCHITECTURES.get(model.config.model_type)
    mapping = get_model_conversion_mapping(model) if own is None else own.conversions
    foreign = FOREIGN.get(model.config.model_type)
    mapping = [*mapping, *(foreign.conversions if foreign else ()), *conversions]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()
    grouped: dict[str, OrderedDict[str | None, list[Stored]]] = defaultdict(OrderedDict)
    unexpected: list[str] = []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target in state:
            grouped[target].setdefault(pattern, []).append(tensors[name])
        else:
            unexpected.append(name)
    parameters: dict[str, Binding] = {}
    repeated: list[str] = []
    for target, sources in grouped.items():
        plain = sources.pop(None, [])
        converted = {str(pattern): tuple(group) for pattern, group in sources.items()}
        repeated += [stored.name for stored in plain[0 if converted else 1 :]]
        if converted:
            shape = tuple(state[target].shape)
            converter, converted = _unflattened(by_pattern[next(iter(converted))], converted, shape[0])
            parameters.update(_converted(target, converter, converted, shape))
        else:
            parameters[target] = Renamed(plain[0], transposed=plain[0].turned)
    return Bindings(parameters, tuple(unexpected), tuple(repeated))


def _unflattened(
    converter: WeightConverter, sources: dict[str, tuple[Stored, ...]], experts: int
) -> tuple[WeightConverter, dict[str, tuple[Stored, ...]]]:
    """``Unflatten`` at the head of a conversion, done to what is read."""
    if not converter.operations or not isinstance(converter.operations[0], Unflatten):
        return converter, sources
    rest = WeightConverter(
        converter.source_patterns, converter.target_patterns, operations=converter.operations[1:]
    )
    return rest, {
        pattern: tuple(stored.unflatten(experts) for stored in group) for pattern, group in sources.items()
    }


def _split_experts(
    target: str, converter: WeightConverter, groups: tuple[tuple[Stored, ...], ...]
) -> dict[str, Binding]:
    """Experts of text and of images, numbered through: equal runs of them, each a parameter."""
    first, count = converter.target_patterns[0], len(converter.target_patterns)
    size = -(-len(groups[0]) // count)
    return {
        target.replace(first, name): Stacked(
            tuple(group[number * size : (number + 1) * size] for group in groups)
        )
        for number, name in enumerate(converter.target_patterns)
    }


def _converted(
    target: str,
    converter: WeightConverter,
    sources: dict[str, tuple[Stored, ...]],
    shape: tuple[int, ...],
) -> dict[str, Binding]:
    """The binding of ``target``, of ``shape``, and of the other parameters that the same conversion makes."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    groups = tuple(sources[pattern] for pattern in converter.source_patterns if pattern in sources)
    complete = len(groups) == len(converter.source_patterns)
    if complete and kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        return {target: Stacked(groups)}
    if complete and [kind for kind, _ in kinds] == [ErnieFuseAndSplitTextVisionExperts]:
        return _split_experts(target, converter, groups)
    if complete and [kind for kind, _ in kinds] == [AlternateOutputs]:
        apart = tuple(tuple(one.item(e) for e in range(one.shape[0])) for (one,) in groups)
        return {target: Stacked(apart, alternating=len(apart) > 1, transposed=len(shape) > 2)}
    if complete and [kind for kind, _ in kinds] == [Transpose] and converter.operations[0].check_dims:
        return {target: Renamed(groups[0][0], transposed=groups[0][0].shape != shape)}
    if complete and kinds == [(Concatenate, 1)] and all(len(group) == 1 for group in groups):
        fused = [group[0] for group in groups]
        return {target: Stacked(tuple(tuple(one.item(e) for e in range(one.shape[0])) for one in fused))}
    binding = Converted(target, converter, sources)
    first = converter.target_patterns[0]
    return {target.replace(first, other): binding for other in converter.target_patterns}


def expert_tensors(binding: Renamed | Stacked, expert: int) -> tuple[Stored, ...]:
    """The tensors that, one below the other, are item ``expert`` of a parameter."""
    if isinstance(binding, Renamed):
        return (binding.stored.item(expert),)
    return tuple(group[expert] for group in binding.groups)


def convert_expert(
    binding: Converted, expert: int, load: Callable[[Stored], torch.Tensor], model: PreTrainedModel
) -> torch.Tensor:
    """Item ``expert`` of a parameter, reading nothing of the others."""
    merging = any(isinstance(operation, MergeModulelist) for operation in binding.converter.operations)
    one: Any = {
        pattern: (group[expert],) if merging else tuple(stored.item(expert) for stored in group)
        for pattern, group in binding.sources.items()
    }
    lone = Converted(binding.target, binding.converter, one)
    made = lone.convert(load if merging else lambda stored: load(stored).unsqueeze(0), model)
    return made[binding.target][0]

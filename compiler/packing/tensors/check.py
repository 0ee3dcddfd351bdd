"""Does the checkpoint have what the modules need? Decided from its headers, before any byte is written."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from moec.compiler.packing.tensors.binding import Binding, Bindings, Converted, Renamed, Stacked
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence, Set

    from transformers import PreTrainedModel

    from moec.compiler.packing.tensors.stored import Stored

NAMED = 10
"""Tensors that an error names; of more it gives the number."""

_DO = "Use the complete checkpoint that this config.json belongs to, or download it again."
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NUMBER = re.compile(r"(?<=[._])(\d+)(?=\.)")
_PREDICTS = re.compile(r"\.(eh_proj|enorm|hnorm)\.")
_EXTRAS = (
    re.compile(r"\.inv_freq$"),
    re.compile(r"(^|\.)mtp[._]"),
    re.compile(r"\.self_attn\.[qkv]_(scale|zero_point)$"),
)


def check_names(
    model: PreTrainedModel, bindings: Bindings, needed: Iterable[str], idle: Set[str] = frozenset()
) -> tuple[dict[str, Binding], list[str]]:
    """The binding of each needed parameter, and the known extra tensors that are left out, ``idle`` among them.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of the wrong shape.
    """
    ahead = _predicting_layers(bindings.unexpected, model)
    extras = [name for name in bindings.unexpected if name in idle or _known_extra(name, model, ahead)]
    found: dict[str, Binding] = {}
    missing: list[str] = []
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(set(needed)):
        binding = bindings.parameters.get(_given_name(name, bindings, model))
        if binding is None:
            missing.append(name)
        else:
            missing += _missing_parts(name, binding, shapes[name])
            found[name] = binding
    if missing:
        raise _error("missing in", missing, "The config's model has them.")
    unexpected = sorted(set(bindings.unexpected) - set(extras))
    if unexpected:
        raise _error("unexpected in", unexpected, f"{type(model).__name__} has no such parameters.")
    for name, binding in found.items():
        _check_shape(name, binding, shapes[name], model)
    return found, sorted({*extras, *bindings.repeated, *_unused(bindings, found)})


def _unused(bindings: Bindings, found: dict[str, Binding]) -> Iterator[str]:
    """Tensors of parameters that the model has and the chain does not: towers that see or hear, indexers."""
    used = {stored.name for binding in found.values() for stored in binding.stored_tensors}
    for binding in bindings.parameters.values():
        yield from (stored.name for stored in binding.stored_tensors if stored.name not in used)


def _given_name(name: str, bindings: Bindings, model: PreTrainedModel) -> str:
    """``name``, or a parameter tied to it that the checkpoint has instead."""
    if name in bindings.parameters:
        return name
    tied: dict[str, str] = model.all_tied_weights_keys or {}
    family = tied.get(name, name)
    others = [family, *(other for other, source in tied.items() if source == family)]
    return next((other for other in others if other in bindings.parameters), name)


def _predicting_layers(names: Iterable[str], model: PreTrainedModel) -> set[int]:
    """Layers past the last that predict tokens ahead (MTP, DeepSeek-V3, GLM-4.5), by their tensors or by the config.

    Others past the last mean that the config is of a smaller model, also where it counts as many layers ahead.
    """
    text = model.config.get_text_config()
    count = text.num_hidden_layers
    layers = [_LAYER.search(name) for name in names if _PREDICTS.search(name)]
    found = {int(layer[1]) for layer in layers if layer is not None and int(layer[1]) >= count}
    return found or {*range(count, count + int(getattr(text, "num_nextn_predict_layers", 0) or 0))}


def _known_extra(name: str, model: PreTrainedModel, ahead: set[int]) -> bool:
    """Whether checkpoints of this model have this tensor for something that moec does not run.

    Layers that predict ``ahead``; ``inv_freq`` is computed, and keys and values are
    not rounded, as some quantized checkpoints would have it.
    """
    layer = _LAYER.search(name)
    if layer is not None and int(layer[1]) in ahead:
        return True
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return any(pattern.search(name) for pattern in (*_EXTRAS, *ignored))


def _missing_parts(name: str, binding: Binding, shape: tuple[int, ...]) -> list[str]:
    match binding:
        case Stacked(groups):
            return [part for group in groups for part in _missing_experts(group, shape[0])]
        case Converted(_, converter, sources):
            absent = [pattern for pattern in converter.source_patterns if pattern not in sources]
            return [f"{name} (from {pattern})" for pattern in absent]
        case Renamed():
            return []


def _missing_experts(group: Sequence[Stored], experts: int) -> list[str]:
    """Names of the tensors that single experts lack: what varies in the names of the others is their number."""
    if len(group) >= experts or _is_fused(group):
        return []
    names = [_NUMBER.split(stored.name) for stored in group]
    digits = range(1, len(names[0]), 2)
    varying = [at for at in digits if len({name[at] for name in names}) > 1] or list(digits)
    at = varying[-1]
    present = {int(name[at]) for name in names}
    return [
        "".join([*names[0][:at], str(e), *names[0][at + 1 :]]) for e in range(experts) if e not in present
    ]


def _is_fused(group: Sequence[Stored]) -> bool:
    """Whether the experts are parts of one tensor, whose shape says how many there are."""
    return len(group) > 1 and group[0].name == group[1].name


def _check_shape(name: str, binding: Binding, shape: tuple[int, ...], model: PreTrainedModel) -> None:
    match binding:
        case Renamed(stored, transposed):
            expected = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
            _expect(stored.name, stored.shape, expected)
        case Stacked(groups):
            own = (*shape[:-2], shape[-1], shape[-2]) if binding.transposed else shape
            expected = (own[1] // len(groups), *own[2:])
            for group in groups:
                if _is_fused(group):
                    _expect(group[0].name, (len(group), *group[0].shape), (shape[0], *expected))
                for stored in group:
                    _expect(stored.name, stored.shape, expected)
                if len(group) > shape[0]:
                    raise _error(
                        "unexpected in", [stored.name for stored in group[shape[0] :]], "Too many experts."
                    )
        case Converted():
            try:
                made = binding.convert(lambda stored: torch.empty(stored.shape, device="meta"), model)
            except (RuntimeError, ValueError, IndexError) as error:
                sources = ", ".join(
                    f"{stored.name} {list(stored.shape)}" for stored in binding.stored_tensors
                )
                raise CheckpointError(
                    f"Cannot make {name} {list(shape)} from {sources}."[:1000], str(error)[:300], _DO
                ) from error
            _expect(name, tuple(made[name].shape) if name in made else (), shape)


def _expect(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise CheckpointError(
            f"Tensor {name} has the wrong shape: {list(shape)} in the checkpoint, "
            f"{list(expected)} by its config.",
            "The weights and config.json are of different models.",
            _DO,
        )


def _error(problem: str, names: list[str], why: str) -> CheckpointError:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    plural = "s" if len(names) > 1 else ""
    listed = ", ".join(names[:NAMED])
    return CheckpointError(f"{len(names)} tensor{plural} {problem} the checkpoint: {listed}{more}.", why, _DO)

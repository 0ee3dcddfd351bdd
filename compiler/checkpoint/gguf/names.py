"""GGUF's tensors under the names, and in the pieces, of a checkpoint of transformers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moec.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moec.compiler.checkpoint.gguf.architectures.record import Place
    from moec.compiler.checkpoint.record import TensorEntry

NAMED = 10
"""Tensors that an error names; of more it gives the number."""

_LAYER = re.compile(r"^blk\.(\d+)\.")
_EXPERT = re.compile(r"\.(\d+)\.")
EXPERT = "{expert}"


def renamed(
    tensors: Mapping[str, TensorEntry], places: Mapping[str, Place], config: Mapping[str, Any]
) -> dict[str, TensorEntry]:
    """The index of a checkpoint that has ``tensors`` where ``places`` says.

    Raises:
        CheckpointError: a tensor has no place.
    """
    index: dict[str, TensorEntry] = {}
    unexpected: list[str] = []
    for name, entry in tensors.items():
        general, numbers = _general(name)
        place = places.get(general)
        if place is None:
            unexpected.append(name)
            continue
        paired = 0 if place.rotated is None else entry.shape[0] // int(config[place.rotated])
        index.update(_placed(replace(entry, paired_rows=paired), place, numbers))
    if unexpected:
        more = f" and {len(unexpected) - NAMED} more" if len(unexpected) > NAMED else ""
        raise CheckpointError(
            f"{len(unexpected)} tensors unexpected in the GGUF file: {', '.join(unexpected[:NAMED])}{more}.",
            "Models of its architecture that moec knows have none of these names.",
            "Use the checkpoint in transformers' layout.",
        )
    return index


def _general(name: str) -> tuple[str, dict[str, str]]:
    """``blk.3.ffn_gate.5.weight`` -> its name with words for numbers, and these."""
    layer = _LAYER.match(name)
    if layer is None:
        return name, {}
    rest = name[layer.end() :]
    expert = _EXPERT.search(rest)
    numbers = {"layer": layer[1]}
    if expert is not None:
        rest = rest.replace(expert[0], f".{EXPERT}.", 1)
        numbers["expert"] = expert[1]
    return f"blk.{{layer}}.{rest}", numbers


def _placed(entry: TensorEntry, place: Place, numbers: dict[str, str]) -> Iterator[tuple[str, TensorEntry]]:
    every = EXPERT in place.names[0] and "expert" not in numbers
    for expert in range(entry.shape[0]) if every else (None,):
        one = entry if expert is None else entry.item(expert)
        words = numbers if expert is None else numbers | {"expert": str(expert)}
        for number, name in enumerate(place.names):
            yield name.format(**words), one.part(number, len(place.names))

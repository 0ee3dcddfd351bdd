"""What a quantized checkpoint has in a format of ours already."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from moec.compiler.checkpoint import with_table
from moec.compiler.packing.dense_reader import direct, parameters_of
from moec.compiler.packing.experts import stored_format
from moec.compiler.packing.plan import bound_parameters
from moec.compiler.tracing.model.build import build_config, build_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.packing.tensors.binding import Binding
    from moec.compiler.partition import PartitionedModel

COMPUTED = "the bundle has them computed with, turned round, or in one expert with other formats"


@dataclass(frozen=True)
class Kept:
    """What of a quantized checkpoint can be carried over."""

    formats: Mapping[str, str] = field(default_factory=dict)
    """Of each parameter whose codes can be, or whose values have a stand-in, by the parameter's name."""
    obstacles: Mapping[str, int] = field(default_factory=dict)
    """Why other quantized weights cannot be, and how many of them."""
    rounded: Mapping[str, int] = field(default_factory=dict)
    """Formats that quantized weights are rounded to in ``formats`` instead, and how many are to each."""


def kept_formats(checkpoint: Checkpoint, parts: PartitionedModel) -> Kept:
    """What can be carried over of a checkpoint.

    Those are matrices that the bundle has as they are, and experts whose matrices all have one format (under the name
    of ``down``). What is computed from several parameters, or turned round, has none.

    Raises:
        CheckpointError: the checkpoint is quantized, and has no weights; or as ``check_weights``.
        NetworkError: it is on a hub that cannot be reached.
    """
    if "quantization_config" not in checkpoint.config:
        return Kept()
    listed = with_table(checkpoint)
    meta = build_model(build_config(checkpoint.config), getattr(torch, parts.model.dtype))
    parameters, _ = bound_parameters(listed, parts.packing, meta)
    found: dict[str, str] = {}
    obstacles: Counter[str] = Counter()
    rounded: Counter[str] = Counter()
    for tensor in parts.packing.dense:
        stored = direct(tensor, parameters)
        name = None if stored is None else stored.format or stored.stand_in
        if stored is not None and name is not None:
            found[tensor.sources[0]] = name
            rounded[name] += stored.format is None
        else:
            obstacles.update(_obstacles([parameters[name] for name in parameters_of(tensor)]))
    for source in parts.packing.experts:
        bindings = [parameters[name] for name in (source.up, source.down)]
        formats = {stored_format(source, binding) for binding in bindings}
        tensors = [stored for binding in bindings for stored in binding.stored_tensors]
        stand_ins = {stored.stand_in for stored in tensors}
        if len(formats) == 1 and None not in formats:
            found[source.down] = str(formats.pop())
        elif len(stand_ins) == 1 and None not in stand_ins:
            name = str(stand_ins.pop())
            found[source.down] = name
            rounded[name] += sum(stored.format != name for stored in tensors)
        else:
            obstacles.update(_obstacles(bindings))
    return Kept(found, obstacles, +rounded)


def _obstacles(bindings: list[Binding]) -> list[str]:
    """Why the codes of these parameters are not carried over, once for each quantized weight."""
    encodings = [stored.encoding for binding in bindings for stored in binding.stored_tensors]
    return [encoding.obstacle or COMPUTED for encoding in encodings if encoding is not None]

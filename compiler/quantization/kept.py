"""What a quantized checkpoint has in a format of ours already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moec.compiler.checkpoint import with_table
from moec.compiler.packing.dense_reader import direct
from moec.compiler.packing.experts import stored_format
from moec.compiler.packing.plan import bound_parameters
from moec.compiler.tracing.build import build_config, build_model

if TYPE_CHECKING:
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.partition import PartitionedModel


def kept_formats(checkpoint: Checkpoint, parts: PartitionedModel) -> dict[str, str]:
    """The format of each parameter whose codes can be carried over, bit for bit, by the parameter's name.

    Those of a matrix that the bundle has as it is, and of experts whose matrices all have one format (under the name of
    ``down``). What is computed from several parameters, or turned round, has none.

    Raises:
        CheckpointError: the checkpoint is quantized, and has no weights; or as ``check_weights``.
        NetworkError: it is on a hub that cannot be reached.
    """
    if "quantization_config" not in checkpoint.config:
        return {}
    listed = with_table(checkpoint)
    meta = build_model(build_config(checkpoint.config), getattr(torch, parts.model.dtype))
    parameters, _ = bound_parameters(listed, parts.packing, meta)
    found: dict[str, str] = {}
    for tensor in parts.packing.dense:
        stored = direct(tensor, parameters)
        if stored is not None and stored.format is not None:
            found[tensor.sources[0]] = stored.format
    for source in parts.packing.experts:
        formats = {stored_format(source, parameters[name]) for name in (source.up, source.down)}
        if len(formats) == 1 and None not in formats:
            found[source.down] = str(formats.pop())
    return found

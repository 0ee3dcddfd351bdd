"""Weights of a checkpoint as the bundle's unquantized tensors, read when they are asked for and kept by nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moec.compiler.packing.dense import PlacedTensor
from moec.compiler.packing.dense_reader import DenseReader
from moec.compiler.packing.experts import ExpertReader, whole_parts
from moec.compiler.packing.plan import plan_pack
from moec.compiler.packing.tensors.reading import FileSource, TensorReader
from moec.compiler.tracing.model.build import build_config, build_model

if TYPE_CHECKING:
    from moec.artifacts.ids import LayerId, TensorName
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.partition import PartitionedModel


class CheckpointWeights:
    """Reads what packing would write, in one thread.

    Args:
        checkpoint: with its weights on this machine.
        parts: the model, before any policy is applied.

    Raises:
        MoecError: as ``plan_pack``.
    """

    def __init__(self, checkpoint: Checkpoint, parts: PartitionedModel) -> None:
        meta = build_model(build_config(checkpoint.config), getattr(torch, parts.model.dtype))
        plan = plan_pack(checkpoint, parts.model, parts.packing, parts.constants, meta)
        reader = TensorReader(FileSource())
        self._tensors = {tensor.name: tensor for tensor in parts.packing.dense}
        self._dense = DenseReader(
            plan.parameters, plan.dtypes, {}, parts.constants, reader, meta, lambda _: None
        )
        self._experts = {
            file.layer.layer: ExpertReader(file, reader, meta, lambda _: None) for file in plan.experts
        }

    def dense(self, name: TensorName) -> torch.Tensor:
        """A tensor of ``weights/dense.safetensors``."""
        tensor = self._tensors[name]
        pieces = [piece.values.clone() for piece in self._dense.pieces((PlacedTensor(tensor, 0, 0),))]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(tensor.shape)

    def expert(self, layer: LayerId, expert: int) -> dict[str, torch.Tensor]:
        """The parts of an expert in float32, by their names in `moec.artifacts.layout.experts.layout`."""
        pieces = self._experts[layer].pieces(expert)
        return {name: piece.values.float() for name, piece in whole_parts(pieces).items()}

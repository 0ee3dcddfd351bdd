"""What pack will write, checked and laid out before any byte is written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moec.artifacts.files.codec import to_json
from moec.compiler.checkpoint.gguf.conversions import gguf_conversions
from moec.compiler.packing.dense import DenseFile, plan_dense
from moec.compiler.packing.dense_reader import CONSTANT, parameters_of
from moec.compiler.packing.experts import ExpertsFile, experts_file
from moec.compiler.packing.quantizing import quantizer_for
from moec.compiler.packing.tensors.binding import Binding, bind
from moec.compiler.packing.tensors.check import check_names
from moec.compiler.packing.tensors.idle import idle_biases
from moec.compiler.packing.tensors.stored import stored_tensors
from moec.errors import BundleError, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from moec.artifacts.model import ModelRecord
    from moec.artifacts.packing import DenseTensor, ExpertSource, PackingRecord
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.packing.quantizing import Quantizer


@dataclass(frozen=True)
class PackPlan:
    """Every file of ``weights/`` and what it is made from."""

    parameters: dict[str, Binding]
    dtypes: dict[str, torch.dtype]
    dense: DenseFile
    experts: tuple[ExpertsFile, ...]
    """In the order of the checkpoint."""
    extras: tuple[str, ...]
    """Known tensors of the checkpoint that the model does not use."""
    quantizers: Mapping[str, Quantizer]
    """For each format that weights are stored in."""
    identity: str
    """Hash of all that decides the bytes; a journal of another identity is not resumed."""

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return self.dense.size_bytes + sum(file.size_bytes for file in self.experts)


def plan_pack(
    checkpoint: Checkpoint,
    model: ModelRecord,
    packing: PackingRecord,
    constants: Mapping[str, torch.Tensor],
    meta: PreTrainedModel,
) -> PackPlan:
    """Lay the bundle's weights out, from the checkpoint's headers alone.

    Raises:
        CheckpointError: the checkpoint is of another model, or tensors are missing, unexpected or misshapen.
        UnsupportedModelError: the checkpoint is quantized in a way that moec does not read.
        BundleError: the records do not belong together.
    """
    if packing.config_sha256 != checkpoint.config_sha256:
        raise CheckpointError(
            f"The modules were compiled for another model than {checkpoint.source}.",
            "The fingerprints of their configs differ.",
            "Pack the checkpoint whose config.json the modules were compiled from.",
        )
    _check_records(model, packing, constants)
    sources = {source.layer: source for source in packing.experts}
    parameters, extras = bound_parameters(checkpoint, packing, meta)
    dtypes: dict[str, torch.dtype] = {
        name: getattr(torch, packing.parameter_dtypes[name]) for name in parameters
    }
    bodies = {body.name: body for body in model.bodies}
    wanted = {*(body.format for body in model.bodies), *(tensor.format for tensor in packing.dense)}
    quantizers = {name: quantizer_for(name, packing.quantization) for name in wanted if name is not None}
    experts = [
        experts_file(
            layer,
            bodies[layer.body],
            sources[layer.layer],
            parameters,
            dtypes,
            quantizers.get(bodies[layer.body].format or ""),
        )
        for layer in model.experts
    ]
    return PackPlan(
        parameters,
        dtypes,
        plan_dense(packing.dense, lambda tensor: _places(tensor, parameters)),
        tuple(sorted(experts, key=lambda file: min(_place(parameters[file.source.up])))),
        tuple(extras),
        quantizers,
        _identity(checkpoint, model, packing, constants),
    )


def bound_parameters(
    checkpoint: Checkpoint, packing: PackingRecord, meta: PreTrainedModel
) -> tuple[dict[str, Binding], list[str]]:
    """What each parameter that packing needs is made from, and known tensors of the checkpoint without use.

    Raises as ``plan_pack`` does.
    """
    needed = [name for tensor in packing.dense for name in parameters_of(tensor)]
    needed += [name for source in packing.experts for name in expert_parameters(source)]
    tensors = stored_tensors(checkpoint.index, checkpoint.config)
    bindings = bind(meta, tensors, gguf_conversions(checkpoint.config))
    return check_names(meta, bindings, needed, idle_biases(bindings, tensors))


def expert_parameters(source: ExpertSource) -> tuple[str, ...]:
    """The parameters that the experts of a layer come from."""
    return tuple(
        name for name in (source.up, source.down, source.up_bias, source.down_bias) if name is not None
    )


def _check_records(model: ModelRecord, packing: PackingRecord, constants: Mapping[str, torch.Tensor]) -> None:
    wanted = {
        source.removeprefix(CONSTANT)
        for tensor in packing.dense
        for source in tensor.sources
        if source.startswith(CONSTANT)
    }
    if wanted - set(constants) or {layer.layer for layer in model.experts} != {
        s.layer for s in packing.experts
    }:
        raise BundleError(
            "model.json, packing.json and constants.safetensors do not belong together.",
            f"Constants missing: {sorted(wanted - set(constants))[:5]}.",
            "Make the modules again with moec compile --modules-only.",
        )


def _place(binding: Binding) -> list[tuple[str, int]]:
    return [(stored.entry.file.name, stored.entry.begin) for stored in binding.stored_tensors]


def _places(tensor: DenseTensor, parameters: Mapping[str, Binding]) -> list[tuple[str, int]]:
    return [place for name in parameters_of(tensor) for place in _place(parameters[name])]


def _identity(
    checkpoint: Checkpoint, model: ModelRecord, packing: PackingRecord, constants: Mapping[str, torch.Tensor]
) -> str:
    files = sorted({entry.file for entry in checkpoint.index.values()})
    facts = {
        "packing": to_json(packing),
        "bodies": to_json(model.bodies),
        "experts": to_json(model.experts),
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "constants": {
            name: hashlib.sha256(value.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
            for name, value in sorted(constants.items())
        },
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

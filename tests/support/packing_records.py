"""Records for packing a transformers model without tracing it, and the bytes that packing must give."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch

from moec.artifacts.ids import LayerId, TensorName
from moec.artifacts.layout.experts import layout
from moec.artifacts.model import ExpertBody, ExpertsLayer, GenerationDefaults, ModelRecord
from moec.artifacts.packing import DenseTensor, ExpertSource, PackingRecord, RecipeStep
from moec.compiler.checkpoint import config_sha256
from moec.compiler.tracing.model.build import build_config, build_model
from moec.compiler.tracing.model.foreign_experts import adopt_experts
from moec.compiler.tracing.model.text_half import TEXT_HALVES, transformers_class
from moec.formats import format_of, pack_rows
from moec.formats.nearest import round_to_nearest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|up_proj|down_proj)(_bias)?$")
UNUSED = re.compile(r"\.indexer\.|\.vision_moe(\.|$)")
_GENERATION = GenerationDefaults(None, (), None, False, 1.0, 0, 1.0, 1.0)


def meta_model(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The model of ``config.json`` without weights."""
    return build_model(build_config(config), dtype)


def loaded_model(folder: Path, dtype: torch.dtype) -> Any:
    """What transformers loads from a checkpoint, with experts described as moec describes them."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    model = transformers_class(kind).from_pretrained(folder, dtype=dtype)
    adopt_experts(model)
    return model


def in_chain(model: Any, path: str) -> bool:
    """Whether a parameter is of what moec runs: of no tower, no indexer, no experts for images."""
    half = TEXT_HALVES.get(model.config.model_type)
    return (half is None or half.has(path)) and not UNUSED.search(path)


def records(model: PreTrainedModel, config: dict[str, Any]) -> tuple[ModelRecord, PackingRecord]:
    """Every parameter that is not of routed experts, as it is; of one matrix also its transpose."""
    state = model.state_dict()
    names = [name for name in dict(model.named_parameters()) if not _EXPERTS.search(name)]
    names += [name for name, _ in model.named_buffers() if name in state]
    names = [name for name in names if in_chain(model, name)]
    dense = [_dense(name, state[name]) for name in names]
    matrix = next(name for name in names if state[name].dim() == 2 and "layers.0" in name)
    dense.append(_transposed(matrix, state[matrix]))
    dense.append(DenseTensor(TensorName("table"), "float32", (3,), ("constant:table",), ()))
    bodies: dict[str, ExpertBody] = {}
    layers: list[ExpertsLayer] = []
    sources: list[ExpertSource] = []
    for path, module in model.named_modules():
        if (
            not in_chain(model, path)
            or not hasattr(module, "down_proj")
            or f"{path}.down_proj" not in state
            or module.down_proj.dim() != 3
        ):
            continue
        body, source = _experts(path, module, LayerId(len(layers)))
        bodies.setdefault(body.name, body)
        layers.append(ExpertsLayer(source.layer, path, body.name, module.down_proj.shape[0], 1))
        sources.append(source)
    record = ModelRecord(
        model.config.model_type, type(model).__name__, _dtype(model.dtype), 1, 1, 1, {}, (), (), (),
        tuple(bodies.values()), tuple(layers), (), 0, _GENERATION,
    )  # fmt: skip
    dtypes: dict[str, Any] = {name: _dtype(value.dtype) for name, value in state.items()}
    return record, PackingRecord(config_sha256(config), dtypes, tuple(dense), tuple(sources))


def expected_expert(model: PreTrainedModel, record: ModelRecord, source: ExpertSource, expert: int) -> bytes:
    """The bytes of one expert, taken from the loaded model."""
    layer = record.experts[source.layer]
    body = next(body for body in record.bodies if body.name == layer.body)
    state = model.state_dict()
    up, down = state[source.up][expert], state[source.down][expert]
    up, down = (up.mT, down.mT) if source.transposed else (up, down)
    values: dict[str, torch.Tensor] = {"down": down}
    values |= _halves("gate", "up", up, source) if body.gated else {"up": up}
    if source.up_bias is not None and source.down_bias is not None:
        values["down_bias"] = state[source.down_bias][expert]
        values |= _halves("gate_bias", "up_bias", state[source.up_bias][expert], source)
    place = layout(body)
    buffer = bytearray(place.stride_bytes)
    for part in place.parts:
        value = values[part.name].detach()
        kind = format_of(body.format) if value.dim() > 1 else None
        if kind is None:
            stored = value.to(getattr(torch, body.dtype))
        else:
            stored = torch.from_numpy(pack_rows(kind, round_to_nearest(kind, value.float().numpy())))
        assert tuple(stored.shape) == part.shape
        buffer[part.offset_bytes : part.offset_bytes + part.size_bytes] = raw(stored)
    return bytes(buffer)


def expected_dense(
    model: PreTrainedModel, packing: PackingRecord, constants: Mapping[str, torch.Tensor]
) -> Any:
    """Name -> tensor of ``dense.safetensors``, taken from the loaded model."""
    state = dict(model.state_dict()) | {f"constant:{name}": value for name, value in constants.items()}
    plain = {tensor.name: state[tensor.sources[0]] for tensor in packing.dense if not tensor.steps}
    return plain | {tensor.name: state[tensor.sources[0]].mT for tensor in packing.dense if tensor.steps}


def raw(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes, whatever its type."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _halves(first: str, second: str, values: torch.Tensor, source: ExpertSource) -> dict[str, torch.Tensor]:
    if source.interleaved:
        return {first: values[0::2], second: values[1::2]}
    half = values.shape[0] // 2
    return {first: values[:half], second: values[half:]}


def _experts(path: str, module: Any, layer: LayerId) -> tuple[ExpertBody, ExpertSource]:
    turned = bool(getattr(module, "is_transposed", False))
    down = module.down_proj.shape
    intermediate, hidden = (down[1], down[2]) if turned else (down[2], down[1])
    bias, gated = hasattr(module, "down_proj_bias"), hasattr(module, "gate_up_proj")
    dtype, up = _dtype(module.down_proj.dtype), "gate_up_proj" if gated else "up_proj"
    middle = ("mul", ("silu", "gate"), "up") if gated else ("relu", "up")
    body = ExpertBody("expert_0", hidden, intermediate, gated, bias, bias, middle, dtype)
    names = [f"{path}.{up}_bias", f"{path}.down_proj_bias"] if bias else [None, None]
    interleaved = not getattr(module, "is_concatenated", True)
    source = ExpertSource(layer, f"{path}.{up}", f"{path}.down_proj", names[0], names[1], turned, interleaved)
    return body, source


def _dense(name: str, value: torch.Tensor) -> DenseTensor:
    return DenseTensor(TensorName(name), _dtype(value.dtype), tuple(value.shape), (name,), ())


def _transposed(name: str, value: torch.Tensor) -> DenseTensor:
    step = RecipeStep("aten.transpose.int", ({"ref": 0}, 0, 1))
    return DenseTensor(
        TensorName(f"{name}.transposed"), _dtype(value.dtype), tuple(value.mT.shape), (name,), (step,)
    )


def _dtype(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")

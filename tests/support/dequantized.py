"""Models of transformers with the weights that a quantized bundle has: rounded to its formats, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moec.artifacts.files.records import read_record
from moec.artifacts.layout.experts import layout
from moec.artifacts.model import ModelRecord
from moec.artifacts.packing import PackingRecord
from moec.formats import FORMATS, METHODS, Format, dequantize, dequantize_rows

if TYPE_CHECKING:
    from pathlib import Path


def dequantize_dense(model: torch.nn.Module, bundle: Path) -> None:
    """Round every other matrix that the bundle has in a format to what that can say, in place."""
    packing = read_record(PackingRecord, "packing", bundle / "packing.json")
    weights = model.state_dict()
    formats = {tensor.sources[0]: tensor.format for tensor in packing.dense if tensor.format is not None}
    assert {"lm_head.weight", "model.embed_tokens.weight"} < formats.keys()
    assert [name for name in formats if "self_attn" in name]
    for name, kind in formats.items():
        values = dequantize(FORMATS[kind], METHODS["nearest"](FORMATS[kind], weights[name].numpy()))
        weights[name].copy_(torch.from_numpy(values))


def round_dense(model: torch.nn.Module, bundle: Path) -> None:
    """Round to bfloat16, in place, every weight outside routed experts that the bundle has in it."""
    packing = read_record(PackingRecord, "packing", bundle / "packing.json")
    weights = model.state_dict()
    for tensor in packing.dense:
        for name in tensor.sources if tensor.dtype == "bfloat16" and tensor.format is None else ():
            if name in weights:
                weights[name].copy_(weights[name].bfloat16())


def take_experts(model: torch.nn.Module, bundle: Path) -> None:
    """Put what a bundle's routed experts stand for into a model that has ``gate_up_proj`` and ``down_proj``."""
    record = read_record(ModelRecord, "model", bundle / "model.json")
    bodies, weights = {body.name: body for body in record.bodies}, model.state_dict()
    for layer in record.experts:
        body = bodies[layer.body]
        assert body.format is not None
        path = bundle / "weights" / f"experts-{layer.layer:05d}.bin"
        data = np.fromfile(path, np.uint8).reshape(layer.experts, -1)
        for expert in range(layer.experts):
            values = {}
            for part in layout(body).parts:
                rows = data[expert, part.offset_bytes :][: part.size_bytes].reshape(part.shape)
                columns = body.intermediate if part.name == "down" else body.hidden
                values[part.name] = torch.from_numpy(dequantize_rows(FORMATS[body.format], rows, columns))
            both = torch.cat((values["gate"], values["up"]))
            weights[f"{layer.module}.gate_up_proj"][expert].copy_(both)
            weights[f"{layer.module}.down_proj"][expert].copy_(values["down"])


def dequantize_experts(model: torch.nn.Module, kind: Format) -> None:
    """Round every routed expert's matrices to what ``kind`` can say, in place."""
    rounded = 0
    for module in model.modules():
        for name in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
            weight = getattr(module, name, None)
            if not isinstance(weight, torch.nn.Parameter) or weight.ndim != 3:
                continue
            across = 1 if getattr(module, "is_transposed", False) else 2
            for expert in weight.data:
                rows = expert.T if across == 1 else expert
                values = dequantize(kind, METHODS["nearest"](kind, rows.contiguous().numpy()))
                rows.copy_(torch.from_numpy(values))
            rounded += 1
    assert rounded

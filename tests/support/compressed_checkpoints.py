"""Tiny checkpoints of compressed-tensors, compressed by its own library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file

from tests.support.packed_checkpoints import is_product
from tests.support.quantized_checkpoints import Published, Tensors, write_pair
from tests.support.tiny_models import save

if TYPE_CHECKING:
    from pathlib import Path


def compressed_parts(
    weight: torch.Tensor, layout: str, settings: dict[str, Any], scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensors, torch.Tensor]:
    """The parts of a weight by the library's names, and its values in float32 as the library decompresses them."""
    arguments = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    low, high = _ranges(weight.float(), arguments)
    scales, zeros = calculate_qparams(low, high, arguments)
    scales = scales if layout.startswith("mx") else scales.to(scale_dtype)
    zeros = zeros.to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(layout)
    state = {"weight": weight.float(), "weight_scale": scales.float(), "weight_zero_point": zeros}
    parts = compressor.compress(state, scheme)
    values = compressor.decompress(parts, scheme)["weight"]
    if not layout.startswith("mx"):
        parts["weight_scale"] = scales
    return {name: value.contiguous() for name, value in parts.items()}, values.float()


def compressed_checkpoint(
    folder: Path, name: str, layout: str, settings: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> Published:
    """A tiny model with all products but head and router compressed."""
    save(name, folder / "model", dtype=dtype)
    tensors, stored, values = load_file(folder / "model" / "model.safetensors"), Tensors(), Tensors()
    for weight, value in tensors.items():
        if is_product(weight):
            parts, values[weight] = compressed_parts(value, layout, settings)
            stored |= {f"{weight.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        else:
            stored[weight] = value
    return write_pair(folder, tensors, stored, values, compressed_config(layout, settings))


def compressed_config(layout: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A ``quantization_config`` with one group."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}},
        "ignore": ["lm_head", "re:.*gate$"],
        "quantization_status": "compressed",
    }


def _ranges(weight: torch.Tensor, arguments: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    if arguments.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if arguments.strategy == "block":
        tall, wide = arguments.block_structure
        padded = torch.zeros(-(-rows // tall) * tall, -(-columns // wide) * wide)
        padded[:rows, :columns] = weight
        blocks = padded.reshape(padded.shape[0] // tall, tall, -1, wide)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    runs = weight.reshape(rows, -1, arguments.group_size or columns)
    return runs.amin(2), runs.amax(2)

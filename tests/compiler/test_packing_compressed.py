"""compressed-tensors: what its own library compressed is read as it decompresses it, and carried over bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moec.compiler.checkpoint.safetensors_header import read_header
from moec.compiler.packing.tensors.reading import FileSource, TensorReader
from moec.compiler.packing.tensors.stored import Stored, stored_tensors
from moec.errors import CheckpointError, UnsupportedModelError
from moec.formats import FORMATS, dequantize_rows
from tests.support.compressed_checkpoints import compressed_config, compressed_parts

if TYPE_CHECKING:
    from pathlib import Path

ROWS, COLUMNS = 48, 192

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
MXFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
ZEROS = {"symmetric": False}
BLOCKS = {"strategy": "block", "block_structure": [32, 128]}

CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("pack-quantized", INT4, "int4-g32"),
    ("pack-quantized", INT4 | {"group_size": 64}, "int4-g64"),
    ("pack-quantized", INT4 | {"strategy": "channel", "group_size": None}, "int4-g128"),
    ("pack-quantized", INT4 | ZEROS, "int4-g32-z"),
    ("pack-quantized", INT8, "int8-g128"),
    ("pack-quantized", INT8 | ZEROS, None),
    ("int-quantized", INT8, "int8-g128"),
    ("int-quantized", INT8 | {"strategy": "tensor"}, "int8-g128"),
    ("int-quantized", INT8 | ZEROS, None),
    ("naive-quantized", INT8 | BLOCKS, "int8-g128"),
    ("float-quantized", FP8, "fp8-e4m3"),
    ("float-quantized", FP8 | {"strategy": "tensor"}, "fp8-e4m3"),
    ("float-quantized", FP8 | BLOCKS, "fp8-e4m3"),
    ("naive-quantized", FP8 | {"strategy": "group", "group_size": 32}, None),
    ("mxfp4-pack-quantized", MXFP4, "mxfp4"),
]


def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.05


def stored(folder: Path, tensors: dict[str, Any], quantization: dict[str, Any]) -> dict[str, Stored]:
    save_file({name: part for name, part in tensors.items() if part is not None}, folder / "w.safetensors")
    return stored_tensors(read_header(folder / "w.safetensors"), {"quantization_config": quantization})


@pytest.mark.parametrize(
    ("layout", "settings", "format_name"), CASES, ids=lambda case: case if isinstance(case, str) else None
)
def test_rows(
    layout: str,
    settings: dict[str, Any],
    format_name: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moec.compiler.packing.tensors.reading.PIECE_BYTES", 9 * COLUMNS * 4)
    parts, values = compressed_parts(weight(), layout, settings)
    named = {f"w.{name}": part for name, part in parts.items()}
    tensors = stored(tmp_path, named | {"w.input_scale": torch.ones(1)}, compressed_config(layout, settings))
    assert list(tensors) == ["w.weight"]
    found = tensors["w.weight"]
    reader = TensorReader(FileSource())
    assert torch.equal(reader.whole(found, torch.float32), values)
    assert found.format == format_name
    for begin, end in ((0, ROWS), (5, 38)):
        pieces = [piece.clone() for piece in reader.pieces(found, begin, end, torch.float32)]
        assert torch.equal(torch.cat(pieces), values[begin:end])
        if format_name is not None:
            kind = FORMATS[format_name]
            packed = torch.cat([piece.clone() for piece in reader.pieces(found, begin, end, kind)])
            np.testing.assert_array_equal(
                dequantize_rows(kind, packed.numpy(), COLUMNS), values[begin:end].numpy()
            )


def test_schemes_by_target(tmp_path: Path) -> None:
    """Names go before classes."""
    first, first_values = compressed_parts(weight(), "pack-quantized", INT4)
    second, second_values = compressed_parts(weight(), "float-quantized", FP8)
    quantization = compressed_config("mixed-precision", INT4)
    quantization["config_groups"] = {
        "group_0": {"targets": ["Linear"], "weights": INT4, "format": "pack-quantized"},
        "group_1": {"targets": ["re:.*down$"], "weights": FP8, "format": "float-quantized"},
    }
    named = {f"a.up.{name}": part for name, part in first.items()}
    named |= {f"a.down.{name}": part for name, part in second.items()}
    tensors = stored(tmp_path, named | {"a.gate.weight": weight()}, quantization)
    reader = TensorReader(FileSource())
    assert torch.equal(reader.whole(tensors["a.up.weight"], torch.float32), first_values)
    assert torch.equal(reader.whole(tensors["a.down.weight"], torch.float32), second_values)
    assert tensors["a.gate.weight"].encoding is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w.weight_scale": None}, r"w\.weight_scale is missing"),
        ({"w.weight_scale": torch.ones(ROWS, 5)}, r"floating point \(48, 6\)"),
        ({"w.weight_scale": torch.ones(ROWS, 6, dtype=torch.int32)}, r"floating point \(48, 6\)"),
        ({"w.weight_zero_point": None}, r"w\.weight_zero_point is missing"),
        ({"w.weight_zero_point": torch.ones(ROWS, 6, dtype=torch.int32)}, r"zero points \(48, 6\)"),
        ({"w.weight_packed": torch.ones(ROWS, 24, dtype=torch.int16)}, "words of 32 bits"),
    ],
)
def test_parts_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    parts, _ = compressed_parts(weight(), "pack-quantized", INT4 | ZEROS)
    named = {f"w.{name}": part for name, part in parts.items()}
    with pytest.raises(CheckpointError, match=message):
        stored(tmp_path, named | change, compressed_config("pack-quantized", INT4 | ZEROS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized"),
        ({"format": "marlin-24"}, "format marlin-24"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparse \(sparse-24-bitmask\)"),
        ({"transform_config": {"config_groups": {"R4": {}}}}, "rotated"),
        (
            {"config_groups": {"group_0": {"targets": ["re:.*v$"], "weights": INT4}}},
            "a scheme for every weight",
        ),
        (
            {"config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4 | {"num_bits": 3}}}},
            "to int3",
        ),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": INT4 | {"actorder": "group"}}}},
            "actorder='group' has been removed",
        ),
        ({"config_groups": {"group_0": {"weights": INT4}}}, "does not understand its quantization_config"),
    ],
)
def test_what_is_not_read_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    parts, _ = compressed_parts(weight(), "pack-quantized", INT4)
    named = {f"w.{name}": part for name, part in parts.items()}
    with pytest.raises(UnsupportedModelError, match=message):
        stored(tmp_path, named, compressed_config("pack-quantized", INT4) | change)

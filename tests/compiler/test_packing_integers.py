"""GPTQ's and AWQ's layouts: what is read and what is carried over is what an independent packer meant, bit for bit."""

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
from tests.support.packed_checkpoints import Rounded, awq_parts, gptq_parts, rounded

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.quantized_checkpoints import Tensors

ROWS, COLUMNS = 48, 160
"""Columns are no multiple of 64 or 128: last groups are smaller."""


def matrix() -> Any:
    return np.random.default_rng(3).normal(0.01, 0.05, (ROWS, COLUMNS))


def gptq_config(**settings: Any) -> dict[str, Any]:
    return {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True} | settings
    }


def stored(folder: Path, tensors: Tensors, config: dict[str, Any]) -> dict[str, Stored]:
    save_file(tensors, folder / "model.safetensors")
    return stored_tensors(read_header(folder / "model.safetensors"), config)


def check_rows(weight: Stored, expected: Rounded, format_name: str | None) -> None:
    """Whole, in pieces and from the middle; as values and in the format."""
    reader = TensorReader(FileSource())
    assert weight.shape == (ROWS, COLUMNS)
    assert torch.equal(reader.whole(weight, torch.float32), expected.values)
    assert weight.encoding is not None
    assert weight.format == format_name
    assert bool(weight.encoding.obstacle) == (format_name is None)
    for begin, end in ((0, ROWS), (11, 38)):
        pieces = [piece.clone() for piece in reader.pieces(weight, begin, end, torch.float32)]
        assert len(pieces) > 1
        assert torch.equal(torch.cat(pieces), expected.values[begin:end])
        if format_name is not None:
            kind = FORMATS[format_name]
            packed = torch.cat([piece.clone() for piece in reader.pieces(weight, begin, end, kind)])
            found = dequantize_rows(kind, packed.numpy(), COLUMNS)
            np.testing.assert_array_equal(found, expected.values[begin:end].numpy())


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.compiler.packing.tensors.reading.PIECE_BYTES", 9 * COLUMNS * 4)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "format_name"),
    [
        (4, 32, True, "int4-g32"),
        (4, 64, True, "int4-g64"),
        (4, 128, True, "int4-g128"),
        (4, -1, True, "int4-g128"),
        (4, 96, True, "int4-g32"),
        (4, 40, True, None),
        (4, 32, False, "int4-g32-z"),
        (4, -1, False, "int4-g128-z"),
        (8, 32, True, "int8-g32"),
        (8, -1, True, "int8-g128"),
        (8, 32, False, None),
    ],
)
def test_gptq(
    bits: int, group: int, symmetric: bool, format_name: str | None, layout: str, tmp_path: Path
) -> None:
    made = rounded(matrix(), bits, group, symmetric=symmetric)
    parts = gptq_parts("w", made, bits, {"gptq": 1, "gptq_v2": 0}[layout])
    config = gptq_config(bits=bits, group_size=group, sym=symmetric, checkpoint_format=layout)
    tensors = stored(tmp_path, parts, config)
    assert list(tensors) == ["w.weight"]
    check_rows(tensors["w.weight"], made, format_name)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_in_the_order_of_activations(symmetric: bool, tmp_path: Path) -> None:
    made = rounded(matrix(), 4, 32, symmetric=symmetric, reordered=True)
    tensors = stored(tmp_path, gptq_parts("w", made, 4, 1), gptq_config(desc_act=True, sym=symmetric))
    check_rows(tensors["w.weight"], made, None)


def test_gptq_without_g_idx(tmp_path: Path) -> None:
    made = rounded(matrix(), 4, 32, symmetric=True)
    parts = gptq_parts("w", made, 4, 1)
    del parts["w.g_idx"]
    check_rows(stored(tmp_path, parts, gptq_config())["w.weight"], made, "int4-g32")


def test_gptq_with_several_widths(tmp_path: Path) -> None:
    """GPTQModel's ``dynamic``: the config's are not those of every product."""
    first, second = (
        rounded(matrix(), 4, 32, symmetric=True),
        rounded(matrix(), 8, 160, symmetric=False),
    )
    parts = gptq_parts("a", first, 4, 1) | gptq_parts("b", second, 8, 1)
    config = gptq_config(dynamic={r"+:b": {"bits": 8, "group_size": 160, "sym": False}})
    tensors = stored(tmp_path, parts, config)
    check_rows(tensors["a.weight"], first, "int4-g32-z")
    check_rows(tensors["b.weight"], second, None)


@pytest.mark.parametrize(
    ("group", "format_name"), [(32, "int4-g32-z"), (128, "int4-g128-z"), (-1, "int4-g128-z")]
)
def test_awq(group: int, format_name: str, tmp_path: Path) -> None:
    made = rounded(matrix(), 4, group, symmetric=False)
    config = {
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    }
    check_rows(stored(tmp_path, awq_parts("w", made), config)["w.weight"], made, format_name)


@pytest.mark.parametrize(
    ("settings", "part"),
    [({"sym": True}, {"symmetric": False}), ({}, {"symmetric": True, "reordered": True})],
)
def test_codes_are_not_carried_over_as_what_they_are_not(
    settings: dict[str, Any], part: dict[str, Any], tmp_path: Path
) -> None:
    """The config says what no header does; dequantized they are right nevertheless."""
    made = rounded(matrix(), 4, 32, **part)
    weight = stored(tmp_path, gptq_parts("w", made, 4, 1), gptq_config(**settings))["w.weight"]
    reader = TensorReader(FileSource())
    assert torch.equal(reader.whole(weight, torch.float32), made.values)
    with pytest.raises(CheckpointError, match=r"w is not quantized as the checkpoint's config says"):
        reader.whole(weight, FORMATS["int4-g32"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w.scales": None}, r"w\.scales is missing"),
        ({"w.qzeros": None}, r"w\.qzeros is missing"),
        ({"w.scales": torch.ones(4, ROWS)}, r"scales for groups of 32 of 160 inputs"),
        ({"w.scales": torch.ones(5, ROWS + 8)}, r"floating point \(5, 48\)"),
        ({"w.scales": torch.ones(5, ROWS, dtype=torch.int32)}, r"floating point \(5, 48\)"),
        ({"w.qzeros": torch.ones(5, ROWS, dtype=torch.int32)}, r"zero points \(5, 6\)"),
        ({"w.qweight": torch.ones(20, ROWS, dtype=torch.int16)}, "words of 32 bits"),
        ({"w.qweight": torch.ones(20, dtype=torch.int32)}, "two dimensions"),
        ({"w.g_idx": torch.ones(150, dtype=torch.int32)}, "a group for each input"),
    ],
)
def test_gptq_parts_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    parts = gptq_parts("w", rounded(matrix(), 4, 32, symmetric=True), 4, 1) | change
    with pytest.raises(CheckpointError, match=message):
        stored(tmp_path, {name: part for name, part in parts.items() if part is not None}, gptq_config())


def test_groups_beyond_the_scales(tmp_path: Path) -> None:
    parts = gptq_parts("w", rounded(matrix(), 4, 32, symmetric=True), 4, 1)
    parts["w.g_idx"][7] = 5
    weight = stored(tmp_path, parts, gptq_config(desc_act=True))["w.weight"]
    with pytest.raises(CheckpointError, match="do not fit"):
        TensorReader(FileSource()).whole(weight, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w.scales": None}, r"w\.scales is missing"),
        ({"w.scales": torch.ones(4, ROWS)}, r"floating point \(5, 48\)"),
        ({"w.qzeros": torch.ones(5, ROWS, dtype=torch.int32)}, r"zero points \(5, 6\)"),
        ({"w.qweight": torch.ones(160, 6, dtype=torch.int16)}, "words of 32 bits"),
    ],
)
def test_awq_parts_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    parts = awq_parts("w", rounded(matrix(), 4, 32, symmetric=False)) | change
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}
    with pytest.raises(CheckpointError, match=message):
        stored(tmp_path, {name: part for name, part in parts.items() if part is not None}, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 3}, "GPTQ to 3 bits"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint format marlin"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "checkpoint format marlin"),
        ({"quant_method": "awq", "bits": 8}, "AWQ to 8 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "version gemv"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized with bitsandbytes"),
        ({"quant_method": "hqq"}, "quantized with hqq"),
    ],
)
def test_what_is_not_read_is_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    parts = gptq_parts("w", rounded(matrix(), 4, 32, symmetric=True), 4, 1)
    del parts["w.g_idx"]
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        stored(tmp_path, parts, {"quantization_config": settings})
    assert "--quantization" in caught.value.do

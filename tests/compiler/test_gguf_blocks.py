"""Blocks of GGUF files carried over into rows: what they stand for is the gguf package's own, bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from moec.compiler.checkpoint.gguf.blocks import SAME_FORMATS, block_codes
from moec.compiler.checkpoint.gguf.header import read_header
from moec.compiler.packing.encodings.ggml import ggml_weights
from moec.compiler.packing.reading import FileSource, TensorReader
from moec.compiler.packing.stored import stored_tensors
from moec.formats import FORMATS, dequantize_rows, pack_rows

CONFIG = {"quantization_config": {"quant_method": "gguf"}}
ROWS, COLUMNS = 6, 512


def blocks(kind: str) -> np.ndarray:
    """Rows of random bytes, with finite scales."""
    size, length = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows = np.random.default_rng(3).integers(0, 256, (ROWS, COLUMNS // size, length), np.uint8)
    if kind == "MXFP4":
        rows[..., 0] %= 255  # 255 is NaN in OCP's specification, and 2 ** 127 to the package
    else:
        scales = np.random.default_rng(4).normal(size=rows.shape[:2]).astype(np.float16)
        scales[0, :4] = [0, -0.0, 6e-8, 65504]
        rows[..., :2] = scales[..., None].view(np.uint8)
    return rows.reshape(ROWS, -1)


@pytest.mark.parametrize("kind", SAME_FORMATS)
def test_codes_and_scales_are_the_same_values(kind: str) -> None:
    """Negative, subnormal and largest scales included."""
    rows, form = blocks(kind), FORMATS[SAME_FORMATS[kind]]
    packed = pack_rows(form, block_codes(kind, rows))
    expected = gguf.dequantize(rows, GGMLQuantizationType[kind])
    np.testing.assert_array_equal(dequantize_rows(form, packed, COLUMNS), expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "F32", "BF16"])
def test_paired_rows_are_put_in_order_in_pieces(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three heads of eight rows, a piece a head."""
    monkeypatch.setattr("moec.compiler.packing.reading.PIECE_BYTES", 9 * 64 * 4)
    values = np.random.default_rng(5).normal(size=(24, 64)).astype(np.float32)
    used = GGMLQuantizationType[kind]
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    data = gguf.quantize(values, used)
    writer.add_tensor("w", data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = read_header(tmp_path / "x.gguf").tensors["w"]
    stored = stored_tensors({"w": type(entry)(**vars(entry) | {"paired_rows": 8})}, CONFIG)["w"]
    pieces = [piece.clone() for piece in TensorReader(FileSource()).pieces(stored, 0, 24, torch.float32)]
    assert len(pieces) == 3
    order = [head * 8 + row for head in range(3) for row in (0, 2, 4, 6, 1, 3, 5, 7)]
    np.testing.assert_array_equal(torch.cat(pieces).numpy(), gguf.dequantize(data, used)[order])
    if stored.format is not None:
        packed = TensorReader(FileSource()).whole(stored, FORMATS[stored.format])
        found = dequantize_rows(FORMATS[stored.format], packed.numpy(), 64)
        np.testing.assert_array_equal(found, gguf.dequantize(data, used)[order])


def test_plain_tensors_in_order_need_no_encoding(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("w", np.ones((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert ggml_weights(read_header(tmp_path / "x.gguf").tensors, {}) == {}

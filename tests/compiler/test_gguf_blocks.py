"""Blocks of GGUF files carried over into rows: what they stand for is the gguf package's own, bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from moec.compiler.checkpoint.gguf.blocks import block_codes
from moec.compiler.checkpoint.gguf.codes import CARRIED
from moec.compiler.checkpoint.gguf.header import read_header
from moec.compiler.packing.tensors.reading import FileSource, TensorReader
from moec.compiler.packing.tensors.stored import stored_tensors
from moec.formats import FORMATS, dequantize_rows, pack_rows

CONFIG = {"quantization_config": {"quant_method": "gguf"}}
ROWS, COLUMNS = 6, 512


def blocks(kind: str) -> np.ndarray:
    """Rows of random bytes, with finite scales."""
    size, length = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows = np.random.default_rng(3).integers(0, 256, (ROWS, COLUMNS // size, length), np.uint8)
    if kind == "MXFP4":
        rows[..., 0] %= 255  # 255 is NaN in OCP's specification, and 2 ** 127 to the package
    for offset in {"MXFP4": (), "Q4_1": (0, 2), "Q4_K": (0, 2)}.get(kind, (0,)):
        scales = np.random.default_rng(offset).normal(scale=0.1, size=rows.shape[:2]).astype(np.float16)
        if kind != "Q4_K":
            scales[0, :4] = [0, -0.0, 6e-8, 65504]
        rows[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return rows.reshape(ROWS, -1)


def carried(kind: str, rows: np.ndarray) -> np.ndarray:
    """What rows of blocks stand for once they are rows of a format."""
    form = FORMATS[CARRIED[kind].format]
    return dequantize_rows(form, pack_rows(form, block_codes(kind, rows)), COLUMNS)


@pytest.mark.parametrize("kind", [kind for kind, how in CARRIED.items() if how.exact])
def test_codes_and_scales_are_the_same_values(kind: str) -> None:
    """Negative, subnormal and largest scales included."""
    rows = blocks(kind)
    np.testing.assert_array_equal(carried(kind, rows), gguf.dequantize(rows, GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", [kind for kind, how in CARRIED.items() if not how.exact])
def test_scales_of_super_blocks_are_rounded_to_float16(kind: str) -> None:
    """Each of a value's two terms is off by 2^-11 of itself at most: a small part of a step between codes."""
    rows = blocks(kind)
    expected = gguf.dequantize(rows, GGMLQuantizationType[kind])
    codes = block_codes(kind, rows)
    assert codes.minima is not None
    scales, minima = (np.repeat(x.astype(np.float32), 32, 1) for x in (codes.scales, codes.minima))
    error = np.abs(carried(kind, rows) - expected)
    assert (error <= 2.0**-11 * (np.abs(scales * codes.codes) + np.abs(minima)) + 2.0**-23).all()
    assert error.max() > 0
    steps = scales != 0
    assert np.sqrt(np.square(error[steps] / scales[steps]).mean()) < 0.02


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "F32", "BF16"])
def test_paired_rows_are_put_in_order_in_pieces(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three heads of eight rows, a piece a head or two."""
    monkeypatch.setattr("moec.compiler.packing.tensors.reading.PIECE_BYTES", 9 * 64 * 4)
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
    assert len(pieces) > 1
    order = [head * 8 + row for head in range(3) for row in (0, 2, 4, 6, 1, 3, 5, 7)]
    np.testing.assert_array_equal(torch.cat(pieces).numpy(), gguf.dequantize(data, used)[order])
    assert (stored.encoding is None) == (kind in ("F16", "F32", "BF16"))
    if stored.format is not None:
        packed = TensorReader(FileSource()).whole(stored, FORMATS[stored.format])
        found = dequantize_rows(FORMATS[stored.format], packed.numpy(), 64)
        np.testing.assert_array_equal(found, gguf.dequantize(data, used)[order])

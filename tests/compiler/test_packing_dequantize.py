"""FP8 and MXFP4 weights come out as numpy computes them, whole, by expert and in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moec.compiler.checkpoint.safetensors_header import read_header
from moec.compiler.packing.encodings.mxfp4 import E2M1
from moec.compiler.packing.tensors.reading import FileSource, TensorReader
from moec.compiler.packing.tensors.stored import Stored, stored_tensors
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}


def stored(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Stored]:
    save_file(tensors, folder / "model.safetensors")
    return stored_tensors(read_header(folder / "model.safetensors"), config)


def e4m3(byte: int) -> float:
    """The value of an 8-bit float, from its definition (OCP FP8, E4M3 without infinity)."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def fp8_case(shape: tuple[int, int], seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Any]:
    """Codes, scales and what they mean, block by block."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 256, shape, dtype=np.uint8)
    codes[codes & 127 == 127] = 0
    scales = random.random((-(-shape[0] // 128), -(-shape[1] // 128)), dtype=np.float32) + 0.5
    table = np.array([e4m3(byte) for byte in range(256)], np.float32)
    values = table[codes]
    for row in range(shape[0]):
        for block in range(scales.shape[1]):
            values[row, block * 128 : (block + 1) * 128] *= scales[row // 128, block]
    return codes, scales, values


@pytest.mark.parametrize("shape", [(128, 128), (576, 200), (5, 300), (130, 3)])
def test_fp8_with_ragged_blocks(
    shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scales, values = fp8_case(shape, 1)
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    tensors = stored(tmp_path, {"w.weight": weight, "w.weight_scale_inv": torch.from_numpy(scales)}, FP8)
    assert list(tensors) == ["w.weight"]
    reader = TensorReader(FileSource())
    assert np.array_equal(reader.whole(tensors["w.weight"], torch.float32).numpy(), values)
    assert torch.equal(reader.whole(tensors["w.weight"], torch.bfloat16), torch.from_numpy(values).bfloat16())
    monkeypatch.setattr("moec.compiler.packing.tensors.reading.PIECE_BYTES", 1)
    for begin, end in ((0, shape[0]), (3, shape[0]), (shape[0] // 2, shape[0] - 1)):
        pieces = [p.clone() for p in reader.pieces(tensors["w.weight"], begin, end, torch.float32)]
        assert np.array_equal(torch.cat(pieces).numpy(), values[begin:end])


def test_fp8_fused_experts_have_scales_each(tmp_path: Path) -> None:
    cases = [fp8_case((200, 130), seed) for seed in range(3)]
    weight = torch.from_numpy(np.stack([codes for codes, _, _ in cases])).view(torch.float8_e4m3fn)
    scales = torch.from_numpy(np.stack([scales for _, scales, _ in cases]))
    tensors = stored(tmp_path, {"w": weight, "w_scale_inv": scales}, FP8)
    reader = TensorReader(FileSource())
    whole = reader.whole(tensors["w"], torch.float32).numpy()
    for expert, (_, _, values) in enumerate(cases):
        assert np.array_equal(reader.whole(tensors["w"].item(expert), torch.float32).numpy(), values)
        assert np.array_equal(whole[expert], values)


def test_fp8_with_one_scale(tmp_path: Path) -> None:
    codes = torch.arange(100, dtype=torch.uint8).view(10, 10)
    weight = codes.view(torch.float8_e4m3fn)
    tensors = stored(tmp_path, {"w": weight, "w_scale_inv": torch.tensor(0.25)}, {})
    values = TensorReader(FileSource()).whole(tensors["w"], torch.float32)
    assert torch.equal(values, weight.float() * 0.25)


def test_fp8_scales_that_do_not_fit(tmp_path: Path) -> None:
    weight = torch.zeros(300, 128, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"scales of w .*\[300, 128\].*\[2, 1\]"):
        stored(tmp_path, {"w": weight, "w_scale_inv": torch.ones(2, 1)}, FP8)


def test_mxfp4(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = random.integers(110, 135, (2, 6, 3), dtype=np.uint8)
    scales[0, 0, 0] = 0
    expected = np.zeros((2, 6, 96), np.float32)
    for index in np.ndindex(2, 6, 3, 16):
        *row, block, byte = index
        code = int(blocks[index])
        scale = 2.0 ** (int(scales[tuple(row)][block]) - 127)
        expected[*row, block * 32 + 2 * byte] = E2M1[code & 15] * scale
        expected[*row, block * 32 + 2 * byte + 1] = E2M1[code >> 4] * scale
    named = {"w_blocks": torch.from_numpy(blocks), "w_scales": torch.from_numpy(scales)}
    tensors = stored(tmp_path, named, MXFP4)
    assert list(tensors) == ["w"]
    assert tensors["w"].shape == (2, 6, 96)
    reader = TensorReader(FileSource())
    assert np.array_equal(reader.whole(tensors["w"], torch.float32).numpy(), expected)
    rows = list(reader.pieces(tensors["w"].item(1), 2, 5, torch.float32))
    assert np.array_equal(torch.cat(rows).numpy(), expected[1, 2:5])


def test_mxfp4_scale_255_is_nan(tmp_path: Path) -> None:
    named = {
        "w_blocks": torch.full((1, 1, 16), 0x22, dtype=torch.uint8),
        "w_scales": torch.tensor([[255]], dtype=torch.uint8),
    }
    tensors = stored(tmp_path, named, MXFP4)
    assert TensorReader(FileSource()).whole(tensors["w"], torch.float32).isnan().all()


def test_e2m1_values() -> None:
    for code in range(16):
        sign, exponent, mantissa = -1.0 if code >> 3 else 1.0, code >> 1 & 3, code & 1
        value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert E2M1[code] == sign * value

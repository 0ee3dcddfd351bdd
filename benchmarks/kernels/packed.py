"""What packed rows stand for, in torch, where numpy would take minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moec.formats import Quantized, dequantize, row_layout
from moec.formats.rows import BLOCK

if TYPE_CHECKING:
    from moec.formats import Format


def dequantize_rows(kind: Format, packed: torch.Tensor, columns: int) -> torch.Tensor:
    """``[N, columns]`` in float64; ``packed`` is ``[N, row_bytes]`` bytes."""
    place, rows = row_layout(kind, columns), packed.shape[0]
    codes = packed[:, : place.codes_bytes].long()
    if kind.bits == 4:
        blocks = codes.reshape(rows, -1, BLOCK // 2)
        codes = torch.stack((blocks & 15, blocks >> 4), 2).reshape(rows, -1)
    values = _values(kind).to(packed.device)[codes[:, :columns]]
    if kind.zero_points:
        points = packed[:, place.zeros_offset : place.zeros_offset + place.groups].double()
        values -= _spread(kind, points, columns)
    stored = packed[:, place.scales_offset : place.zeros_offset].contiguous()
    scales = torch.exp2(stored.double() - 127)
    if kind.scale != "e8m0":
        scales = stored.view(getattr(torch, kind.scale)).double()
    return values * _spread(kind, scales, columns)


def _spread(kind: Format, each: torch.Tensor, columns: int) -> torch.Tensor:
    return each.repeat_interleave(kind.group, 1)[:, :columns]


def _values(kind: Format) -> torch.Tensor:
    """What each code stands for, with a scale of 1 and where there are zero points with one of 0."""
    codes = np.arange(1 << kind.bits, dtype=np.uint8)[:, None]
    if kind.codes == "int8":
        codes = codes.view(np.int8)
    one = np.full(
        (len(codes), 1), 127 if kind.scale == "e8m0" else 1, np.uint8 if kind.scale == "e8m0" else np.float32
    )
    zeros = np.zeros((len(codes), 1), np.uint8) if kind.zero_points else None
    return torch.from_numpy(dequantize(kind, Quantized(codes, one, zeros))[:, 0]).double()

"""Codes of a quantized checkpoint carried over into rows of a format, bit for bit: no value is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moec.formats import Quantized, pack_rows

if TYPE_CHECKING:
    from moec.formats import Format


def carry_fp8(
    kind: Format, codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], first_row: int
) -> torch.Tensor:
    """Packed rows, uint8 ``[n, row_bytes]``, of FP8 with a scale a block; blocks at the edges may be smaller.

    Args:
        kind: a format with codes e4m3.
        codes: uint8 ``[n, K]``, rows ``first_row ..`` of the whole matrix.
        scales: float32 ``[s, ceil(K / block[1])]``, from the row of scales that ``first_row`` falls in.
        block: rows and columns that share a scale.
        first_row: of the whole matrix.
    """
    rows, columns = codes.shape
    begin = first_row // block[0]
    of_rows = np.arange(first_row, first_row + rows) // block[0] - begin
    of_groups = np.arange(0, columns, kind.group) // block[1]
    spread = scales.numpy()[of_rows][:, of_groups]
    return torch.from_numpy(pack_rows(kind, Quantized(codes.numpy(), spread)))


def carry_mxfp4(kind: Format, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Packed rows, uint8 ``[n, row_bytes]``, of MXFP4 (OCP Microscaling Formats 1.0).

    Args:
        kind: a format with codes e2m1.
        blocks: uint8 ``[n, G, 16]``, two codes a byte, the first in the low half.
        scales: uint8 ``[n, G]``, E8M0.
    """
    pairs = blocks.numpy()
    codes = np.stack((pairs & 15, pairs >> 4), -1).reshape(len(pairs), -1)
    return torch.from_numpy(pack_rows(kind, Quantized(codes, scales.numpy())))


def halves_in_order(rows: torch.Tensor, head: int) -> torch.Tensor:
    """Rows ``[n, bytes]`` of whole heads, of which each has the rows of its two halves in turn, half after half."""
    return rows.view(-1, head // 2, 2, rows.shape[-1]).transpose(1, 2).reshape(-1)

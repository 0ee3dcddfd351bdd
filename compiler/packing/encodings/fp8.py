"""FP8 with float scales: one for a block of rows and columns (DeepSeek-V3), for a row, or for the whole matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from moec.compiler.packing.encodings.errors import misfit
from moec.formats import FORMATS, Quantized, pack_rows

if TYPE_CHECKING:
    from moec.compiler.checkpoint.record import TensorEntry
    from moec.compiler.packing.encodings.record import Parts
    from moec.formats import Format

FORMAT = "fp8-e4m3"
_SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")


@dataclass(frozen=True)
class Fp8:
    """Codes of E4M3 in the shape of the weight, and a grid of scales; blocks at the edges may be smaller."""

    codes: TensorEntry
    scales: TensorEntry
    """``[..., ceil(N / block[0]), ceil(K / block[1])]``."""
    block: tuple[int, int]
    """Rows and columns that share a scale."""

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """All that is read."""
        return (self.codes, self.scales)

    @property
    def format(self) -> str | None:
        """Has a scale for 128 columns: blocks must be as wide as that or a multiple of it, or as the matrix."""
        wide = self.block[1]
        return FORMAT if wide % FORMATS[FORMAT].group == 0 or wide >= self.codes.shape[-1] else None

    @property
    def obstacle(self) -> str:
        """Why there is no format."""
        return "" if self.format else f"FP8 blocks {self.block[1]} columns wide"

    @property
    def row_step(self) -> int:
        """Rows of a block."""
        return self.block[0]

    def item(self, number: int) -> Fp8:
        """One of a batch."""
        return replace(self, codes=self.codes.item(number), scales=self.scales.item(number))

    def values(self, begin: int, end: int, parts: Parts) -> torch.Tensor:
        """Float32 ``[n, K]``."""
        weight = parts.rows(self.codes, begin, end).float()
        scale_blocks(weight, self._grid(begin, end, parts), self.block, begin)
        return weight

    def packed(self, kind: Format, begin: int, end: int, parts: Parts) -> torch.Tensor:
        """Rows of codes, with the scales of blocks repeated for each row."""
        codes = parts.rows(self.codes, begin, end).view(torch.uint8)
        return carry_fp8(kind, codes, self._grid(begin, end, parts), self.block, begin)

    def _grid(self, begin: int, end: int, parts: Parts) -> torch.Tensor:
        return parts.rows(self.scales, begin // self.block[0], -(-end // self.block[0])).float()


def fp8_in_blocks(name: str, codes: TensorEntry, scales: TensorEntry, block: tuple[int, int] | None) -> Fp8:
    """A weight of a batch of matrices or one; without ``block`` a matrix has one scale.

    Raises:
        CheckpointError: the scales do not fit.
    """
    if len(codes.shape) < 2:
        raise misfit(name, codes, scales, "a matrix")
    *batch, rows, columns = codes.shape
    whole = math.prod(scales.shape) == math.prod(batch)
    size = (rows, columns) if whole or block is None else block
    grid = (-(-rows // size[0]), -(-columns // size[1]))
    if math.prod(scales.shape) != math.prod(batch) * grid[0] * grid[1] or scales.dtype not in _SCALE_TYPES:
        raise misfit(name, codes, scales, f"floating point {(*batch, *grid)}")
    return Fp8(codes, replace(scales, shape=(*batch, *grid)), size)


def scale_blocks(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], first_row: int) -> None:
    """Multiply each block of ``weight`` by its scale, in place; blocks at the edges may be smaller.

    Args:
        weight: float32 ``[n, C]``, rows ``first_row ..`` of the whole matrix.
        scales: float32 ``[s, ceil(C / block[1])]``, from the row of scales that ``first_row`` falls in.
        block: rows and columns that share a scale.
        first_row: of the whole matrix.
    """
    rows, columns = block
    begin = first_row // rows * rows
    for row, scale in enumerate(scales):
        top = max(begin + row * rows, first_row) - first_row
        bottom = min(begin + (row + 1) * rows - first_row, weight.shape[0])
        weight[top:bottom] *= scale.repeat_interleave(columns)[: weight.shape[1]]


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

"""MXFP4 (OCP Microscaling Formats 1.0), as gpt-oss is published."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from moec.compiler.checkpoint.record import STORED_BYTES
from moec.compiler.packing.encodings.errors import misfit
from moec.formats import Quantized, pack_rows

if TYPE_CHECKING:
    from moec.compiler.checkpoint.record import TensorEntry
    from moec.compiler.packing.encodings.record import Parts
    from moec.formats import Format

BLOCK = 32
"""Values that share one scale in OCP's MX formats."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of a 4-bit float with two exponent bits and one of mantissa, by their code."""

_PAIRS = torch.tensor([[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)])  # [256, 2]


@dataclass(frozen=True)
class Mxfp4:
    """Two 4-bit values a byte, and one power of two for each 32 values of a row."""

    blocks: TensorEntry
    """U8 ``[..., G, 16]``, the first value of a byte in its low half."""
    scales: TensorEntry
    """E8M0 ``[..., G]``."""
    format = "mxfp4"
    obstacle = ""
    row_step = 1

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """All that is read."""
        return (self.blocks, self.scales)

    def item(self, number: int) -> Mxfp4:
        """One of a batch."""
        return replace(self, blocks=self.blocks.item(number), scales=self.scales.item(number))

    def values(self, begin: int, end: int, parts: Parts) -> torch.Tensor:
        """Float32 ``[n, K]``."""
        return unpack_mxfp4(*self._read(begin, end, parts))

    def packed(self, kind: Format, begin: int, end: int, parts: Parts) -> torch.Tensor:
        """Rows of codes."""
        return carry_mxfp4(kind, *self._read(begin, end, parts))

    def _read(self, begin: int, end: int, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        return parts.rows(self.blocks, begin, end), parts.rows(self.scales, begin, end).view(torch.uint8)


def mxfp4(name: str, blocks: TensorEntry, scales: TensorEntry) -> Mxfp4:
    """A weight of blocks and scales.

    Raises:
        CheckpointError: they do not fit each other.
    """
    values = 2 * blocks.shape[-1] if blocks.shape else 0
    if len(blocks.shape) < 3 or values != BLOCK or blocks.dtype != "U8":
        raise misfit(name, blocks, scales, "blocks of 16 bytes")
    if scales.shape != blocks.shape[:-1] or STORED_BYTES[scales.dtype] != 1:
        raise misfit(name, blocks, scales, f"one byte a block, {blocks.shape[:-1]}")
    return Mxfp4(blocks, scales)


def unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 ``[n, G * 32]`` of MXFP4 (OCP Microscaling Formats 1.0).

    Args:
        blocks: uint8 ``[n, G, 16]``, two values a byte, the first in the low half.
        scales: uint8 ``[n, G]``, E8M0: ``2 ** (byte - 127)``, 255 is NaN.
    """
    values = _PAIRS[blocks.reshape(-1).int()].view(*scales.shape, BLOCK)
    values *= scales.view(torch.float8_e8m0fnu).float().unsqueeze(-1)
    return values.view(scales.shape[0], -1)


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

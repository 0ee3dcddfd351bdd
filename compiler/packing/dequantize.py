"""Quantized weights to float32: FP8 with a scale a block (DeepSeek-V3), and MXFP4 (gpt-oss)."""

from __future__ import annotations

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of a 4-bit float with two exponent bits and one of mantissa, by their code."""

_PAIRS = torch.tensor([[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)])  # [256, 2]


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


def unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 ``[n, G * 32]`` of MXFP4 (OCP Microscaling Formats 1.0).

    Args:
        blocks: uint8 ``[n, G, 16]``, two values a byte, the first in the low half.
        scales: uint8 ``[n, G]``, E8M0: ``2 ** (byte - 127)``, 255 is NaN.
    """
    values = _PAIRS[blocks.reshape(-1).int()].view(*scales.shape, 32)
    values *= scales.view(torch.float8_e8m0fnu).float().unsqueeze(-1)
    return values.view(scales.shape[0], -1)

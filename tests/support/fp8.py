"""FP8 with a scale a block, as DeepSeek-V3 is published; blocks at the edges may be smaller."""

from __future__ import annotations

import torch

LARGEST = 448.0
"""Of E4M3."""


def fp8_blocks(value: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in FP8, and the scale of each block: what the block's largest value is over the format's."""
    rows, columns = block
    grid = torch.zeros(-(-value.shape[0] // rows), -(-value.shape[1] // columns))
    codes = torch.empty(value.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            place = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            part = value[place].float()
            grid[i, j] = part.abs().max() / LARGEST
            codes[place] = (part / grid[i, j]).to(torch.float8_e4m3fn)
    return codes, grid

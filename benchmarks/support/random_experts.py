"""Many experts of ordinary weights: more than caches hold, made in a second.

Needs numpy, torch, `moec.artifacts` and `moec.formats` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.random_weights.bundle import expert_pieces
from benchmarks.random_weights.values import SMALL_POOL_VALUES, RandomPools
from moec.artifacts.layout.experts import layout

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody

LINE_BYTES = 64


def random_experts(body: ExpertBody, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` experts with the same normal weights; their memory, and their addresses.

    Numbers matter: with those of no model a layer's results may be zero or subnormal, which processors compute at
    another speed.
    """
    stride = layout(body).stride_bytes
    memory = torch.zeros(count * stride + LINE_BYTES, dtype=torch.uint8)
    begin = -memory.data_ptr() % LINE_BYTES
    experts = memory[begin : begin + count * stride].view(count, stride)
    one = b"".join(expert_pieces(1, body, RandomPools(SMALL_POOL_VALUES), 0))
    experts[:] = torch.from_numpy(np.frombuffer(one, np.uint8).copy())
    first = memory.data_ptr() + begin
    return memory, torch.arange(count, dtype=torch.int64) * stride + first

"""Many experts of ordinary weights: more than caches hold, made in a second.

Needs numpy, torch and `moec.formats` alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.random_weights.values import SMALL_POOL_VALUES, RandomPools
from moec.artifacts.experts import layout

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
    experts[:] = torch.from_numpy(_expert(body))
    first = memory.data_ptr() + begin
    return memory, torch.arange(count, dtype=torch.int64) * stride + first


def _expert(body: ExpertBody) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    shape, pools = layout(body), RandomPools(SMALL_POOL_VALUES)
    expert = np.zeros(shape.stride_bytes, np.uint8)
    for part in shape.parts:
        if body.format is None:
            pieces = pools.pool(body.dtype).pieces(0, math.prod(part.shape))
        else:
            columns = body.intermediate if part.name == "down" else body.hidden
            pieces = pools.rows(body.format, columns).pieces(0, part.shape[0])
        place = part.offset_bytes
        for piece in pieces:
            expert[place : place + piece.nbytes] = np.frombuffer(piece, np.uint8)
            place += piece.nbytes
    return expert

"""Random experts in memory, quantized or not, and the kernels that read them through a table in the emulator."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moec.artifacts.layout.experts import layout
from moec.artifacts.model import ExpertBody
from moec.compiler.kernels import reference
from moec.compiler.kernels.cuda.experts.kernel import experts, workspace_bytes
from moec.formats import FORMATS, dequantize, pack_rows
from moec.runtime.tensors import aligned_empty, aligned_zeros
from tests.support.cuda_emulator import Emulated
from tests.support.formats import random_quantized

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MOST = 17
"""Experts that a token chooses, at most."""


@cache
def _kernel(body: ExpertBody, *, hopper: bool = False) -> Emulated:
    return Emulated(experts(body, MOST, hopper=hopper))


class Pool:
    """Experts in memory, the table of their addresses, and their parts as numbers."""

    def __init__(self, body: ExpertBody, count: int, generator: torch.Generator) -> None:
        self.body = body
        shape = layout(body)
        self.memory = aligned_empty((count * shape.stride_bytes,), np.uint8)
        self.memory[...] = 0xFF
        self.parts: list[dict[str, Any]] = []
        for expert in range(count):
            self.parts.append({})
            for part in shape.parts:
                stored, value = self._part(part.name, part.shape, generator)
                self.parts[-1][part.name] = value
                place = expert * shape.stride_bytes + part.offset_bytes
                self.memory[place : place + part.size_bytes] = stored
        self.table = aligned_empty((count,), np.int64)
        self.table[...] = self.memory.ctypes.data + np.arange(count) * shape.stride_bytes

    def _part(
        self, name: str, shape: tuple[int, ...], generator: torch.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """Bytes, and the numbers that they stand for."""
        body = self.body
        if body.format is not None and len(shape) == 2:
            columns = body.intermediate if name == "down" else body.hidden
            seed = int(torch.randint(1 << 30, (1,), generator=generator))
            quantized = random_quantized(FORMATS[body.format], shape[0], columns, seed)
            kind = FORMATS[body.format]
            return pack_rows(kind, quantized).reshape(-1), dequantize(kind, quantized).astype(float)
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        value = (torch.randn(shape, generator=generator) * scale).to(TYPES[body.dtype])
        return value.view(-1).view(torch.uint8).numpy(), value.double().numpy()

    def run(
        self, x: NDArray[Any], index: NDArray[Any], weight: NDArray[Any], *, hopper: bool = False
    ) -> NDArray[np.float32]:
        """What the kernel says."""
        fixed, each = workspace_bytes(self.body, MOST, len(self.parts))
        space = aligned_empty((fixed + each * len(x),), np.uint8)
        space[...] = 0xFF  # not a number, in every type
        out = aligned_empty(x.shape, np.float32)
        out[...] = 7
        name = f"experts_{self.body.name}" + ("_sm_90a" if hopper else "")
        kernel = _kernel(self.body, hopper=hopper)
        kernel(name, *map(_aligned, (x, index, weight)), self.table, space, out)
        return out

    def expected(self, x: NDArray[Any], index: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float64]:
        """What it should say."""
        return reference.experts(self.body, self.parts, x.astype(float), index, weight.astype(float))


def random_step(generator: torch.Generator, body: ExpertBody, tokens: int, chosen: int, high: int) -> Any:
    """Activations, choices among -1 .. high - 1, and their weights."""
    x = torch.randn(tokens, body.hidden, generator=generator).numpy()
    index = torch.randint(-1, high, (tokens, chosen), generator=generator).numpy()
    return x, index, torch.rand(tokens, chosen, generator=generator).numpy()


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    copy = aligned_zeros(array.shape, array.dtype)
    copy[...] = array
    return copy

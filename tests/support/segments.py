"""Small segments as fx graphs, and a way to run compiled modules in the compiler's tests."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import tvm_ffi
from torch.export import Dim

import moec.compiler.tracing.markers
from moec.artifacts.experts import layout
from moec.artifacts.model import ExpertBody, ModelRecord
from tests.support.graphs import GENERATION

if TYPE_CHECKING:
    from pathlib import Path

assert moec.compiler.tracing.markers.LINEAR == "moec.linear.default"


@dataclass(frozen=True)
class Graph:
    """A segment as partition gives it."""

    graph_module: torch.fx.GraphModule


class Norm(torch.nn.Module):
    """RMSNorm and a biased product, with the residual: ``(h [1, T, H], g [H], w [N, H], b [N])``."""

    def forward(self, h: Any, g: Any, w: Any, b: Any) -> tuple[Any, ...]:
        x = g * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
        return h + x, torch.ops.moec.linear(x, w, b)


class Embed(torch.nn.Module):
    """Rows of a table of any type, widened, and the table as the last matrix: ``(ids [1, T], table [V, H])``."""

    def forward(self, ids: Any, table: Any) -> tuple[Any, ...]:
        rows = torch.nn.functional.embedding(ids, table).to(torch.float32)
        return rows, torch.ops.moec.linear(rows, table, None)


class Router(torch.nn.Module):
    """Group-limited sigmoid routing: ``(x [T, H], w [E, H], bias [E])``."""

    def forward(self, x: Any, w: Any, bias: Any) -> tuple[Any, ...]:
        scores = torch.ops.moec.linear(x, w, None).sigmoid()
        choice = scores + bias
        groups = choice.view(-1, 4, 3).topk(2, dim=-1)[0].sum(-1)
        chosen = torch.topk(groups, k=2, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(groups).scatter_(1, chosen, 1).unsqueeze(-1).expand(-1, 4, 3).reshape(-1, 12)
        index = torch.topk(choice.masked_fill(~mask.bool(), float("-inf")), k=5, dim=-1)[1]
        weight = scores.gather(1, index)
        return index, weight / (weight.sum(-1, keepdim=True) + 1e-20)


def trace(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], tokens_axis: int) -> Graph:
    """Export ``module``; the first argument has T on ``tokens_axis``, the others are static."""
    dynamic = ({tokens_axis: Dim("T", min=1)}, *(None,) * (len(arguments) - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            module, arguments, dynamic_shapes=dynamic, strict=False
        ).run_decompositions({})
    return Graph(program.graph_module)


def bare_model() -> ModelRecord:
    """A model without attention or experts, for segments alone."""
    return ModelRecord("tiny", "TinyForCausalLM", "float32", 8, 8, 8, {}, (), (), (), (), (), 0, GENERATION)


class Module:
    """A compiled CPU module's segments, called with numpy arrays."""

    def __init__(self, path: Path) -> None:
        self._library = tvm_ffi.load_module(str(path))
        self._machine = self._library["vm_load_executable"]()
        self._machine["vm_initialization"](1, 0, 2)

    def __call__(self, name: str, *arguments: torch.Tensor) -> list[np.ndarray[Any, Any]]:
        given = [tvm_ffi.from_dlpack(_aligned_tensor(argument)) for argument in arguments]
        return [np.from_dlpack(value).copy() for value in self._machine[name](*given)]

    def experts(self, body: ExpertBody, x: torch.Tensor, parts: list[torch.Tensor]) -> np.ndarray[Any, Any]:
        """The experts kernel on one expert, with weight 1 for every token."""
        place = layout(body)
        memory = aligned(np.zeros(place.stride_bytes, np.uint8))
        for part, tensor in zip(place.parts, parts, strict=True):
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            memory[part.offset_bytes : part.offset_bytes + part.size_bytes] = data
        index, weight = np.zeros((len(x), 1), np.int64), np.ones((len(x), 1), np.float32)
        table, out = np.array([memory.ctypes.data]), np.empty(x.shape, np.float32)
        held = [aligned(array) for array in (x.numpy(), index, weight, table, out)]
        kernel = self._library.get_function(f"experts_{body.name}", query_imports=True)
        kernel(*(tvm_ffi.from_dlpack(array) for array in held))
        return held[-1]


def _aligned_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` at a 64-byte boundary; numpy has no bfloat16."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(aligned(data)).view(tensor.dtype).view(tensor.shape)


def aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy at a 64-byte boundary."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy: np.ndarray[Any, Any] = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy

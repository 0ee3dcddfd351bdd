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
from moec.artifacts.files.records import read_record
from moec.artifacts.layout.experts import layout
from moec.artifacts.model import ExpertBody, FunctionSpec, ModelRecord, TensorSpec
from moec.artifacts.paths import PROGRAM_NAME
from moec.artifacts.program import Operand, ProgramRecord, SegmentProgram, Shape, resolve, size_bytes
from moec.compiler.lowering.lower import MODULE_NAME
from moec.runtime.tensors import tensor_at
from tests.support.graphs import GENERATION

if TYPE_CHECKING:
    from collections.abc import Mapping
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


def bare_model(segments: Mapping[str, Graph] | None = None) -> ModelRecord:
    """A model without attention or experts, for segments alone: the first argument is the input."""
    functions = tuple(_function(name, graph) for name, graph in (segments or {}).items())
    return ModelRecord(
        "tiny", "TinyForCausalLM", "float32", 8, 8, 8, {}, functions, (), (), (), (), (), 0, GENERATION
    )


def _function(name: str, graph: Graph) -> FunctionSpec:
    nodes = list(graph.graph_module.graph.nodes)
    arguments = [_spec(node) for node in nodes if node.op == "placeholder"]
    (results,) = next(node for node in nodes if node.op == "output").args
    return FunctionSpec(name, (arguments[0],), tuple(arguments[1:]), tuple(map(_spec, results)))


def _spec(node: torch.fx.Node) -> TensorSpec:
    value = node.meta["val"]
    shape = tuple(extent if isinstance(extent, int) else "T" for extent in value.shape)
    return TensorSpec(str(value.dtype).removeprefix("torch."), shape)  # type: ignore[arg-type]


class Module:
    """A compiled CPU module's segments, called with torch tensors: the calls of its program, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._library = tvm_ffi.load_module(str(folder / MODULE_NAME))
        program = read_record(ProgramRecord, "program", folder / PROGRAM_NAME)
        self._segments = {segment.name: segment for segment in program.segments}

    def __call__(self, name: str, *arguments: torch.Tensor, inputs: int = 1) -> list[np.ndarray[Any, Any]]:
        segment = self._segments[name]
        tokens = self._tokens(segment, arguments, inputs)
        memory: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
        for number, argument in enumerate(arguments):
            place = ("input", number) if number < inputs else ("weight", number - inputs)
            memory[place] = aligned(argument.contiguous().reshape(-1).view(torch.uint8).numpy())
        for number, local in enumerate(segment.locals):
            memory["local", number] = _empty(local.dtype, local.shape, tokens)
        for number, output in enumerate(segment.outputs):
            memory["output", number] = _empty(output.dtype, output.shape, tokens)

        def tensor(operand: Operand) -> Any:
            address = memory[operand.source, operand.number].ctypes.data
            return tensor_at(address, operand.dtype, resolve(operand.shape, tokens))

        for call in segment.calls:
            self._library[call.function](*map(tensor, call.operands))
        return [np.from_dlpack(tensor(output)).copy() for output in segment.outputs]

    def _tokens(self, segment: SegmentProgram, arguments: tuple[torch.Tensor, ...], inputs: int) -> int:
        """T, from the first call that sees an input."""
        for call in segment.calls:
            for operand in call.operands:
                if operand.source == "input":
                    each = size_bytes(operand.dtype, operand.shape).each
                    argument = arguments[:inputs][operand.number]
                    return argument.numel() * argument.element_size() // each
        raise AssertionError("no call sees an input")

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


def _empty(dtype: str, shape: Shape, tokens: int) -> np.ndarray[Any, Any]:
    return aligned(np.full(size_bytes(dtype, shape).at(tokens), 0x7F, np.uint8))


def aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy at a 64-byte boundary."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy: np.ndarray[Any, Any] = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy

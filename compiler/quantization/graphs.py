"""The graph of a segment with some of its weights quantized: the operations that read them say so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moec.compiler.partition.records import SegmentGraph
from moec.compiler.partition.storage import EMBEDDING
from moec.compiler.tracing.markers import LINEAR

if TYPE_CHECKING:
    from moec.artifacts.model import FunctionSpec


def quantize_graph(segment: SegmentGraph, spec: FunctionSpec) -> SegmentGraph:
    """A copy of ``segment`` that takes its weights as ``spec`` has them, under that name."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(segment.graph_module.graph, {}))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, weight in zip(placeholders[len(spec.inputs) :], spec.weights, strict=True):
        if weight.format is None:
            continue
        stored = weight.stored
        node.meta = {
            **node.meta,
            "val": torch.empty([int(size) for size in stored.shape], dtype=torch.uint8, device="meta"),
        }
        for user in list(node.users):
            if str(user.target) == LINEAR:
                x, matrix, bias = [*user.args, None][:3]
                user.args = (x, matrix, bias, weight.format)
            else:
                assert str(user.target) == EMBEDDING, "weights of other operations are not quantized"
                _look_up(graph, user, weight.format, int(weight.shape[1]))
    graph.lint()
    return SegmentGraph(spec.name, fx.GraphModule(torch.nn.Module(), graph), segment.symbol)


def _look_up(graph: fx.Graph, embedding: fx.Node, name: str, columns: int) -> None:
    """The lookup gives float32 at once: what widened its result goes."""
    table, ids = embedding.args[:2]
    with graph.inserting_before(embedding):
        target: Any = torch.ops.moec.lookup.default
        made = graph.call_function(target, (table, ids, columns, name))
    made.meta = {**embedding.meta, "val": embedding.meta["val"].float()}
    for user in list(embedding.users):
        if str(user.target) == "aten._to_copy.default":
            user.replace_all_uses_with(made)
            graph.erase_node(user)
    embedding.replace_all_uses_with(made)
    graph.erase_node(embedding)

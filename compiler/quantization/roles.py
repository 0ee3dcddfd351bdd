"""What each dense weight does in a partitioned model, as far as it can be quantized."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from moec.artifacts.layout.chain import CHAIN_OUTPUT, attention_weights
from moec.artifacts.steps import AttentionStep, ExpertsStep, SegmentStep, StateStep
from moec.compiler.partition.storage import EMBEDDING
from moec.compiler.tracing.markers import LINEAR

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import fx

    from moec.artifacts.ids import TensorName, ValueId
    from moec.artifacts.quantization import Role
    from moec.compiler.partition import PartitionedModel

RANKING: tuple[Role, ...] = ("router", "head", "embedding", "linear")
"""A weight with several roles (an embedding that is the head as well) has the first of them."""


def weight_roles(parts: PartitionedModel) -> dict[TensorName, Role]:
    """The role of each dense weight that kernels can take quantized.

    Those are matrices that are only multiplied with or looked up in. Left out are batches of matrices (a product for
    each head), the matrices of latent attention, and all that is no matrix.
    """
    found: dict[TensorName, set[Role | None]] = defaultdict(set)
    choices = {
        value
        for step in parts.model.all_steps
        if isinstance(step, ExpertsStep)
        for value in (step.index, step.weight)
    }
    attentions = {attention.name: attention for attention in parts.model.attentions}
    for step in parts.model.all_steps:
        if isinstance(step, SegmentStep):
            for name, role in zip(step.weights, _segment_roles(parts, step, choices), strict=True):
                found[name].add(role)
        elif isinstance(step, AttentionStep):
            for name in attention_weights(attentions[step.attention], step):
                found[name].add(None)
        elif isinstance(step, StateStep):
            for name in step.weights:
                found[name].add(None)
    shapes = {tensor.name: tensor.shape for tensor in parts.packing.dense}
    return {
        name: next(role for role in RANKING if role in roles)
        for name, roles in found.items()
        if None not in roles and len(shapes[name]) == 2
    }


def _segment_roles(
    parts: PartitionedModel, step: SegmentStep, choices: set[ValueId]
) -> Iterable[Role | None]:
    graph = parts.functions[step.function].graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    results = next(iter(reversed(graph.nodes))).args[0]
    made = dict(zip(step.outputs, results, strict=True))
    routers = _products_behind([node for value, node in made.items() if value in choices])
    heads = _products_behind([node for value, node in made.items() if value == CHAIN_OUTPUT])
    for weight in placeholders[len(step.inputs) :]:
        role = _use(weight)
        if role == "linear" and weight.users.keys() & routers:
            role = "router"
        elif role == "linear" and weight.users.keys() & heads:
            role = "head"
        yield role


def _use(weight: fx.Node) -> Role | None:
    uses = {_one_use(user, weight) for user in weight.users}
    return uses.pop() if len(uses) == 1 else None


def _one_use(user: fx.Node, weight: fx.Node) -> Role | None:
    others = [item for item in user.all_input_nodes if item is not weight]
    if str(user.target) == LINEAR and user.args[1] is weight and others:
        return "linear"
    return "embedding" if str(user.target) == EMBEDDING and user.args[0] is weight else None


def _products_behind(results: list[fx.Node]) -> set[fx.Node]:
    """The last products on every way to ``results``."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if str(node.target) == LINEAR:
            found.add(node)
        else:
            stack += node.all_input_nodes
    return found

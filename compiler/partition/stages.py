"""Third pass: which stage of the chain each node belongs to, and whether the stage's markers wait for it.

A stage is the work between two marker steps. ``stage(n) = max over inputs i of stage(i) + [i is a marker]``.
Work that no marker of its own stage needs is put off to where it is used, unless it holds a weight product:
then it becomes a side group, which may run while experts are fetched (shared experts are found like this). Products
of it whose input a product of the main group reads too are made with that one: one launch of a GPU does both.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.compiler.partition.nodes import is_marker, is_symbolic_int
from moec.compiler.tracing.markers import LINEAR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

VIEW = "aten.view.default"


@dataclass(frozen=True)
class Group:
    """Nodes of one segment, in order."""

    stage: int
    side: bool
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Staging:
    """The chain: for each stage its groups, then its markers."""

    groups: tuple[Group, ...]
    """By stage, the main group first."""
    markers: dict[int, tuple[fx.Node, ...]]


def assign_stages(graph: fx.Graph, passive: set[fx.Node]) -> Staging:
    """Group the nodes of a canonical graph.

    Args:
        graph: of a whole model.
        passive: nodes that are weights, or that segments compute anew for themselves.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function" and node not in passive]
    nodes = [node for node in nodes if not is_symbolic_int(node)]
    stage = _stages(nodes)
    markers = {k: tuple(n for n in nodes if is_marker(n) and stage[n] == k) for k in set(stage.values())}
    work = [node for node in nodes if not is_marker(node)]
    last = max(stage.values())
    needed = _needed(work, stage, markers)
    sides, together = _sides(work, stage, markers, needed)
    _put_off(work, stage, needed | sides | together, last)
    groups: list[Group] = []
    for k in range(last + 1):
        main = tuple(node for node in work if stage[node] == k and node not in sides)
        side = tuple(node for node in work if stage[node] == k and node in sides)
        groups += [Group(k, False, main)] if main else []
        groups += [Group(k, True, side)] if side else []
    return Staging(tuple(groups), {k: found for k, found in sorted(markers.items()) if found})


def assign_encoder_stages(graph: fx.Graph, passive: set[fx.Node], crossing: Sequence[fx.Node]) -> Staging:
    """Group what cross-attentions need of their source, an encoder's chain.

    After the encoder each cross-attention has a stage of its own, with what only its keys and values need, so that no
    more than one layer's exist at once. Arguments as for `assign_stages`.

    Args:
        graph: of a whole model.
        passive: see `assign_stages`.
        crossing: the cross-attentions, in order.
    """
    inside = source_nodes(graph, passive, crossing)
    ordered = [node for node in graph.nodes if node in inside]
    stage = _stages(ordered)
    last = max(stage.values(), default=0)
    readers: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    for node in reversed(ordered):
        for user in node.users:
            readers[node] |= {user} if user in crossing else readers[user] if user in inside else set()
    own: dict[fx.Node, list[fx.Node]] = {marker: [] for marker in crossing}
    for node in ordered:
        if len(readers[node]) == 1 and stage[node] == last and not is_marker(node):
            own[next(iter(readers[node]))].append(node)
    apart = {node for nodes in own.values() for node in nodes}
    base = assign_stages(graph, {node for node in graph.nodes if node not in inside or node in apart})
    groups, markers = list(base.groups), dict(base.markers)
    for number, (marker, nodes) in enumerate(own.items(), last + 1):
        groups += [Group(number, False, tuple(nodes))] if nodes else []
        markers[number] = (marker,)
    return Staging(tuple(groups), markers)


def source_nodes(graph: fx.Graph, passive: set[fx.Node], crossing: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that keys and values of the cross-attentions ``crossing`` are made from."""
    found: set[fx.Node] = set()
    stack = [item for marker in crossing for item in marker.all_input_nodes[1:]]
    while stack:
        node = stack.pop()
        if node.op == "call_function" and node not in passive and node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return {node for node in graph.nodes if node in found and not is_symbolic_int(node)}


def _stages(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    stage: dict[fx.Node, int] = {}
    for node in nodes:
        before = [stage[item] + is_marker(item) for item in node.all_input_nodes if item in stage]
        stage[node] = max(before, default=0)
    return stage


def _needed(
    work: list[fx.Node], stage: dict[fx.Node, int], markers: dict[int, tuple[fx.Node, ...]]
) -> set[fx.Node]:
    """Nodes that a marker of their own stage waits for; all of a stage without markers."""
    needed = {node for node in work if not markers[stage[node]]}
    for k, found in markers.items():
        stack = [item for marker in found for item in marker.all_input_nodes]
        while stack:
            node = stack.pop()
            if stage.get(node) == k and not is_marker(node) and node not in needed:
                needed.add(node)
                stack += node.all_input_nodes
    needed |= {node for node in work if node.target is operator.getitem and node.args[0] in needed}
    return needed


def _sides(
    work: list[fx.Node],
    stage: dict[fx.Node, int],
    markers: dict[int, tuple[fx.Node, ...]],
    needed: set[fx.Node],
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Connected nodes that no marker of their stage needs, where one of them is a weight product.

    Returns:
        What stays at the side, and what goes with the products of the main group.
    """
    left = {node for node in work if node not in needed and markers[stage[node]]}
    read = {_viewed(node)[0] for node in needed if str(node.target) == LINEAR}
    sides: set[fx.Node] = set()
    together: set[fx.Node] = set()
    while left:
        stack, component = [left.pop()], set()
        while stack:
            node = stack.pop()
            component.add(node)
            around = [*node.all_input_nodes, *node.users]
            fresh = [item for item in around if item in left and stage[item] == stage[node]]
            left.difference_update(fresh)
            stack += fresh
        own = _made_together(component, read)
        if _multiplies(component - own):
            sides |= component - own
            together |= own
        elif _multiplies(component):
            sides |= component
    return sides, together


def _multiplies(nodes: set[fx.Node]) -> bool:
    return any(str(node.target) == LINEAR for node in nodes)


def _made_together(component: set[fx.Node], read: set[fx.Node]) -> set[fx.Node]:
    """Products of a side group that read what a needed product has ``read``, with the views they read it through."""
    found: set[fx.Node] = set()
    for node in component:
        if str(node.target) == LINEAR:
            source, views = _viewed(node)
            if source in read and source not in component:
                found |= {node, *(view for view in views if view in component)}
    return found


def _viewed(product: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What a product's input looks at, and the views in between."""
    source, views = product.all_input_nodes[0], []
    while str(source.target) == VIEW:
        views.append(source)
        source = source.all_input_nodes[0]
    return source, views


def _put_off(work: list[fx.Node], stage: dict[fx.Node, int], fixed: set[fx.Node], last: int) -> None:
    """Move what nobody waits for to the first stage that uses it."""
    for node in reversed(work):
        if node in fixed or node.target is operator.getitem:
            continue
        parts = [user for user in node.users if user.target is operator.getitem]
        users = [user for item in (node, *parts) for user in item.users if user not in parts]
        stage[node] = min((stage.get(user, last) for user in users), default=last)
        for part in parts:
            stage[part] = stage[node]


def stage_users(staging: Staging) -> dict[fx.Node, set[int]]:
    """For each node, the places in ``staging.groups`` of the groups that use it, its own among them."""
    users: dict[fx.Node, set[int]] = defaultdict(set)
    for index, group in enumerate(staging.groups):
        for node in group.nodes:
            users[node].add(index)
            for item in node.all_input_nodes:
                users[item].add(index)
    return users

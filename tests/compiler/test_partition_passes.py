"""Passes one by one, on graphs made for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx

from moec.artifacts.ids import TensorName
from moec.artifacts.packing import DenseTensor, RecipeStep
from moec.compiler.packing.tensors.recipes import evaluate
from moec.compiler.partition.canonical import canonicalise
from moec.compiler.partition.folding import fold
from moec.compiler.partition.rowwise import check_rowwise
from moec.compiler.partition.segments import Functions, build_segment
from moec.compiler.partition.stages import assign_stages
from moec.compiler.tracing import markers
from moec.errors import UnsupportedModelError
from tests.support.graphs import H, record

if TYPE_CHECKING:
    from collections.abc import Callable


def wide(_: fx.Node) -> None:
    """Nothing is stored in a narrower type."""


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda w, x: torch.mm(x[0], w), [(H, 5)]),
        (lambda w, x: torch.mm(x[0], w.t()), [(5, H)]),
        (lambda w, b, x: torch.addmm(b, x[0], w), [(H, 5), (5,)]),
        (lambda w, x: torch.bmm(x, w), [(1, H, 5)]),
        (lambda w, x: torch.matmul(x, w), [(H, 5)]),
    ],
)
def test_weight_products_take_one_form(function: Callable[..., Any], shapes: list[tuple[int, ...]]) -> None:
    graph, symbol, weights = record(function, *shapes)
    canonicalise(graph, weights.__contains__)
    assert targets(graph).count(markers.LINEAR) == 1
    assert not {"aten.mm.default", "aten.bmm.default", "aten.addmm.default"} & set(targets(graph))
    dense, loose = fold(graph, weights.__contains__, lambda node: node.name, wide)
    assert not loose
    given = [torch.randn(shape) for shape in shapes]
    x = torch.randn(1, 3, H)
    nodes = tuple(
        n for n in graph.nodes if n.op == "call_function" and n not in dense and "sym" not in n.name
    )
    nodes = tuple(
        n
        for n in nodes
        if any((i.op == "placeholder" and i not in weights) or i in nodes for i in n.all_input_nodes)
    )
    (result,) = next(reversed(graph.nodes)).all_input_nodes
    segment = build_segment(nodes, (result,), dense.__contains__, loose, symbol)
    state = {node.name: value for node, value in zip(weights, given, strict=True)}
    module = fx.GraphModule(torch.nn.Module(), segment.graph)
    (got,) = module(x, *(evaluate(dense[node], lambda name: state[name]) for node in segment.weights))
    torch.testing.assert_close(got, function(*given, x))


def test_equal_work_is_done_once() -> None:
    graph, _, weights = record(lambda x: x.cos().unsqueeze(0) + x.cos().unsqueeze(0))
    canonicalise(graph, weights.__contains__)
    assert targets(graph) == ["aten.cos.default", "aten.unsqueeze.default", "aten.add.Tensor"]


def test_a_folded_weight_that_would_grow_stays_in_the_segment() -> None:
    graph, _, weights = record(lambda w, x: x + w.expand(64, H).sum(0) + w * 2, (1, H))
    canonicalise(graph, weights.__contains__)
    dense, loose = fold(graph, weights.__contains__, lambda node: node.name, wide)
    assert sorted(len(item.steps) for item in dense.values()) == [0, 1]
    assert {str(node.target) for node in loose} == {"aten.expand.default", "aten.sum.dim_IntList"}


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda x: x.cumsum(1), "works along the tokens"),
        (lambda x: x - x.mean(1, keepdim=True), "combines all tokens"),
        (lambda x: x / x.max(), "combines all tokens"),
        (lambda x: x.softmax(1), "works along the tokens"),
        (lambda x: x.sort(1)[0], "works along the tokens"),
        (lambda x: x[:, :1] * x, "combines all tokens"),
        (lambda x: x.flip(1), "works along the tokens"),
        (lambda x: torch.bmm(x, x.transpose(1, 2)), "pairs tokens with tokens"),
        (lambda x: torch.bmm(x.transpose(1, 2), x), "combines all tokens"),
        (lambda x: x + torch.arange(x.shape[1])[None, :, None], "counts the tokens"),
        (lambda x: x.view(H, -1).transpose(0, 1)[None] * x, "lays tokens out anew"),
        (lambda x: x.roll(1, 1), "aten.roll.default.*cannot tell"),
        (lambda x: torch.cat([x, x], 1), "works along the tokens"),
        (lambda x: x[0][x[0].argmax(-1)], "looks up in tokens"),
    ],
)
def test_mixing_tokens_is_refused(function: Callable[..., Any], problem: str) -> None:
    graph, symbol, _ = record(function)
    with pytest.raises(UnsupportedModelError, match=f"SomeModel: .*{problem}"):
        check_rowwise(graph, [symbol], "SomeModel")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(-1, H).softmax(-1).topk(2)[0].sum(-1),
        lambda x: torch.nn.functional.layer_norm(x, (H,)),
        lambda x: x.view(1, -1, 2, 4).transpose(1, 2).flip(-1),
        lambda x: torch.cat([x, x], -1).chunk(2, -1)[0] + torch.zeros_like(x),
        lambda x: torch.gather(x[0], 1, x[0].argsort(-1)[:, :2]),
        lambda x: torch.ones(H)[x[0].argsort(-1)] * x,
    ],
)
def test_rows_may_be_worked_on(function: Callable[..., Any]) -> None:
    graph, symbol, weights = record(function)
    canonicalise(graph, weights.__contains__)
    check_rowwise(graph, [symbol], "SomeModel")


def test_work_that_a_marker_does_not_wait_for_goes_to_the_side() -> None:
    def layer(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        flat = x[0]
        index = flat.topk(2)[1]
        routed = markers.experts(flat, index, flat[:, :2], "experts")
        result: torch.Tensor = routed * 2 + markers.linear(flat, w).sigmoid() + flat.cos()
        return result

    graph, _, weights = record(layer, (H, H))
    canonicalise(graph, weights.__contains__)
    dense, loose = fold(graph, weights.__contains__, lambda node: node.name, wide)
    staging = assign_stages(graph, loose | set(dense))
    kinds = [
        (group.stage, group.side, [str(node.target) for node in group.nodes]) for group in staging.groups
    ]
    assert kinds[1] == (0, True, [markers.LINEAR, "aten.sigmoid.default"])
    assert "aten.cos.default" in kinds[2][2]  # cheap and unneeded: put off to where it is used
    assert [group.stage for group in staging.groups] == [0, 0, 1]


def test_a_product_of_the_side_that_reads_what_a_needed_one_reads_goes_with_it() -> None:
    """As a shared expert's first product and the router do; what follows stays at the side."""

    def layer(r: torch.Tensor, v: torch.Tensor, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        normed = x.sigmoid()
        flat = normed.view(-1, H)
        index = markers.linear(flat, r).topk(2)[1]
        routed = markers.experts(flat, index, flat[:, :2], "experts")
        result: torch.Tensor = routed + markers.linear(markers.linear(normed, v).exp(), w)[0]
        return result

    graph, _, weights = record(layer, (H, H), (H, H), (H, H))
    canonicalise(graph, weights.__contains__)
    dense, loose = fold(graph, weights.__contains__, lambda node: node.name, wide)
    main, side, _ = assign_stages(graph, loose | set(dense)).groups
    assert [str(node.target) for node in side.nodes][:2] == ["aten.exp.default", markers.LINEAR]
    assert [str(node.target) for node in main.nodes].count(markers.LINEAR) == 2


def test_segments_are_equal_whatever_their_place() -> None:
    graph, symbol, weights = record(
        lambda v, w, x: markers.linear(markers.linear(x, v).exp(), w).exp(), (H, H), (H, H)
    )
    dense, loose = fold(graph, weights.__contains__, lambda node: node.name, wide)
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    functions = Functions.empty()
    names = [
        functions.add(build_segment(tuple(pair), (pair[1],), dense.__contains__, loose, symbol), symbol)
        for pair in (nodes[:2], nodes[2:])
    ]
    assert names == ["segment_0", "segment_0"]
    other = build_segment((nodes[0],), (nodes[0],), dense.__contains__, loose, symbol)
    assert functions.add(other, symbol) == "segment_1"


def test_a_recipe_is_checked() -> None:
    weight = torch.arange(6.0).view(2, 3)
    turn = RecipeStep("aten.transpose.int", ({"ref": 0}, 0, 1))
    turned = DenseTensor(TensorName("w#1"), "float32", (3, 2), ("w",), (turn,))
    assert torch.equal(evaluate(turned, lambda _: weight), weight.T)
    with pytest.raises(ValueError, match="recorded as float32"):
        evaluate(replace(turned, shape=(3, 3)), lambda _: weight)
    unknown = replace(turned, steps=(RecipeStep("os.system", ("true",)),))
    with pytest.raises(ValueError, match=r"unknown operation os\.system"):
        evaluate(unknown, lambda _: weight)

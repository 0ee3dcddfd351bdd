"""Which weights stay in their storage type, and what recipes do for those that do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx

from moec.compiler.packing.tensors.recipes import evaluate
from moec.compiler.partition.canonical import canonicalise
from moec.compiler.partition.folding import fold
from moec.compiler.tracing import markers
from tests.support.graphs import H, record

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.packing import DenseTensor

V = 5


@dataclass(frozen=True)
class Folded:
    """What folding makes of a function whose weights are all stored in one type."""

    graph: fx.Graph
    dense: tuple[DenseTensor, ...]

    @property
    def dtypes(self) -> list[str]:
        return [item.dtype for item in self.dense]

    @property
    def steps(self) -> list[list[str]]:
        return [[step.op for step in item.steps] for item in self.dense]


def folded(
    function: Callable[..., Any], *shapes: tuple[int, ...], stored: torch.dtype | None = torch.bfloat16
) -> Folded:
    graph, _, weights = record(function, *shapes)
    canonicalise(graph, weights.__contains__)
    dense, _ = fold(graph, weights.__contains__, lambda node: node.name, lambda _: stored)
    graph.lint()
    return Folded(graph, tuple(dense.values()))


def lookup(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(x[..., 0].long(), table)


def test_the_matrix_of_a_product_is_narrow_and_its_bias_is_not() -> None:
    found = folded(lambda w, b, x: torch.nn.functional.linear(x[0], w, b), (V, H), (V,))
    assert {len(item.shape): item.dtype for item in found.dense} == {2: "bfloat16", 1: "float32"}
    (product,) = (node for node in found.graph.nodes if str(node.target) == markers.LINEAR)
    assert product.meta["val"].dtype == torch.float32
    assert product.args[1].meta["val"].dtype == torch.bfloat16


def test_rows_of_a_narrow_table_are_widened_at_once() -> None:
    found = folded(lambda table, x: lookup(table, x) + 1, (V, H))
    assert found.dtypes == ["bfloat16"]
    *_, rows, wide, plus = (node for node in found.graph.nodes if node.op == "call_function")
    assert (str(rows.target), rows.meta["val"].dtype) == ("aten.embedding.default", torch.bfloat16)
    assert (str(wide.target), wide.meta["val"].dtype) == ("aten._to_copy.default", torch.float32)
    assert wide.kwargs == {"dtype": torch.float32}
    assert plus.args[0] is wide
    assert list(rows.users) == [wide]


def test_a_table_that_is_also_the_last_matrix_is_one_narrow_tensor() -> None:
    found = folded(lambda table, x: markers.linear(lookup(table, x), table), (V, H))
    assert found.dtypes == ["bfloat16"]


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: markers.linear(x, w) + (x.unsqueeze(2) * w).sum(-1),
        lambda w, x: lookup(w, x) * w[0] + x * w[:, 0],
        lambda w, x: markers.linear(x, w * 2),
        lambda w, x: markers.linear(x, torch.stack([w[0], w[1]])),
        lambda w, x: x * w[0],
    ],
    ids=["also-arithmetic", "rows", "scaled", "stacked", "arithmetic"],
)
def test_what_is_computed_with_is_wide(function: Callable[..., Any]) -> None:
    found = folded(function, (H, H))
    wide = [item for item in found.dense if item.dtype == "float32"]
    assert wide
    weight = torch.randn(H, H).bfloat16()
    for item in wide:
        source = weight if any(step.op == "aten._to_copy.default" for step in item.steps) else weight.float()
        assert evaluate(item, lambda _, value=source: value).dtype == torch.float32  # type: ignore[misc]


def test_a_weight_that_is_also_computed_with_is_wide_everywhere() -> None:
    found = folded(lambda w, x: markers.linear(x, w) + (x.unsqueeze(2) * w).sum(-1), (H, H))
    assert found.dtypes == ["float32"]
    assert found.steps == [[]]


def test_a_recipe_widens_a_source_that_is_narrow_elsewhere() -> None:
    found = folded(lambda w, x: markers.linear(x, w) + x * (w[1] + 1), (H, H))
    assert found.dtypes == ["bfloat16", "float32"]
    assert found.steps == [[], ["aten._to_copy.default", "aten.select.int", "aten.add.Tensor"]]
    weight = torch.randn(H, H).bfloat16()
    assert torch.equal(evaluate(found.dense[1], lambda _: weight), weight[1].float() + 1)


def test_halves_of_a_matrix_stay_narrow() -> None:
    def latent(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        keys, values = torch.split(w.view(2, 7, H), [4, 3], 1)
        absorbed = markers.linear(markers.linear(x.expand(2, -1, -1), keys), keys.transpose(1, 2))
        result: torch.Tensor = markers.linear(absorbed, values)
        return result

    found = folded(latent, (14, H))
    assert found.dtypes == ["bfloat16"] * 3
    assert not any("aten._to_copy.default" in steps for steps in found.steps)
    weight = torch.randn(14, H).bfloat16()
    keys, values = torch.split(weight.view(2, 7, H), [4, 3], 1)
    made = [evaluate(item, lambda _: weight) for item in found.dense]
    for expected in (keys, keys.mT, values):
        assert any(torch.equal(expected, value) for value in made if value.shape == expected.shape)


@pytest.mark.parametrize("stored", [None, torch.float32])
def test_constants_and_wide_parameters_stay_as_they_are(stored: torch.dtype | None) -> None:
    found = folded(lambda w, x: markers.linear(lookup(w, x), w), (H, H), stored=stored)
    assert found.dtypes == ["float32"]
    assert "aten._to_copy.default" not in [
        str(n.target) for n in found.graph.nodes if n.kwargs.get("dtype") == torch.float32
    ]


def test_parts_of_differently_stored_weights_are_not_mixed() -> None:
    graph, _, weights = record(lambda v, w, x: markers.linear(markers.linear(x, v), w), (H, H), (H, H))
    canonicalise(graph, weights.__contains__)
    types = dict(zip(weights, (torch.float16, torch.float32), strict=True))
    dense, _ = fold(graph, weights.__contains__, lambda node: node.name, types.get)
    assert [item.dtype for item in dense.values()] == ["float16", "float32"]

"""What steps of many tokens have to do, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moec.artifacts.model import AttentionSpec, LatentHeads, ModelRecord
from moec.planning.costs.work import Products, attention_operations, step_work
from tests.support.tiny_bundle import tiny_model

H, V, HEADS, D = 16, 24, 2, 8
TOKENS = 10


def test_operations_by_hand() -> None:
    work = step_work(tiny_model(((8, 2, 8),)))
    products = TOKENS * (H * H + 2 * 3 * H * 8) + V * H
    pairs = TOKENS * (TOKENS + 1) / 2
    assert work.operations(TOKENS) == pytest.approx(2 * products + 2 * pairs * HEADS * (D + D))
    assert (work.last_operations, work.last_bytes) == (2 * V * H, 4 * V * H)


def test_rows_between_products_by_hand() -> None:
    work = step_work(tiny_model(((8, 2, 8),)))
    # The embedding; queries, keys and values, two choices as index and weight; what was attended to; the experts' sum.
    outputs = 4 * H + 3 * 4 * HEADS * D + 2 * (8 + 4) + 4 * HEADS * D + 4 * H
    assert work.row_bytes == outputs + 4 * H
    assert work.layers[0].row_bytes == 2 * (2 * H + 2 * 8 + 4 * H)


def test_quantized_weights_have_as_many_operations_as_plain_ones() -> None:
    model = tiny_model(((8, 2, 32),))
    plain, packed = step_work(model), step_work(quantized(model))
    assert packed.layers[0].products == Products(0, 2 * 3 * H * 32)
    assert (packed.dense.plain, packed.dense.quantized) == (0, plain.dense.plain)
    assert packed.operations(TOKENS) == plain.operations(TOKENS)


def quantized(model: ModelRecord) -> ModelRecord:
    """The same with experts in int4, and int8 for what is between them."""
    functions = tuple(
        replace(each, weights=tuple(replace(spec, format="int8-g32") for spec in each.weights))
        if each.name.startswith("layer")
        else each
        for each in model.functions
    )
    bodies = tuple(replace(body, format="int4-g32") for body in model.bodies)
    return replace(model, functions=functions, bodies=bodies)


@pytest.mark.parametrize("limits", [{}, {"window": 3}, {"causal": False}])
def test_attention_counts_the_positions_that_are_seen(limits: dict[str, int]) -> None:
    spec = AttentionSpec("a", HEADS, 1, D, D, 0.5, 0, 0, 0.0, False, False, "float16", None)
    spec = replace(spec, **limits)  # type: ignore[arg-type]
    seen = sum(
        (not spec.causal or key <= query) and (not spec.window or query - key < spec.window)
        for query in range(TOKENS)
        for key in range(TOKENS)
    )
    assert attention_operations(spec, TOKENS) == 2 * seen * HEADS * (D + D)


def test_latents_are_expanded_once() -> None:
    latent = AttentionSpec(
        "a", HEADS, 1, 20, 16, 0.5, 0, 0, 0.0, False, True, "float16", LatentHeads(6, 5, "float16")
    )
    pairs = TOKENS * (TOKENS + 1) / 2
    heads = 2 * pairs * HEADS * (6 + 4 + 5)
    assert attention_operations(latent, TOKENS) == heads + 2 * TOKENS * HEADS * 16 * (6 + 5)
    work = step_work(replace(tiny_model(((8, 2, 8),)), attentions=(replace(latent, name="attn"),)))
    assert work.expanded_bytes(TOKENS) == 2 * 2 * TOKENS * HEADS * (6 + 5)

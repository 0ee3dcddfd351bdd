"""What a model takes and reads, from its records alone."""

from __future__ import annotations

import dataclasses

from moec.artifacts.ids import TensorName
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.steps import SegmentStep
from tests.support.tiny_bundle import HEADS, H, V, tiny_model


def test_facts_of_the_tiny_model() -> None:
    facts = footprint(tiny_model())
    assert facts.dense_bytes == 4 * (V * H + 2 * H * H)
    assert facts.dense_bytes_per_token == facts.dense_bytes, (
        "the embedding is tied: the last product reads it"
    )
    assert facts.cache_bytes(33) == 2 * facts.cache_page_bytes
    assert facts.cache_page_bytes == 2 * 32 * HEADS * (8 + 8) * 4
    state, heads, routed = 4 * H, 4 * HEADS * 8, 2 * (8 + 4)
    # In a layer's segment: the state, q, k, v and the routing, all of them once more, and a product of its matrix;
    # or, later, the attention's result beside q, k and v; or two experts' gate and up beside the routing.
    segment, attention = 2 * (state + 3 * heads + routed) + 4 * H, state + 4 * heads + routed
    experts = 2 * state + routed + 4 * 2 * 2 * 8
    assert facts.activation_bytes_per_token == max(segment, attention, experts)
    assert facts.logits_bytes_per_row == 2 * state + 4 * V + 4 * V
    assert (
        facts.activation_bytes(200)
        == facts.activation_bytes(200, sequences=128)
        == 200 * facts.activation_bytes_per_token + 128 * facts.logits_bytes_per_row
    )
    assert facts.activation_bytes(200, sequences=129) == facts.activation_bytes(200) + 2 * 129 * 4 * V


def test_an_embedding_of_its_own_costs_one_row() -> None:
    model = tiny_model()
    last = model.steps[-1]
    assert isinstance(last, SegmentStep)
    untied = dataclasses.replace(last, weights=(TensorName("head"),))
    facts = footprint(dataclasses.replace(model, steps=(*model.steps[:-1], untied)))
    assert facts.dense_bytes == 4 * (2 * V * H + 2 * H * H)
    assert facts.dense_bytes_per_token == 4 * (V * H + 2 * H * H + H)

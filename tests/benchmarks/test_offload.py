"""Routing that the benchmark of offloading forces."""

from __future__ import annotations

import numpy as np

from benchmarks.support.forced_routing import zipf_choices
from moec.artifacts.footprint import Footprint, LayerFootprint
from moec.artifacts.ids import LayerId

STEPS = 400


def facts(experts: int, layers: int, top_k: int) -> Footprint:
    own = tuple(LayerFootprint(LayerId(n), experts, top_k, 1, 1) for n in range(layers))
    return Footprint(own, *(0,) * 9)


def test_tokens_choose_distinct_experts_and_the_popular_ones_more_often() -> None:
    chosen = zipf_choices(facts(16, 3, 4), 1.0, STEPS)
    assert chosen.shape == (STEPS, 3, 4)
    assert ((chosen >= 0) & (chosen < 16)).all()
    assert all(len(set(row)) == 4 for row in chosen.reshape(-1, 4).tolist())
    for layer in range(3):
        counts = np.sort(np.bincount(chosen[:, layer].ravel(), minlength=16))[::-1]
        assert counts[0] > 2 * counts[6] > 0
    assert (chosen[:, 0] != chosen[:, 1]).any()


def test_no_exponent_is_no_preference() -> None:
    counts = np.bincount(zipf_choices(facts(8, 1, 2), 0.0, 4000).ravel(), minlength=8)
    assert counts.max() < 1.2 * counts.min()

"""Routing that the benchmark of offloading forces, and the ceiling of its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.support import host_ceiling
from benchmarks.support.forced_routing import zipf_choices
from moec.artifacts.ids import LayerId
from moec.artifacts.layout.footprint import Footprint, LayerFootprint
from tests.support.fake_driver import FakeDriver

if TYPE_CHECKING:
    import pytest

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


def test_memory_is_read_while_the_link_brings_it_and_all_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = FakeDriver(1 << 25)
    for name, value in {
        "COPY_BYTES": 1 << 24,
        "COPIES": 40,
        "READ_BYTES": 1 << 24,
        "CHUNK_BYTES": 1 << 20,
    }.items():
        monkeypatch.setattr(host_ceiling, name, value)
    speeds = host_ceiling.read_beside_link(driver, 0, 2)
    assert driver.log.count("copy_in") == 40
    assert speeds.link > 0
    assert speeds.read > 0
    assert speeds.together == speeds.link + speeds.read
    assert not any(driver.alive.values())
    assert not driver.blocks

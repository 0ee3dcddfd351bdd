"""Packing's resident memory is bounded, and does not depend on the model's size."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from benchmarks.pack_memory import generate, measure

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30


def test_memory_does_not_depend_on_size(tmp_path: Path) -> None:
    sizes = {"small": 50_000_000, "large": 200_000_000}
    for name, size_bytes in sizes.items():
        generate(tmp_path / name / "model", size_bytes)
    small, large = measure(*(tmp_path / name / "model" for name in sizes))
    assert large["packed_bytes"] > 2.5 * small["packed_bytes"]
    assert small["resident_peak_bytes"] - small["resident_before_bytes"] < 100 * MIB
    assert large["resident_peak_bytes"] - small["resident_peak_bytes"] < 20 * MIB


@pytest.mark.slow
def test_quantizing_holds_no_more_for_more_layers(tmp_path: Path) -> None:
    """One layer and three of the same shapes, by one thread: there is one for each core, and one more holds more."""
    generate(tmp_path / "small" / "model", 900_000_000)
    generate(tmp_path / "large" / "model", 2_500_000_000)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        small, large = measure(
            *(tmp_path / name / "model" for name in ("small", "large")), quantization="int4"
        )
    finally:
        os.sched_setaffinity(0, cores)
    assert large["packed_bytes"] > 2 * small["packed_bytes"]
    assert large["resident_peak_bytes"] - small["resident_peak_bytes"] < 40 * MIB


@pytest.mark.slow
def test_six_gigabytes_pack_under_one_and_a_half_gib(tmp_path: Path) -> None:
    assert generate(tmp_path / "model", 6_000_000_000) > 5_800_000_000
    result = measure(tmp_path / "model")[0]
    assert result["packed_bytes"] > 5_800_000_000
    assert result["resident_peak_bytes"] < 1.5 * GIB


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path) -> Iterator[None]:
    """Pytest keeps the folders of its last runs; these are too large for that."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)

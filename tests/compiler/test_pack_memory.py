"""Packing's resident memory is bounded, and does not depend on the model's size."""

from __future__ import annotations

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
def test_quantizing_holds_little_more(tmp_path: Path) -> None:
    """What a thread quantizes at once does not depend on the model either; there is a thread for each core."""
    generate(tmp_path / "small" / "model", 50_000_000)
    generate(tmp_path / "large" / "model", 200_000_000)
    folders = [tmp_path / name / "model" for name in ("small", "large")]
    small, large = measure(*folders, quantization="int4")
    assert large["packed_bytes"] > 2.5 * small["packed_bytes"]
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

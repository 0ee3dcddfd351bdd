from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.runtime.devices import measure


def test_reading_memory_takes_no_more_of_it_than_there_is_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    ones = np.ones

    def noting(count: int, dtype: Any) -> Any:
        sizes.append(8 * count)
        return ones(count, dtype)

    monkeypatch.setattr(np, "ones", noting)
    monkeypatch.setattr(measure, "available_memory", lambda: 8 << 20)
    assert measure.read_bandwidth(2) > 0
    assert measure.read_bandwidth(2, 4096) > 0
    assert sizes == [1 << 20, 4096]


def test_the_disk_is_measured_without_a_file_that_others_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Path]] = []
    monkeypatch.setattr(measure, "DISK_PROBE_BYTES", 1 << 16)
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(list(tmp_path.iterdir())))
    assert measure.disk_bandwidth(tmp_path) > 0
    assert seen == [[]]

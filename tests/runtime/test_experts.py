from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from moec.runtime.experts.tables import ExpertStore
from moec.runtime.machine.libraries import load_runtime
from moec.runtime.stats import Stats
from tests.support.expert_plans import LFRU, LRU, uniform_plans

EXPERTS, STRIDE = 16, 1 << 20


def resident_bytes(path: Path) -> int:
    """What of the mapping of ``path`` is in this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(path.name):
            return next(int(entry.split()[1]) * 1024 for entry in lines if entry.startswith("Rss:"))
    raise AssertionError("the file is not mapped")


def test_resident_memory_stays_within_the_budget(tmp_path: Path) -> None:
    load_runtime(1)
    path = tmp_path / "moec-resident-experts.bin"
    np.arange(EXPERTS, dtype=np.uint8).repeat(STRIDE).tofile(path)
    view = np.memmap(path, np.uint8, mode="r", shape=(EXPERTS, STRIDE))
    stats = Stats()
    store = ExpertStore([view], uniform_plans([(EXPERTS, 2, STRIDE)], 4 * STRIDE), stats, LRU)
    # The system may take pages back.
    assert 0 < resident_bytes(path) <= stats.bytes_moved == 4 * STRIDE
    addresses = np.from_dlpack(store.table(0)).tolist()
    for step in range(40):
        index = np.array([[step * 5 % EXPERTS, step * 3 % EXPERTS]])
        store.use(0, index)
        for expert in index[0].tolist():
            memory = np.frombuffer(
                memoryview((ctypes.c_uint8 * STRIDE).from_address(addresses[expert])), np.uint8
            )
            assert memory.max() == memory.min() == expert
        assert resident_bytes(path) <= 4 * STRIDE
    assert stats.evictions == stats.misses > 0
    assert stats.bytes_moved == (stats.misses + 4) * STRIDE


def test_choices_that_are_no_experts_count_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "experts.bin"
    np.zeros(3 * 4096, np.uint8).tofile(path)
    view = np.memmap(path, np.uint8, mode="r", shape=(3, 4096))
    stats = Stats()
    store = ExpertStore([view], uniform_plans([(3, 2, 4096)], 3 * 4096), stats, LFRU)
    store.use(0, np.array([[0, -1], [3, 2]]))
    assert (stats.hits, stats.misses) == (0, 2)
    store.use(0, np.array([[1, 7]]))
    store.use(0, np.array([[1, 7]]))
    assert (stats.hits, stats.misses) == (1, 3)

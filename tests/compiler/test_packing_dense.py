"""Where dense tensors lie, what is counted as not finite, and who may hold memory."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.artifacts.ids import TensorName
from moec.artifacts.packing import DenseTensor
from moec.compiler.packing.dense import plan_dense
from moec.compiler.packing.finite import nonfinite_values
from moec.compiler.packing.memory import MemoryGate


def tensor(name: str, count: int = 1, dtype: Any = "float32", *sources: str) -> DenseTensor:
    return DenseTensor(TensorName(name), dtype, (count,), sources or (name,), ())


def test_order_follows_the_checkpoint_and_shared_sources_stay_together() -> None:
    places = {"a": [("2", 0)], "b": [("1", 8)], "c": [("1", 0), ("2", 4)], "d": [("2", 4)], "e": []}
    plan = plan_dense([tensor(name) for name in places], lambda one: places[one.name])
    assert [[placed.tensor.name for placed in group] for group in plan.groups] == [
        ["e"],
        ["c", "d"],
        ["b"],
        ["a"],
    ]


@given(st.lists(st.tuples(st.integers(0, 200), st.sampled_from(["float32", "bfloat16", "bool", "int64"]))))
def test_layout_is_aligned_without_holes(extents: list[tuple[int, str]]) -> None:
    tensors = [tensor(f"t{number}", count, dtype) for number, (count, dtype) in enumerate(extents)]
    plan = plan_dense(tensors, lambda _: [])
    assert len(plan.header) % 4096 == 0
    assert 8 + int.from_bytes(plan.header[:8], "little") == len(plan.header)
    header = json.loads(plan.header[8:])
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans)][: len(spans)]
    assert plan.size_bytes == len(plan.header) + max((end for _, end in spans), default=0)
    for group in plan.groups:
        for placed in group:
            assert placed.begin % 64 == 0
            assert [at + len(plan.header) for at in header[placed.tensor.name]["data_offsets"]] == [
                placed.begin,
                placed.end,
            ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1, 5, 70_000, 200_001])
def test_nonfinite_values_are_counted(dtype: torch.dtype, size: int) -> None:
    values = torch.randn(size).to(dtype)
    values[0] = torch.finfo(dtype).max
    assert nonfinite_values(values) == 0
    bad = torch.randperm(size)[: min(size, 7)]
    values[bad] = torch.tensor([float("nan"), float("inf"), float("-inf")] * 3)[: len(bad)].to(dtype)
    assert nonfinite_values(values) == len(bad)


def test_integers_are_finite() -> None:
    assert nonfinite_values(torch.full((9,), -1)) == 0


def test_gate_lets_only_so_much_be_held() -> None:
    gate = MemoryGate(10)
    held, peak, lock = [0], [0], threading.Lock()

    def work(size_bytes: int) -> None:
        for _ in range(50):
            gate.hold(size_bytes)
            with lock:
                held[0] += size_bytes
                peak[0] = max(peak[0], held[0])
            with lock:
                held[0] -= size_bytes
            gate.hold(0)

    threads = [threading.Thread(target=work, args=(size,)) for size in (4, 5, 6, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert peak[0] == 30  # the one that wants more than the limit, alone

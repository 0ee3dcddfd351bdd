"""Shapes of the GGUF that llama.cpp is given, and the search for what a budget holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.make_checkpoint import CONFIGS
from benchmarks.memory_budgets import combinations
from benchmarks.peers.__main__ import BUDGETS, cache_words
from benchmarks.peers.gguf_model import BLOCKS, file_bytes, tensors
from benchmarks.peers.llama import LlamaCpp
from benchmarks.peers.on_cpu import compared
from benchmarks.peers.ours import KINDS
from benchmarks.random_weights.checkpoint import published_tensors
from benchmarks.support.work import Work

CONFIG = CONFIGS["deepseek-v2-lite"]
LAYER = 64 * 3 * 2048 * 1408 * 2
BESIDE = 3 << 30


def test_a_gguf_has_every_weight_of_the_checkpoint_once() -> None:
    config = json.loads(CONFIG.read_bytes())
    ours = sum(tensor.count for tensor in tensors(config))
    theirs = published_tensors(CONFIG, "bfloat16")
    assert ours == sum(math.prod(tensor.shape) for tensor in theirs)
    assert len({tensor.name for tensor in tensors(config)}) == len(tensors(config))


@pytest.mark.parametrize("kind", BLOCKS)
def test_quantized_rows_are_whole_blocks(kind: str) -> None:
    for tensor in tensors(json.loads(CONFIG.read_bytes())):
        block = 1 if tensor.plain else BLOCKS[kind][0]
        assert tensor.shape[-1] % block == 0
        assert file_bytes(tensor, kind) > 0


class Pretended(LlamaCpp):
    """Takes what its layers on the GPU take, and something beside."""

    def run(self, work: Work, on_cpu: int, mode: str = "copy", repeats: int = 1) -> dict[str, Any]:
        return {"gpu_bytes": BESIDE + (27 - max(on_cpu, 1)) * LAYER, "layers": on_cpu}


@pytest.mark.parametrize(("budget", "left"), [(12 << 30, 18), (8 << 30, 22), (64 << 30, 0), (1 << 30, 26)])
def test_as_many_layers_as_a_budget_holds_are_on_the_gpu(budget: int, left: int) -> None:
    llama = Pretended(Path(), json.loads(CONFIG.read_bytes()), "bf16", Path(), 1)
    found = llama.best(Work(1, 512, 8), budget)
    assert found["layers on the CPU"] == left
    if budget > BESIDE:
        assert budget - LAYER < found["gpu_bytes"] <= budget or left == 0


def test_every_kind_has_a_format_of_llama_cpp_and_two_budgets() -> None:
    assert set(KINDS.values()) == set(BLOCKS)
    assert [budget.partition("=")[0] for budget in BUDGETS] == [kind for kind in KINDS for _ in range(2)]


def test_a_row_says_who_had_the_missing_experts() -> None:
    assert (
        cache_words({"hits": 30, "misses": 10, "cpu_misses": 4}) == "75% hits, 40% of the misses by the CPU"
    )
    assert cache_words({"hits": 0, "misses": 10, "cpu_misses": 0}) == "0% hits"
    assert cache_words({"hits": 0, "misses": 0, "cpu_misses": 0}) == "0% hits"


def test_combinations_are_random_and_the_same_again() -> None:
    made = combinations(200, 0)
    assert made == combinations(200, 0)
    assert made != combinations(200, 1)
    assert all(one.step_tokens > one.max_batch for one in made)
    assert len({one.max_batch for one in made}) == 16


def test_on_a_cpu_the_fastest_runs_are_compared() -> None:
    ours = [
        {"target": "cpu", "first_token_seconds": first, "step_seconds": step}
        for first, step in ((3, 1), (2, 4))
    ]
    theirs = [{"first_token_seconds": 3.0, "step_seconds": 0.5}]
    row = compared(ours, theirs)
    assert (row["moec prompt ms"], row["moec ms/token"], row["target"]) == (2000, 1000, "cpu")
    assert (row["ratio, prompt ms"], row["ratio, ms/token"]) == (1.5, 0.5)

"""Which tokens of a step see expanded keys: the plan that the device makes, in the emulator."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from moec.compiler.kernels.cuda.attention.expanded import room as expanded_room
from moec.compiler.kernels.cuda.attention.expanded.plan import ALIGNED, LEAST_TOKENS, emit_plan
from moec.compiler.kernels.cuda.attention.expanded.room import (
    ALIGNMENT,
    MOST_RUNS,
    ROWS,
    RUN_WORDS,
    Room,
    carve,
)
from moec.compiler.kernels.cuda.attention.operands import declare
from moec.compiler.kernels.cuda.primitives import launch
from moec.compiler.kernels.emit import build, i64
from tests.kernels.cuda.test_attention import aligned
from tests.kernels.cuda.test_attention_heads import spec_of
from tests.support.cuda_emulator import Emulated

SPEC = spec_of(1, (8, 8, 8, 8), "float16")
PAGES = 400
FIRST_RUN = ALIGNMENT
FIRST_MARK = FIRST_RUN + 4 * RUN_WORDS * MOST_RUNS


@cache
def emulated(window: int, rounds: int, _rows: int) -> Emulated:
    spec = spec_of(1, (8, 8, 8, 8), "float16", window=window)

    def body() -> None:
        operands = declare(spec, workspace=True)
        assert operands.workspace is not None
        expanded, _ = carve(room(), operands.workspace, operands.tokens)
        with launch((1,), MOST_RUNS) as (_, thread):
            emit_plan(spec, operands, expanded, i64(rounds), thread)

    return Emulated(build("plan", body))


def room() -> Room:
    assert SPEC.heads is not None
    return Room(SPEC, SPEC.heads, 0, rounds=True)


def planned(
    pieces: list[tuple[int, int]], window: int = 0, rounds: int = 1
) -> tuple[list[list[int]], list[int]]:
    """For (cached, new) tokens of each sequence the chosen runs' words, and the marks of tokens."""
    sequence = np.repeat(np.arange(len(pieces)), [new for _, new in pieces])
    position = np.concatenate([np.arange(cached, cached + new) for cached, new in pieces])
    count = len(sequence)
    memory = aligned(np.full(room().fixed_bytes + room().token_bytes * count, 255), "uint8")
    zeros = [aligned(np.zeros(shape), dtype) for shape, dtype in _others(count)]
    table = aligned(np.zeros((len(pieces), PAGES)), "int32")
    q, k, cache_, absorb, expand, value, out = zeros
    places = aligned(sequence, "int32"), aligned(position, "int32")
    emulated(window, rounds, expanded_room.FIXED_ROWS)(
        "plan", q, k, cache_, table, *places, absorb, expand, value, memory, out
    )
    runs, tiles, rows, left = memory[:16].view(np.int32).tolist()
    words = memory[FIRST_RUN : FIRST_RUN + 4 * RUN_WORDS * runs].view(np.int32).reshape(runs, RUN_WORDS)
    marks = memory[FIRST_MARK : FIRST_MARK + 4 * count].view(np.int32).tolist()
    assert left == marks.count(0)
    assert tiles == sum(-(-(run[1] - run[0]) // ROWS) for run in words.tolist())
    assert rows >= sum(run[6] for run in words.tolist())
    return words.tolist(), marks


def _others(count: int) -> list[tuple[tuple[int, ...], str]]:
    return [
        ((1, count, 1, 16), "float32"),
        ((1, count, 1, 16), "float32"),
        ((1, 1, 32, 16), "float16"),
        *[((1, 8, 8), "float16")] * 3,
        ((1, count, 1, 8), "float32"),
    ]


def test_runs_that_are_long_enough_are_chosen() -> None:
    least = LEAST_TOKENS
    runs, marks = planned([(7, 1), (0, least), (90, least - 1), (130, 2 * least + 5), (3, 1)])
    assert [run[:5] for run in runs] == [
        [1, 1 + least, 0, 1, 0],
        [2 * least, 4 * least + 5, 130, 3, 0],
    ]
    assert [run[5:] for run in runs] == [[0, least, 0], [least, 4 * least, 1]]
    assert marks == [0] + [1] * least + [0] * (least - 1) + [1] * (2 * least + 5) + [0]


@pytest.mark.parametrize("shift", range(0, LEAST_TOKENS, 37))
def test_a_run_is_found_wherever_it_begins(shift: int) -> None:
    runs, marks = planned([(0, 1)] * shift + [(5, LEAST_TOKENS)] + [(0, 1)] * 3)
    assert [run[:2] for run in runs] == [[shift, shift + LEAST_TOKENS]]
    assert marks == [0] * shift + [1] * LEAST_TOKENS + [0] * 3


def test_short_runs_alone_are_not_chosen() -> None:
    assert planned([(50, 3)] * 60) == ([], [0] * 180)


def test_keys_begin_where_the_window_does() -> None:
    (run,), _ = planned([(1000, LEAST_TOKENS)], window=200)
    assert run[4] == (1000 - 199) // ALIGNED * ALIGNED
    assert run[6] == -(-(1000 + LEAST_TOKENS - run[4]) // ALIGNED) * ALIGNED


def test_runs_beyond_the_last_round_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expanded_room, "FIXED_ROWS", ROWS)
    least = LEAST_TOKENS
    capacity = ROWS + 3 * least * room().latent_bytes // room().position_bytes // ROWS * ROWS
    pieces = [(capacity, least), (capacity - 2 * least, least), (5, least)]
    runs, marks = planned(pieces)
    assert [run[3] for run in runs] == [1]
    assert marks == [0] * least + [1] * least + [0] * least
    runs, _ = planned(pieces, rounds=2)
    assert [run[3] for run in runs] == [0]
    runs, _ = planned(pieces, rounds=3)
    assert [run[3] for run in runs] == [0, 1, 2]

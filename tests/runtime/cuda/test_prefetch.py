"""Which weights are brought into the second-level cache before which attention."""

from __future__ import annotations

from typing import Any

from moec.artifacts.model import AttentionStep, ExpertsStep, SegmentStep
from moec.runtime.devices.cuda.prefetch import Range, following

WEIGHTS: Any = {
    "o": Range(0, 1000),
    "norm": Range(1008, 40),
    "router": Range(1088, 64),
    "unaligned": Range(2001, 640),
    "q": Range(4096, 640),
}


def segment(*weights: str) -> Any:
    return SegmentStep("segment", "f", (), weights, (), side=False)  # type: ignore[arg-type]


def attention() -> Any:
    return AttentionStep("attention", "a", 0, "q", "k", "v", None, "o")  # type: ignore[arg-type]


def experts() -> Any:
    return ExpertsStep("experts", 0, "h", "i", "w", "o")  # type: ignore[arg-type]


def test_weights_up_to_the_experts_in_order_of_use() -> None:
    steps = [segment("o", "norm"), segment("router"), experts(), segment("q")]
    assert following(steps, WEIGHTS, 10_000) == (Range(0, 992), Range(1008, 32), Range(1088, 64))


def test_nothing_beyond_the_next_attention() -> None:
    assert following([segment("o"), attention(), segment("q")], WEIGHTS, 10_000) == (Range(0, 992),)


def test_the_limit_cuts_the_last_range() -> None:
    assert following([segment("o", "q")], WEIGHTS, 1100) == (Range(0, 992), Range(4096, 96))
    assert following([segment("o", "q")], WEIGHTS, 0) == ()


def test_a_weight_is_named_once_and_only_where_the_instruction_reaches_it() -> None:
    assert following([segment("q", "unaligned", "q")], WEIGHTS, 10_000) == (Range(4096, 640),)


def test_no_more_ranges_than_a_call_takes() -> None:
    many: Any = {f"w{number}": Range(number * 64, 64) for number in range(20)}
    assert following([segment(*many)], many, 10_000) == tuple(many.values())[:8]

"""Which segments are known to pass values on to one other alone."""

from __future__ import annotations

from dataclasses import replace

from moec.artifacts.ids import LayerId, ValueId
from moec.artifacts.model import ModelRecord
from moec.artifacts.steps import ExpertsStep, SegmentStep, Step
from moec.compiler.lowering.links import Link, links_of
from tests.support.tiny_bundle import tiny_model


def segment(function: str, inputs: str, outputs: str) -> SegmentStep:
    made = [tuple(ValueId(name) for name in names.split()) for names in (inputs, outputs)]
    return SegmentStep("segment", function, made[0], (), made[1], False)


def experts(hidden: str, output: str) -> ExpertsStep:
    names = [ValueId(name) for name in (hidden, f"{output}i", f"{output}w", output)]
    return ExpertsStep("experts", LayerId(0), *names)


def layer(number: int, before: str) -> list[Step]:
    own = [f"{name}{number}" for name in ("n", "a", "b", "s", "e")]
    return [
        segment("first", before, " ".join(own[:3])),
        segment("side", f"{own[2]} {own[1]}", own[3]),
        experts(own[0], own[4]),
        segment("sum", f"{own[3]} {own[4]}", f"x{number}"),
    ]


def chain(*steps: Step, last: int) -> ModelRecord:
    return replace(tiny_model(), steps=steps, last_step=last)


def test_what_one_other_segment_alone_reads_is_passed_on() -> None:
    steps = [
        segment("embed", "tokens", "x"),
        *layer(0, "x"),
        *layer(1, "x0"),
        segment("head", "x1", "logits"),
    ]
    model = chain(*steps, last=len(steps) - 1)
    assert links_of(model) == (
        Link("first", "side", ((1, 1), (2, 0))),
        Link("side", "sum", ((0, 0),)),
    )


def test_what_others_read_too_or_elsewhere_is_not() -> None:
    steps = [*layer(0, "x"), *layer(1, "x0"), segment("head", "x1 b1", "logits")]
    assert Link("first", "side", ((1, 1),)) in links_of(chain(*steps, last=len(steps)))
    steps = [*layer(0, "x"), *layer(1, "x0"), experts("a0", "e2")]
    assert Link("first", "side", ((2, 0),)) in links_of(chain(*steps, last=len(steps)))
    steps = [*layer(0, "x"), *layer(1, "x0"), segment("side", "y z", "s9")]
    assert [link.first for link in links_of(chain(*steps, last=len(steps)))] == []


def test_what_crosses_into_the_last_part_is_not() -> None:
    steps = [*layer(0, "x"), *layer(1, "x0")]
    assert [link.first for link in links_of(chain(*steps, last=8))] == ["first", "side"]
    assert [link.first for link in links_of(chain(*steps, last=5))] == ["side"]
    assert [link.first for link in links_of(chain(*steps, last=3))] == ["first"]

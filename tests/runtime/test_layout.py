"""How long each tensor of a step is needed, on the fake chain and on real programs."""

from __future__ import annotations

import dataclasses

import pytest

from moec.artifacts.ids import ValueId
from moec.artifacts.layout.footprint import LOGIT_ROWS, footprint
from moec.artifacts.program import Operand
from moec.runtime.chain.arena import Lifetime, plan_arena
from moec.runtime.chain.layout import LocalKey, ValueKey, WorkspaceKey, chain_layout, crossing_values
from tests.support import fake_chain
from tests.support.canaries import most_slow
from tests.support.programs import chain_and_program
from tests.support.tiny_models import TINY


def main(name: str) -> ValueKey:
    return ValueKey("main", ValueId(name))


def last(name: str) -> ValueKey:
    return ValueKey("last", ValueId(name))


def test_lives_of_the_fake_chain() -> None:
    layout = chain_layout(fake_chain.record(), fake_chain.program(), tokens=10, rows=4)
    hidden, heads = 4 * fake_chain.HIDDEN, 4 * fake_chain.HEADS * fake_chain.WIDTH
    # Calls: 0 scatter, 1 attention, 2 combine, 3 route, 4 experts, 5 rows are gathered, 6 project, 7 logits are read.
    assert {life.key: (life.size_bytes, life.first, life.last) for life in layout.lifetimes} == {
        main("q"): (10 * heads, 0, 1),
        main("k"): (10 * heads, 0, 1),
        main("v"): (10 * heads, 0, 1),
        main("a"): (10 * heads, 1, 2),
        WorkspaceKey(1, 0): (40, 1, 1),
        LocalKey(2, 0): (10 * hidden, 2, 3),
        main("index"): (10 * 8 * fake_chain.TOP, 3, 4),
        main("weight"): (10 * 4 * fake_chain.TOP, 3, 4),
        WorkspaceKey(2, 1): (64 + 80, 3, 3),
        main("h"): (10 * hidden, 3, 7),
        main("e"): (10 * hidden, 4, 7),
        last("h"): (4 * hidden, 5, 6),
        last("e"): (4 * hidden, 5, 6),
        last("logits"): (4 * 4 * fake_chain.VOCAB, 6, 7),
    }


def test_views_lie_where_what_they_are_views_of_lies() -> None:
    record = fake_chain.program()
    segment = record.segments[1]
    shape = fake_chain.HEAD_SHAPE
    outputs = (Operand("input", 0, shape.dtype, ("T", fake_chain.HIDDEN)), *segment.outputs[1:])
    calls = (segment.calls[0], dataclasses.replace(segment.calls[1], operands=segment.calls[1].operands[2:]))
    changed = dataclasses.replace(segment, outputs=outputs, calls=calls)
    record = dataclasses.replace(record, segments=(record.segments[0], changed, record.segments[2]))
    layout = chain_layout(fake_chain.record(), record, tokens=10, rows=4)
    lives = {life.key: life for life in layout.lifetimes}
    assert layout.roots[main("h")] == main("a")
    assert layout.roots[last("h")] == last("h")
    assert main("h") not in lives
    # Needed as long as the view is: its rows are gathered after the experts.
    assert (lives[main("a")].first, lives[main("a")].last) == (1, 7)


def test_crossing_values() -> None:
    assert crossing_values(fake_chain.record()) == ["e", "h"]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("name", most_slow(TINY))
@pytest.mark.parametrize("tokens", [8, 128, 512])
def test_the_arena_is_within_the_planners_upper_bound(name: str, tokens: int, target: str) -> None:
    model, program = chain_and_program(name, target)
    rows = min(tokens, LOGIT_ROWS)
    lives = chain_layout(model, program, tokens, rows).lifetimes
    plan = plan_arena(lives)
    assert lower_bound(lives) <= plan.size_bytes <= footprint(model).activation_bytes(tokens)
    assert plan.size_bytes <= 1.5 * lower_bound(lives)


def lower_bound(lives: tuple[Lifetime, ...]) -> int:
    """The most that is needed at once."""
    calls = range(max(life.last for life in lives) + 1)
    return max(sum(life.size_bytes for life in lives if life.first <= call <= life.last) for call in calls)

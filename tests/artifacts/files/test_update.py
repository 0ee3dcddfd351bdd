from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from moec.artifacts.files.reader import open_bundle
from moec.artifacts.files.update import add_schedule, replace_schedules
from moec.artifacts.schedule import Budgets
from moec.artifacts.traces import join_traces
from moec.planning.planner import plan, plan_many
from tests.support.tiny_bundle import GPU, make_bundle, tiny_traces

if TYPE_CHECKING:
    from pathlib import Path


def test_a_schedule_is_added_and_the_bundle_stays_whole(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "out"))
    weights = bundle.path / "weights/experts-00000.bin"
    inode, view = weights.stat().st_ino, bundle.experts_view(bundle.model.experts[0].layer)
    before = view.tobytes()
    schedule = plan(bundle.traces(), bundle.model, Budgets(1 << 18, 1 << 20, 64, 8), GPU)
    add_schedule(bundle, schedule)
    again = open_bundle(bundle.path)
    assert again.schedule.schedules == (*bundle.schedule.schedules, schedule)
    assert weights.stat().st_ino == inode, "nothing was copied"
    assert view.tobytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_schedule_for_the_same_budgets_is_replaced(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "out"))
    last = bundle.schedule.schedules[-1]
    changed = dataclasses.replace(last, policy=dataclasses.replace(last.policy, name="lru", prior_tokens=0))
    add_schedule(bundle, changed)
    assert open_bundle(bundle.path).schedule.schedules == (*bundle.schedule.schedules[:-1], changed)


def test_traces_and_schedules_are_replaced_together(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "out"))
    own = bundle.traces()
    assert own is not None
    more = join_traces(own, tiny_traces(bundle.model, tokens=64, seed=9))
    budgets = Budgets(1 << 18, 1 << 20, 64, 8)
    replace_schedules(bundle, plan_many(more, bundle.model, [(GPU, budgets)]), more)
    again = open_bundle(bundle.path)
    traces = again.traces()
    assert traces is not None
    assert traces.tokens == again.schedule.profile.tokens == own.tokens + 64
    assert [schedule.budgets for schedule in again.schedule.schedules] == [budgets]

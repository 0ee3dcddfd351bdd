"""``moec plan`` and ``moec simulate`` on a bundle made by hand."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.__main__ import run
from moec.artifacts.files.bundle import Bundle
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.files.traces import save_traces
from moec.runtime.routing.ring import RoutingRing, write_traces
from tests.support.tiny_bundle import make_bundle, tiny_model, tiny_traces

MACHINES = Path(__file__).parents[2] / "examples" / "machines"
LAPTOP = str(MACHINES / "rtx-4060-laptop-8gb.json")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.moec")


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


class Checked(HTMLParser):
    """Text and tags; fails where a tag is closed that is not open, or anything comes from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert tag not in ("script", "link", "img", "iframe")
        for name, value in attrs:
            assert name not in ("src", "href") or (value or "").startswith("data:image/png;base64,")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(path: Path) -> Checked:
    page = Checked()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_a_plan_for_another_machine(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(bundle), "--machine", LAPTOP, "--device-memory", "1MiB"]
    schedule = answer(arguments, capsys)
    assert schedule["machine"]["name"] == "rtx-4060-laptop-8gb"
    assert schedule["prediction"]["hit_rate"] <= schedule["prediction"]["optimal_hit_rate"]
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert "policy       lrfu 16" in shown, "too little was traced to choose one"
    assert "predicted    hit rate" in shown


def test_a_plan_learns_from_recorded_traces(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = tiny_traces(tiny_model(), tokens=400, seed=5)
    save_traces(recorded, tmp_path / "mine.npz")
    before = open_bundle(bundle)
    arguments = ["plan", str(bundle), "--machine", LAPTOP, "--traces", str(tmp_path / "mine.npz")]
    dry = answer([*arguments, "--dry-run"], capsys)
    assert open_bundle(bundle).schedule == before.schedule
    assert answer(arguments, capsys) == dry
    after = open_bundle(bundle)
    assert after.schedule.profile.tokens == before.schedule.profile.tokens + 400
    assert len(after.schedule.schedules) == len(before.schedule.schedules) + 1
    for old, new in zip(before.schedule.schedules, after.schedule.schedules, strict=False):
        assert (old.machine, old.budgets) == (new.machine, new.budgets)
        assert not old.prediction.policies
        assert new.prediction.policies, "made anew: now there is enough to choose a policy by"
    assert answer(arguments, capsys) == dry, "the same traces are not learnt twice"


def test_traces_of_another_model_are_refused(bundle: Path, tmp_path: Path) -> None:
    save_traces(tiny_traces(tiny_model(((9, 2, 8),))), tmp_path / "other.npz")
    assert run(["plan", str(bundle), "--machine", LAPTOP, "--traces", str(tmp_path / "other.npz")]) == 6
    assert run(["simulate", str(bundle), "--traces", str(tmp_path / "other.npz")]) == 6


def test_simulate_wants_tokens(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Bundle, "traces", lambda _: None)
    write_traces(RoutingRing(tiny_model().experts, 4).traces(), tmp_path / "none.npz")
    for given, message in (
        ([], "has no routing traces"),
        (["--traces", str(tmp_path / "none.npz")], "has no tokens"),
    ):
        assert run(["simulate", str(bundle), *given]) == 6
        assert message in capsys.readouterr().err


def test_simulate_prints_and_draws(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "curves.html"
    arguments = ["simulate", str(bundle), "--synthetic", "topical", "--tokens", "200"]
    facts = answer([*arguments, "--html", str(page)], capsys)
    assert facts["tokens"] == 200
    assert {each["policy"]["name"] for each in facts["policies"]} == {"lru", "lfru", "lrfu", "lfu", "static"}
    assert len(facts["machines"]) == len(list(MACHINES.glob("*.json")))
    assert check_page(page).seen.count("svg") == 2
    for name in ("lru", "optimum", "rtx-4090-24gb"):
        assert name in page.read_text(encoding="utf-8")
    assert run([*arguments, "--machine", LAPTOP]) == 0
    shown = capsys.readouterr().out
    assert "optimum" in shown
    assert "rtx-4060-laptop-8gb" in shown
    assert "rtx-4090" not in shown


def test_simulate_replays_the_bundles_own_traces(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = open_bundle(bundle).traces()
    assert traces is not None
    facts = answer(["simulate", str(bundle)], capsys)
    assert facts["tokens"] == np.count_nonzero(~traces.prefill)
    assert facts["policies"][0]["hit_rates"][-1] == 1


def test_inspect_draws_a_page(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "bundle.html"
    assert run(["inspect", str(bundle), "--html", str(page)]) == 0
    assert "schedules" in capsys.readouterr().out
    # A heat map for each placement, one of transitions, the bars, two charts.
    seen = check_page(page).seen
    assert seen.count("svg") == 2 + 1 + 1 + 2
    assert seen.count("image") == 2 + 1
    text = page.read_text(encoding="utf-8")
    for heading in (
        "Where experts lie",
        "Who follows whom",
        "Memory on each tier",
        "Predicted speed over budgets",
    ):
        assert heading in text


def test_a_plan_for_several_gpus_divides_the_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one GPU with what they have together, but for what each needs by itself and its part of the CPU."""
    bundle = make_bundle(tmp_path / "tiny.moec")
    base = ["plan", str(bundle), "--machine", LAPTOP, "--dry-run", "--host-memory", "1GiB"]
    plan = answer([*base, "--device-memory", "80MiB,80MiB"], capsys)
    first, second = plan["gpus"]
    assert (first["first_layer"], first["last_layer"], second["first_layer"], second["last_layer"]) == (
        0,
        0,
        1,
        1,
    )
    assert plan["machine"]["gpu_name"].startswith("2 x ")
    assert plan["budgets"]["device_memory_bytes"] == 160 << 20
    assert run([*base, "--device-memory", "80MiB,80MiB"]) == 0
    assert "cuda:1       layers 1 to 1: " in capsys.readouterr().out
    assert "gpus" not in answer([*base, "--device-memory", "160MiB"], capsys)
    assert run([*base, "--device-memory", "80MiB,80MiB,80MiB,80MiB"]) == 8
    assert "cannot be divided among 4 GPUs" in capsys.readouterr().err

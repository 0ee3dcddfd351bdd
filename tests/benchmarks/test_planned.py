from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import planned
from tests.support.tiny_bundle import make_bundle

SCHEDULE = {
    "layers": [{"slots": 3}, {"slots": 2}],
    "prediction": {"milliseconds_per_token": 9.0, "hit_rate": 0.5},
}


def test_a_row_is_the_prediction_over_what_was_measured() -> None:
    assert planned.row_of(SCHEDULE, 10.0, 0.4) == {
        "slots": 5,
        "predicted hits": 0.5,
        "hits": 0.4,
        "predicted ms": 9.0,
        "ms": 10.0,
        "ratio": 0.9,
    }


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU to plan for")
def test_what_moec_plan_says_where_it_fails_is_said(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny.moec")
    with pytest.raises(RuntimeError, match="has no GPU to give --device-memory of"):
        planned.planned(bundle, "1GiB", tmp_path / "traces.npz")

"""The CPU's experts timed without a GPU, as `moec plan` does."""

from __future__ import annotations

import pytest

from moec.artifacts.files.reader import open_bundle
from moec.runtime.sharing import alone
from tests.end_to_end.conftest import BundleMaker


def test_a_bundles_experts_are_timed(make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(make_bundle("mixtral")[1])
    speed = alone.team_speed(bundle, 1)
    assert speed is not None
    assert speed.start_us >= 0
    assert 0 < speed.gb_s < 1000
    monkeypatch.setattr(alone, "available_memory", lambda: 1000)
    assert alone.team_speed(bundle, 1) is None

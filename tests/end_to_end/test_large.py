"""The largest model there is, without its weights, on a small machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.compile_large import compile_modules, write_config


@pytest.mark.slow
def test_deepseek_v3_compiles_within_four_gib(tmp_path: Path) -> None:
    (tmp_path / "v3").mkdir()
    write_config("deepseek_v3", tmp_path / "v3")
    row = compile_modules(tmp_path / "v3", tmp_path / "modules", "cpu")
    assert row["peak GiB"] < 4
    assert row["seconds"] < 600
    assert row["steps"] == 297
    assert row["distinct segments"] < 10

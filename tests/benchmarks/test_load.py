from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import load
from benchmarks.support import load_run
from tests.support.tiny_bundle import make_bundle

RATES = {"read": {"gb_s": 10.0}, "hash": {"gb_s": 2.0}}


def test_every_thread_reads_its_share_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_run, "PIECE_BYTES", 1000)
    bundle = make_bundle(tmp_path / "tiny.moec")
    result = CliRunner().invoke(load_run.main, ["read", str(bundle), "--threads", "3", "--cold"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["gb_s"] > 0


def test_reading_past_the_cache_reads_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_run, "PIECE_BYTES", 8192)
    file = tmp_path / "weights"
    file.write_bytes(bytes(20_000))
    counted: list[int] = []
    read = os.preadv

    def counting(*arguments: Any) -> int:
        counted.append(read(*arguments))
        return counted[-1]

    monkeypatch.setattr(os, "preadv", counting)
    assert load_run.read_rate([file], 2, 1 << 30, direct=True) > 0
    assert sum(counted) == 20_000
    counted.clear()
    load_run.read_rate([file], 2, 8192, direct=False)
    assert counted == [8192], "no more than it may"


def test_a_cold_floor_knows_two_ways_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "tiny.moec")
    calls: list[list[str]] = []

    def measure(what: str, _: Path, options: list[str], cache: str | None = None) -> dict[str, float]:
        calls.append([what, *options])
        if what == "read":
            return {"gb_s": 3.0 if "--direct" in options else 1.0}
        return RATES.get(what) or {"load": 1.0, "first_token": 2.0}

    monkeypatch.setattr(load, "measure", measure)
    monkeypatch.setattr(load, "SETTLING_SECONDS", 0)
    monkeypatch.setattr("benchmarks.support.common.RESULTS", tmp_path)
    monkeypatch.setattr(load, "gpu_record", lambda device: type("Gpu", (), {"link_gb_s": 5.0}))
    options = [str(bundle), "--cold", "--verify", "sizes", "--repeats", "1", "--read-gib", "2"]
    result = CliRunner().invoke(load.main, options)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "load-cuda-tiny-cold.json").read_text())
    assert record["floor_ms"] == pytest.approx(record["weight_bytes"] / 3e9 * 1e3)
    assert [call for call in calls if call[0] == "load"] == [
        ["load", "--device", "cuda:0", "--cold", "--verify", "sizes"]
    ]
    assert all("2" in call and "--cold" in call for call in calls if call[0] == "read")


def test_the_floor_is_the_slower_of_disk_and_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "tiny.moec")
    calls: list[list[str]] = []

    def measure(what: str, _: Path, options: list[str], cache: str | None = None) -> dict[str, float]:
        calls.append([what, *options])
        if what == "start":
            return {"driver": 0.1}
        number = sum(call[0] == "load" for call in calls)
        return RATES.get(what) or {"load": 1.0 + number, "first_token": 2.0 + number}

    monkeypatch.setattr(load, "measure", measure)
    monkeypatch.setattr(load, "SETTLING_SECONDS", 0)
    monkeypatch.setattr("benchmarks.support.common.RESULTS", tmp_path)
    monkeypatch.setattr(load, "gpu_record", lambda device: type("Gpu", (), {"link_gb_s": 5.0}))
    result = CliRunner().invoke(load.main, [str(bundle), "--repeats", "2"])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "load-cuda-tiny.json").read_text())
    size = record["weight_bytes"]
    assert record["floor_ms"] == pytest.approx(size / 5e9 * 1e3)
    rows = {row["what"]: row for row in record["rows"]}
    assert rows["load, verify=sizes"]["first token ms"] == 3000, "the best of two"
    assert rows["load, verify=once"]["over floor"] == pytest.approx(5.0 / (size / 5e9))
    assert rows["load, verify=once noted before"]["first token ms"] == 6000
    assert [call[-1] for call in calls if call[0] == "load"] == ["sizes"] * 2 + ["once"] * 3 + ["full"]

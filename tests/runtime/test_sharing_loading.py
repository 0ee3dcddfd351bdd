"""Which module of a bundle computes the CPU's share, and what users are told where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tvm import tirx

from moec.artifacts.files.manifest import TargetRecord
from moec.artifacts.model import ExpertBody
from moec.artifacts.words.interface import interface
from moec.compiler.kernels.cpu.experts import experts
from moec.compiler.kernels.cpu.feed import feed
from moec.compiler.kernels.cpu.serve import serve
from moec.compiler.lowering.link import link
from moec.errors import BundleError, DeviceError
from moec.runtime.machine.libraries import load_runtime
from moec.runtime.sharing.loading import CpuSide, cpu_side
from tests.support.machine_code import machine_code

BODY = ExpertBody("b", 16, 8, False, False, False, "up", "float32")
FILE = "model.so"


@dataclass(frozen=True)
class _Manifest:
    targets: tuple[TargetRecord, ...]


@dataclass(frozen=True)
class _Model:
    bodies: tuple[ExpertBody, ...] = (BODY,)


@dataclass(frozen=True)
class _Bundle:
    path: Path
    manifest: _Manifest
    model: _Model = _Model()


@cache
def function(name: str) -> tirx.PrimFunc:
    if name == "feed":
        return feed(machine="x86_64")
    return serve([BODY], lanes=4, machine="x86_64") if name == "serve" else experts(BODY, lanes=4)


def side(
    folder: Path, targets: tuple[TargetRecord, ...], threads: int = 2, copy_thread: bool | None = None
) -> CpuSide:
    load_runtime(None)
    bundle: Any = _Bundle(folder, _Manifest(targets))
    return cpu_side(bundle, frozenset({"sse2"}), threads, copy_thread)


def target(name: str, *features: str) -> TargetRecord:
    return TargetRecord(
        name=name, kind="cpu", architectures=(), cpu_features=features, files=(FILE,), interface=interface()
    )


@pytest.fixture(params=["serve", "experts", "serve feed"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    made = [function(name) for name in request.param.split()]
    machine_code(*made).export_library(str(tmp_path / FILE), fcompile=link)
    return tmp_path


@pytest.mark.parametrize("folder", ["serve"], indirect=True)
def test_the_cpu_module_of_the_bundle_serves(folder: Path) -> None:
    found = side(folder, (target("cpu"),))
    assert found.serve is not None
    assert "2 CPU threads" in found.note
    none = side(folder, (target("cpu"),), threads=0)
    assert none.serve is None
    assert "cpu_threads is 0" in none.note


@pytest.mark.parametrize("folder", ["experts"], indirect=True)
def test_what_is_missing_is_said(folder: Path) -> None:
    for targets, part in (
        ((), "no module for a CPU"),
        ((target("cpu-x86-64-v4", "avx512f"),), "cannot run any module"),
        ((target("cpu"),), "no function serve_experts"),
    ):
        found = side(folder, targets)
        assert found.serve is None
        assert part in found.note
        assert "over the link alone" in found.note


@pytest.mark.parametrize("folder", ["serve feed"], indirect=True)
def test_the_copy_engine_is_fed_where_that_is_wanted_or_may_be(folder: Path) -> None:
    targets = (target("cpu"),)
    for threads, copy_thread, feeds in (
        (2, None, True),
        (2, True, True),
        (2, False, False),
        (0, None, False),
        (0, True, True),
    ):
        found = side(folder, targets, threads, copy_thread)
        assert (found.feed is not None) == feeds
        assert (found.serve is not None) == (threads > 0)
        assert ("cpu_threads is 0" in found.note) == (threads == 0)


@pytest.mark.parametrize("folder", ["serve"], indirect=True)
def test_a_bundle_that_cannot_feed_says_so_where_that_is_asked_for(folder: Path) -> None:
    assert side(folder, (target("cpu"),)).feed is None
    with pytest.raises(BundleError, match="no function feed_copies"):
        side(folder, (target("cpu"),), copy_thread=True)
    with pytest.raises(DeviceError, match="no module for a CPU"):
        side(folder, (), copy_thread=True)

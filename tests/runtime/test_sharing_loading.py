"""Which module of a bundle computes the CPU's share, and what users are told where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from tvm import tirx

from moec.artifacts.manifest import TargetRecord
from moec.artifacts.model import ExpertBody
from moec.compiler.kernels.cpu.experts import experts
from moec.compiler.kernels.cpu.serve import serve
from moec.compiler.lowering.link import link
from moec.runtime.machine.libraries import load_runtime
from moec.runtime.sharing.loading import CpuSide, cpu_side
from tests.support.machine_code import machine_code

BODY = ExpertBody("b", 16, 8, False, False, False, "up", "float32")
FILE = "model.so"


@dataclass(frozen=True)
class _Manifest:
    targets: tuple[TargetRecord, ...]


@dataclass(frozen=True)
class _Bundle:
    path: Path
    manifest: _Manifest


@cache
def function(name: str) -> tirx.PrimFunc:
    return serve([BODY], lanes=4, machine="x86_64") if name == "serve" else experts(BODY, lanes=4)


def side(folder: Path, targets: tuple[TargetRecord, ...], threads: int = 2) -> CpuSide:
    load_runtime(None)
    features = frozenset({"sse2"})
    return cpu_side(_Bundle(folder, _Manifest(targets)), features, threads)  # type: ignore[arg-type]


def target(name: str, *features: str) -> TargetRecord:
    return TargetRecord(name=name, kind="cpu", architectures=(), cpu_features=features, files=(FILE,))


@pytest.fixture(params=["serve", "experts"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    machine_code(function(request.param)).export_library(str(tmp_path / FILE), fcompile=link)
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

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moec.artifacts.files.reader import read_manifest
from moec.errors import BundleError, CompileError, MissingDependencyError, RequestError
from moec.runtime import moe
from moec.runtime.moe import MoE, MoEConfig, compile_into, read_config
from tests.support.tiny_bundle import make_bundle


@dataclasses.dataclass
class TheirConfig:
    """As MoE-Infinity's: options that moec has, some that it has not, one that it computes."""

    offload_path: str = ""
    trace_capacity: int = 1000
    num_threads: int = 1
    kv_cache_memory_ratio: float = 0.0
    attention_backend: str = "default"
    perfect_cache_file: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.perfect_cache_file = self.offload_path + "/perfect_cache"
        self.kv_cache_memory_ratio = self.kv_cache_memory_ratio or 0.15


def test_every_form_of_a_config(tmp_path: Path) -> None:
    options = {"offload_path": "/data", "device_memory_ratio": 0.75, "num_threads": 3}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(options))
    expected = MoEConfig(offload_path="/data", device_memory_ratio=0.75, num_threads=3)
    for form in (options, path, str(path), expected):
        assert read_config(form) == expected
    assert read_config(None) == MoEConfig()
    theirs = read_config(TheirConfig("/data", num_threads=4))
    assert theirs == MoEConfig(offload_path="/data", num_threads=4, trace_capacity=1000)


def test_an_option_that_moec_does_not_have_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'attention_backend'"):
        read_config(TheirConfig("/data", attention_backend="flash"))
    with pytest.raises(RequestError, match="'offload_dir'"):
        read_config({"offload_dir": "/data"})
    with pytest.raises(RequestError, match=r"device_memory_ratio=1\.5"):
        read_config({"device_memory_ratio": 1.5})
    (tmp_path / "list.json").write_text("[1]")
    for config in (tmp_path / "list.json", tmp_path / "none.json", [1]):
        with pytest.raises(RequestError):
            read_config(config)


def test_a_checkpoint_needs_a_place_for_its_bundle(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no offload_path"):
        MoE(tmp_path)


def test_options_reach_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "tiny.moec")
    seen: dict[str, Any] = {}

    def load(path: Path, **options: Any) -> str:
        seen.update(options, path=path)
        return "a model"

    monkeypatch.setattr(moe, "load", load)
    monkeypatch.setattr(moe, "gpu_capability", lambda: None)
    config = {
        "host_memory_ratio": 0.5,
        "device_memory_ratio": 0.75,
        "prefetch": True,
        "num_threads": 2,
        "trace_path": str(tmp_path / "t.npz"),
        "trace_capacity": 77,
    }
    model: Any = MoE(bundle, config)
    assert model == "a model"
    assert seen == {
        "path": bundle,
        "device": "cpu",
        "device_memory": None,
        "host_memory": 0.5,
        "cpu_threads": 2,
        "trace_path": tmp_path / "t.npz",
        "trace_capacity": 77,
        "prefetch": True,
    }
    monkeypatch.setattr(moe, "gpu_capability", lambda: (9, 0))
    MoE(bundle, config)
    assert seen["device"] == "cpu", "the bundle has no code for a GPU"


def test_a_gpu_is_used_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    bundle = make_bundle(tmp_path / "tiny.moec")
    manifest = read_manifest(bundle)
    targets = (*manifest.targets, dataclasses.replace(manifest.targets[0], name="cuda-sm_90", kind="cuda"))
    monkeypatch.setattr(moe, "read_manifest", lambda _: dataclasses.replace(manifest, targets=targets))
    monkeypatch.setattr(moe, "gpu_capability", lambda: (9, 0))
    monkeypatch.setattr(moe, "load", lambda _, **options: seen.update(options))
    MoE(bundle, {"device_memory_ratio": 0.75})
    assert (seen["device"], seen["device_memory"]) == ("cuda:0", 0.75)
    for device, memory in (("cpu", None), ("cuda:1", 0.75), (["cuda:0", "cuda:1"], 0.75)):
        MoE(bundle, {"device_memory_ratio": 0.75, "device": device})
        assert (seen["device"], seen["device_memory"]) == (device, memory)


def test_compiling_runs_the_command_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, ran = tmp_path / "model", []
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        make_bundle(Path(command[command.index("-o") + 1]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(moe, "load", lambda bundle, **_: bundle)
    monkeypatch.setattr(moe, "gpu_capability", lambda: (8, 9))
    expected, targets = tmp_path / "offload" / "model.moec", ("--target", "cpu", "--target", "cuda-sm_89")
    loaded: Any = MoE(checkpoint, {"offload_path": tmp_path / "offload"})
    assert loaded == expected
    assert ran == [[sys.executable, "-m", "moec", "compile", str(checkpoint), "-o", str(expected), *targets]]
    with pytest.raises(BundleError, match="from another model"):
        MoE(checkpoint, {"offload_path": tmp_path / "offload"})
    assert len(ran) == 1


def test_a_failed_or_missing_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompileError, match="exit code 3"):
        compile_into(str(tmp_path / "nowhere"), tmp_path / "out.moec", None)
    monkeypatch.setattr(moe, "COMPILER_PACKAGES", ("no_such_package",))
    with pytest.raises(MissingDependencyError, match=r"moec\[compile\]"):
        compile_into("model", tmp_path / "out.moec", None)

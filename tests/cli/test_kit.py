"""A kit: small wheels that are what their RECORD says, and a folder that runs where there is no network."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.request import urlopen

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from moec.cli import moec, wheels
from moec.errors import NetworkError, OutputError
from tests.support.compiling import compile_checkpoint
from tests.support.tiny_bundle import make_bundle

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v2"
LIMIT_BYTES = 40_000_000


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("make", [wheels.moec_wheel, wheels.tvm_wheel])
def test_wheels_are_what_their_record_says_and_the_same_each_time(make: object, tmp_path: Path) -> None:
    assert callable(make)
    (tmp_path / "again").mkdir()
    first, second = (wheels.write_wheel(make(), folder) for folder in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
    files = contents(first)
    name = next(name for name in files if name.endswith("/RECORD"))
    listed = {}
    for line in files[name].decode().splitlines():
        path, digest, size = line.rsplit(",", 2)
        listed[path] = digest, size
    assert listed.pop(name) == ("", "")
    assert listed.keys() == files.keys() - {name}
    for path, (digest, size) in listed.items():
        own = base64.urlsafe_b64encode(hashlib.sha256(files[path]).digest()).rstrip(b"=").decode()
        assert (f"sha256={own}", str(len(files[path]))) == (digest, size)


def test_moecs_wheel_has_the_runtime_and_no_compiler(tmp_path: Path) -> None:
    files = contents(wheels.write_wheel(wheels.moec_wheel(), tmp_path))
    for name in (
        "moec/__main__.py",
        "moec/runtime/devices/cuda/device.py",
        "moec/artifacts/files/reader.py",
        "moec/schemas/manifest.schema.json",
        "moec/planning/planner.py",
    ):
        assert name in files
    assert not [name for name in files if name.startswith(("moec/compiler/kernels", "moec/compiler/trac"))]
    about = next(data for name, data in files.items() if name.endswith("/METADATA")).decode()
    assert "Requires-Dist: numpy" in about
    assert "torch" not in about
    assert b"moec = moec.__main__:main" in next(
        data for name, data in files.items() if "entry_points" in name
    )


def test_tvms_wheel_has_the_runtime_libraries_and_their_license(tmp_path: Path) -> None:
    path = wheels.write_wheel(wheels.tvm_wheel(), tmp_path)
    names = set(contents(path))
    assert {"tvm/__init__.py", *wheels.TVM_FILES} <= names
    assert any("licenses/LICENSE" in name for name in names)
    assert not any("compiler" in name for name in names)
    assert path.stat().st_size < 3_000_000


def test_of_a_large_wheel_what_the_runtime_loads_is_left(tmp_path: Path) -> None:
    files = {
        "nvidia/cu13/lib/libcudart.so.13": b"loaded",
        "nvidia/cu13/lib/libcudart_static.a": b"linked by others",
        "nvidia_cuda_runtime-13.0.dist-info/licenses/License.txt": b"terms",
    }
    tags = ("py3-none-manylinux2014_x86_64", "py3-none-manylinux_2_17_x86_64")
    metadata = "Metadata-Version: 2.1\nName: nvidia-cuda-runtime\nVersion: 13.0\n"
    whole = wheels.write_wheel(
        wheels.WheelContents("nvidia_cuda_runtime", "13.0", tags, metadata, files), tmp_path
    )
    left = contents(wheels.trim(whole))
    assert files.keys() - left.keys() == {"nvidia/cu13/lib/libcudart_static.a"}
    assert left["nvidia_cuda_runtime-13.0.dist-info/METADATA"].decode() == metadata
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]
    other = wheels.write_wheel(wheels.WheelContents("numpy", "2.0", tags, metadata, files), tmp_path)
    assert wheels.trim(other) == other
    assert files.keys() <= contents(other).keys()


def test_packages_come_in_the_versions_that_are_installed_here() -> None:
    import numpy as np

    assert wheels._pinned("numpy") == f"numpy=={np.__version__}"
    assert wheels._pinned("no-such-package>=1,<2") == "no-such-package>=1,<2"


def test_what_the_servers_packages_need_is_in_a_kit_too() -> None:
    kit = {*wheels.RUNTIME_PACKAGES, *wheels.SERVE_PACKAGES}
    for package in wheels.SERVE_PACKAGES:
        for wish in importlib.metadata.requires(package) or ():
            requirement = Requirement(wish)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert requirement.name.lower().replace("_", "-") in kit, f"{package} needs {wish}"


def test_what_the_compilers_files_in_it_import_is_in_it_too(tmp_path: Path) -> None:
    """``moec plan`` and ``moec doctor`` work in a kit."""
    with zipfile.ZipFile(wheels.write_wheel(wheels.moec_wheel(), tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import sys
import moec.planning.machines, moec.planning, moec.compiler.lowering.targets
import moec.cli.doctor, moec.cli.plan, moec.cli.generate
assert moec.__file__.startswith(sys.argv[1]), moec.__file__
assert not {"torch", "transformers", "tvm"} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)


def test_without_the_packages_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(NetworkError, match=r"for Python 3\.12 could not be fetched"):
        wheels.download(["numpy"], "3.12", "x86_64", tmp_path)


def test_a_full_disk_is_not_blamed_on_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "ERROR: Exception:\nOSError: [Errno 28] No space left on device\n"
    done = subprocess.CompletedProcess([], 2, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(OSError, match="No space left on device"):
        wheels.download(["numpy"], "3.12", "x86_64", tmp_path)


def test_an_output_that_is_no_kit_is_kept(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "other").mkdir()
    for output in (tmp_path, tmp_path / "other", bundle, bundle / "kit"):
        result = CliRunner().invoke(moec, ["kit", str(bundle), "-o", str(output), "--force"])
        assert isinstance(result.exception, OutputError)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "other"}
    assert "exists" in str(
        CliRunner().invoke(moec, ["kit", str(bundle), "-o", str(tmp_path / "other")]).exception
    )


def test_a_kit_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["kit", str(make_bundle(tmp_path / "bundle")), "-o", str(tmp_path / "kit")]
    monkeypatch.setattr("moec.cli.kit._write_wheels", lambda *_, **__: None)
    assert CliRunner().invoke(moec, arguments).exit_code == 0
    (tmp_path / "kit" / "old").write_text("of the kit before")
    assert CliRunner().invoke(moec, [*arguments, "--force"]).exit_code == 0
    assert not (tmp_path / "kit" / "old").exists()

    def fail(*_: object, **__: object) -> None:
        raise NetworkError("there is no network")

    monkeypatch.setattr("moec.cli.kit._write_wheels", fail)
    assert isinstance(CliRunner().invoke(moec, [*arguments, "--force"]).exception, NetworkError)
    assert (tmp_path / "kit" / "run.sh").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "kit"}


@pytest.mark.parametrize("version", ["abc", "2.7", "3.9", "3.12.1"])
def test_versions_that_no_kit_is_for(version: str) -> None:
    assert CliRunner().invoke(moec, ["kit", "x.moec", "-o", "kit", "--python", version]).exit_code == 2


@pytest.mark.slow
def test_a_kit_installs_and_generates_without_a_network(tmp_path: Path) -> None:
    compile_checkpoint(EXAMPLE, tmp_path / "model.moec", targets=("cpu", "cuda-sm_90"))
    output = tmp_path / "kit"
    result = CliRunner().invoke(moec, ["kit", str(tmp_path / "model.moec"), "-o", str(output), "--serve"])
    assert result.exception is None, result.output
    weights = sum(path.stat().st_size for path in (output / "bundle" / "weights").iterdir())
    assert sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) - weights < LIMIT_BYTES
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHON": sys.executable,
        "PIP_INDEX_URL": "http://nowhere.invalid",
    }
    arguments = ["generate", str(output / "bundle"), "In the beginning", "--greedy", "--max-new-tokens", "8"]
    ran = subprocess.run(
        [str(output / "run.sh"), *arguments], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert ran.returncode == 0, ran.stderr
    expected = CliRunner().invoke(moec, [*arguments[:1], str(tmp_path / "model.moec"), *arguments[2:]])
    assert ran.stdout == expected.output
    assert (output / "env" / "bin" / "moec").exists()
    server = [str(output / "run.sh"), "serve", str(output / "bundle"), "--port", "0", "--json"]
    with subprocess.Popen(server, env=environment, stdout=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        assert json.load(urlopen(f"{url}/v1/models"))["data"][0]["id"] == "bundle"
        process.terminate()
    assert process.returncode == 0

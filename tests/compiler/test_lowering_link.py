from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from moec.compiler.lowering import link as linking
from moec.errors import CompileError, MissingDependencyError


def test_first_choice_is_a_compiler_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tool(tmp_path, "gcc")
    _tool(tmp_path, "ld")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert linking.link_command()[0] == "gcc"


def test_plain_linker_gets_plain_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tool(tmp_path, "ld.lld")
    monkeypatch.setenv("PATH", str(tmp_path))
    command = linking.link_command()
    assert command[0] == "ld.lld"
    assert "--build-id=none" in command


def test_no_linker_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if importlib.util.find_spec("ziglang") is None:
        with pytest.raises(MissingDependencyError, match="no linker"):
            linking.link_command()
    else:
        assert "ziglang" in linking.link_command()


def test_what_the_linker_says_is_in_the_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.o"
    broken.write_text("not an object file")
    with pytest.raises(CompileError, match=r"broken\.o"):
        linking.link(str(tmp_path / "out.so"), [str(broken)])


def _tool(folder: Path, name: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    assert shutil.which(name, path=str(folder))

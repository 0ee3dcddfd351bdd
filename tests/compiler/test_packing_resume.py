"""Packing that was stopped goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.packing import PackResult, forget_journal, pack
from moec.compiler.packing.journal import JOURNAL_FILE
from moec.compiler.packing.tensors.reading import FileSource
from tests.support.packing_records import meta_model, records
from tests.support.tiny_models import save

if TYPE_CHECKING:
    from moec.compiler.packing import Progress

CONSTANTS = {"table": torch.zeros(3)}
ROOT = Path(__file__).parents[2]


class InterruptedHere(Exception):  # noqa: N818
    """Stands for whatever stops a process."""


class StopAfter:
    """Progress that stops packing after so many bytes."""

    def __init__(self, limit_bytes: int, *, kill: bool = False) -> None:
        self.total = self.seen = 0
        self.closed = False
        self._limit, self._kill = limit_bytes, kill

    def start(self, total_bytes: int) -> None:
        self.total = total_bytes

    def advance(self, size_bytes: int) -> None:
        self.seen += size_bytes
        if self.seen > self._limit:
            if self._kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise InterruptedHere

    def close(self) -> None:
        self.closed = True


class CountingSource(FileSource):
    """Counts the bytes read."""

    def __init__(self) -> None:
        self.size_bytes = 0

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        self.size_bytes += len(buffer)
        super().read_into(path, offset, buffer)


def run(
    folder: Path, output: Path, progress: Progress | None = None, source: FileSource | None = None
) -> PackResult:
    checkpoint = open_checkpoint(folder)
    model, packing = records(meta_model(checkpoint.config), checkpoint.config)
    return pack(checkpoint, model, packing, CONSTANTS, output, progress=progress, source=source)


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "weights").iterdir())}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("moec.compiler.packing.output.SAVE_BYTES", 20_000)
    return save("mixtral", tmp_path / "model", shard="200KB")


@pytest.fixture
def whole(folder: Path, tmp_path: Path) -> dict[str, bytes]:
    result = run(folder, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for file in result.files:
        assert hashlib.sha256(expected[file.path.name]).hexdigest() == file.sha256
        assert len(expected[file.path.name]) == file.size_bytes
    return expected


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.8, 0.999])
def test_interrupted_anywhere(share: float, folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "out"
    total = sum(map(len, whole.values()))
    stopped = StopAfter(int(share * total))
    with pytest.raises(InterruptedHere):
        run(folder, output, stopped)
    assert stopped.closed
    assert contents(output) != whole
    progress, source = StopAfter(1 << 60), CountingSource()
    result = run(folder, output, progress, source)
    assert contents(output) == whole
    assert {f.path.name: f.sha256 for f in result.files} == {
        name: hashlib.sha256(data).hexdigest() for name, data in whole.items()
    }
    assert progress.seen == progress.total == total
    if share >= 0.5:
        assert source.size_bytes < 0.8 * total


def test_killed_half_way(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "out"
    half = sum(map(len, whole.values())) // 2
    script = (
        "import sys; from pathlib import Path\n"
        "from moec.compiler.packing import output\n"
        "from tests.compiler import test_packing_resume as t\n"
        "output.SAVE_BYTES = 20_000\n"
        f"t.run(Path(sys.argv[1]), Path(sys.argv[2]), t.StopAfter({half}, kill=True))\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(output)], cwd=ROOT, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    source = CountingSource()
    run(folder, output, source=source)
    assert contents(output) == whole
    assert 0 < source.size_bytes < 1.6 * half


def test_finished_files_are_kept(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    source = CountingSource()
    run(folder, tmp_path / "whole", source=source)
    assert source.size_bytes == 0
    assert contents(tmp_path / "whole") == whole
    forget_journal(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"weights"}


@pytest.mark.parametrize("name", ["dense.safetensors", "experts-00001.bin"])
@pytest.mark.parametrize("finished", [True, False])
def test_damaged_output_is_made_again(
    name: str, finished: bool, folder: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    if finished:
        run(folder, output)
    else:
        with pytest.raises(InterruptedHere):
            run(folder, output, StopAfter(int(0.6 * sum(map(len, whole.values())))))
    for path in (output / "weights").glob(f"{name}*"):
        data = bytearray(path.read_bytes())
        if data:
            data[len(data) // 3] ^= 1
        path.write_bytes(data)
    run(folder, output)
    assert contents(output) == whole


def test_journal_cut_short(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(InterruptedHere):
        run(folder, tmp_path / "out", StopAfter(int(0.7 * sum(map(len, whole.values())))))
    journal = tmp_path / "out" / JOURNAL_FILE
    journal.write_text(journal.read_text()[:-20])
    run(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_other_weights_are_not_resumed(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The checkpoint changed in between: nothing of the old one may remain."""
    output = tmp_path / "out"
    with pytest.raises(InterruptedHere):
        run(folder, output, StopAfter(int(0.7 * sum(map(len, whole.values())))))
    save("mixtral", folder, seed=1, shard="200KB")
    run(folder, output)
    run(folder, tmp_path / "fresh")
    assert contents(output) == contents(tmp_path / "fresh") != whole


def test_nonfinite_values_are_remembered(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for value in tensors.values():
            value.view(-1)[0] = float("nan")
        save_file(tensors, file)
    expected = run(folder, tmp_path / "whole").nonfinite
    with pytest.raises(InterruptedHere):
        run(folder, tmp_path / "out", StopAfter(600_000))
    assert run(folder, tmp_path / "out").nonfinite == expected
    assert len(expected) > 10


def test_journal_elsewhere(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    model, packing = records(meta_model(checkpoint.config), checkpoint.config)
    state = tmp_path / "state"
    state.mkdir()
    half = StopAfter(sum(map(len, whole.values())) // 2)
    with pytest.raises(InterruptedHere):
        pack(checkpoint, model, packing, CONSTANTS, tmp_path / "out", journal_folder=state, progress=half)
    source = CountingSource()
    pack(checkpoint, model, packing, CONSTANTS, tmp_path / "out", journal_folder=state, source=source)
    assert contents(tmp_path / "out") == whole
    assert source.size_bytes < 0.8 * sum(map(len, whole.values()))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["weights"]

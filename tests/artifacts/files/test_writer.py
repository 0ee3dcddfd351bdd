from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from moec.artifacts.files.manifest import FileRecord
from moec.artifacts.files.reader import open_bundle, read_manifest
from moec.artifacts.files.writer import BundleWriter, check_output
from moec.errors import OutputError
from tests.support.tiny_bundle import fill_bundle, make_bundle, tiny_manifest

if TYPE_CHECKING:
    from pathlib import Path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted(
    output: Path, error: type[BaseException], *, force: bool = False, resume_key: str | None = None
) -> None:
    """Write half a bundle, then fail."""
    with BundleWriter(output, force=force, resume_key=resume_key) as writer:
        assert not writer.resumed
        (writer.folder / "weights").mkdir()
        (writer.folder / "weights/half").write_text("half")
        (writer.folder / "modules/cpu").mkdir(parents=True)
        (writer.folder / "model.json").write_text("for another target")
        (writer.state / "progress").write_text("50 %")
        raise error


def test_nothing_but_the_bundle_is_left(tmp_path: Path) -> None:
    make_bundle(tmp_path / "deep/er/out.moec")
    assert names(tmp_path / "deep/er") == ["out.moec"]
    open_bundle(tmp_path / "deep/er/out.moec")


def test_an_existing_output_is_kept_without_force(tmp_path: Path) -> None:
    make_bundle(tmp_path / "out")
    before = (tmp_path / "out/manifest.json").read_bytes()
    with pytest.raises(OutputError, match="exists") as caught:
        make_bundle(tmp_path / "out")
    assert "--force" in caught.value.do
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out/manifest.json").read_bytes() == before


def test_force_replaces_a_bundle(tmp_path: Path) -> None:
    make_bundle(tmp_path / "out")
    with BundleWriter(tmp_path / "out", force=True) as writer:
        fill_bundle(writer.folder)
        open_bundle(tmp_path / "out")
        writer.commit(dataclasses.replace(tiny_manifest(), model_name="another"))
    assert read_manifest(tmp_path / "out").model_name == "another"
    assert names(tmp_path) == ["out"]


def test_force_never_replaces_what_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(OutputError, match="not a bundle"):
            check_output(tmp_path / name, force=True)
    assert (tmp_path / "home/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_an_error_leaves_nothing_half_written(
    tmp_path: Path, error: type[BaseException], force: bool
) -> None:
    if force:
        make_bundle(tmp_path / "out")
    with pytest.raises(error):
        interrupted(tmp_path / "out", error, force=force)
    assert names(tmp_path) == (["out"] if force else [])


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        fill_bundle(writer.folder)
    assert names(tmp_path) == []


def test_folders_made_for_an_output_go_with_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"), BundleWriter(tmp_path / "deep/er/out"):
        raise ValueError("bad")
    assert names(tmp_path) == []
    (tmp_path / "deep").mkdir()
    with pytest.raises(ValueError, match="bad"), BundleWriter(tmp_path / "deep/er/out"):
        raise ValueError("bad")
    assert names(tmp_path) == ["deep"]


def test_ctrl_c_keeps_a_resumable_staging_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupted(output, KeyboardInterrupt, resume_key="model a")
    assert names(tmp_path) == ["out.partial"]
    with BundleWriter(output, resume_key="model a") as writer:
        assert writer.resumed
        assert (writer.state / "progress").read_text() == "50 %"
        assert names(writer.folder) == ["weights"], "the rest is made again"
        (writer.folder / "weights/half").unlink()
        (writer.folder / "weights").rmdir()
        fill_bundle(writer.folder)
        writer.commit(tiny_manifest())
    assert names(tmp_path) == ["out"]
    assert not any("state" in name for name in open_bundle(output).manifest.files)


def test_ctrl_c_before_there_are_weights_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "out", resume_key="a"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize("key", ["model b", None])
def test_another_models_staging_folder_is_discarded(tmp_path: Path, key: str | None) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out", KeyboardInterrupt, resume_key="model a")
    with BundleWriter(tmp_path / "out", resume_key=key) as writer:
        assert not writer.resumed
        assert names(writer.folder) == []


def test_an_error_discards_even_a_resumable_staging_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"), BundleWriter(tmp_path / "out", resume_key="a"):
        raise ValueError("bad")
    assert names(tmp_path) == []


def test_a_killed_writer_leaves_what_the_next_one_resumes(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from moec.artifacts.files.writer import BundleWriter\n"
        "with BundleWriter(Path(sys.argv[1]), resume_key='a') as w:\n"
        "    (w.folder / 'weights').mkdir(); (w.folder / 'weights/half').write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False).returncode == 9
    with BundleWriter(tmp_path / "out", resume_key="a") as writer:
        assert writer.resumed
        assert (writer.folder / "weights/half").exists()


def test_a_writer_killed_while_replacing_has_lost_nothing(tmp_path: Path) -> None:
    make_bundle(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.replaced")
    with pytest.raises(OutputError, match="exists"):
        BundleWriter(tmp_path / "out").__enter__()
    open_bundle(tmp_path / "out")


def test_two_writers_of_one_output(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        (writer.folder / "mine").write_text("mine")
        with pytest.raises(OutputError, match="another process"), BundleWriter(tmp_path / "out"):
            pass
        assert (writer.folder / "mine").exists()


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written") as caught, BundleWriter(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "Make room" in caught.value.do
    assert names(tmp_path) == []


def test_other_os_errors_are_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), BundleWriter(tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "a shard")


def test_an_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError), BundleWriter(tmp_path / "file/out"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError), BundleWriter(tmp_path / "out"):
        pass
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_bundle_is_not_replaced(tmp_path: Path) -> None:
    make_bundle(tmp_path / "out").chmod(0o500)
    with pytest.raises(OutputError, match="read-only"):
        check_output(tmp_path / "out", force=True)
    (tmp_path / "out").chmod(0o700)


def test_known_hashes_are_taken_as_they_are(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        (writer.folder / "a").write_text("abc")
        (writer.folder / "b").write_text("abc")
        manifest = writer.commit(tiny_manifest(), known={"a": FileRecord(3, "0" * 64)})
    assert manifest.files["a"].sha256 == "0" * 64
    assert manifest.files["b"].sha256.startswith("ba7816bf")


def test_a_preview_can_be_opened_before_commit(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out", resume_key="a") as writer:
        fill_bundle(writer.folder)
        (writer.state / "progress").write_text("50 %")
        (writer.folder / "LICENSE").unlink()
        writer.preview(tiny_manifest())
        assert "LICENSE" not in open_bundle(writer.folder).manifest.files
        (writer.folder / "LICENSE").write_text("later")
        writer.commit(tiny_manifest())
    assert "LICENSE" in open_bundle(tmp_path / "out").manifest.files


def test_a_limit_on_file_sizes_leaves_nothing_half_written(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from moec.artifacts.files.writer import BundleWriter\n"
        "from moec.errors import OutputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "try:\n"
        "    with BundleWriter(Path(sys.argv[1]), resume_key='a') as w:\n"
        "        (w.folder / 'weights').write_bytes(bytes(20000))\n"
        "except OutputError as error:\n"
        "    sys.exit(error.exit_code)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert result.returncode == OutputError.exit_code
    assert names(tmp_path) == []

"""Bad input: a message that says what, and a non-zero exit."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from moec import errors
from moec.__main__ import main, run
from tests.support.commands import EXAMPLE, GPU_MACHINE, MACHINE, expect
from tests.support.tiny_bundle import make_bundle

if TYPE_CHECKING:
    from pathlib import Path


def test_a_module_for_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "tiny.moec")
    assert "segments.so cannot be loaded" in expect(
        ["generate", str(bundle), "--token-ids", "1"], errors.DeviceError, capsys
    )


def test_options_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(make_bundle(tmp_path / "tiny.moec"))
    for option in (
        ["--text", "a.txt"],
        ["--tokens", "9"],
        ["--reference-dtype", "bundle"],
        ["--no-record"],
        ["--cpu-threads", "1"],
    ):
        assert run(["verify", bundle, *option]) == 2
        assert "--reference" in capsys.readouterr().err
    for text in (tmp_path / "absent.txt", tmp_path / "latin.txt"):
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        arguments = ["verify", bundle, "--reference", str(EXAMPLE), "--text", str(text)]
        assert text.name in expect(arguments, errors.RequestError, capsys)


def test_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect"], ["verify"], ["plan"], ["generate", "--token-ids", "1"]):
        expect([command[0], str(tmp_path / "absent.moec"), *command[1:]], errors.BundleError, capsys)


def test_device_memory_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "tiny.moec")
    arguments = ["plan", str(bundle), "--machine", MACHINE, "--device-memory", "1GiB"]
    assert "no GPU" in expect(arguments, errors.DeviceError, capsys)


def test_memory_that_runs_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(**_: Any) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr("moec.cli.moec.main", exhausted)
    assert "9 TiB" in expect(["models"], errors.BudgetError, capsys)


def test_sigterm_ends_a_command_as_ctrl_c_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_right = []

    def terminated(**_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            put_right.append(True)

    monkeypatch.setattr("moec.cli.models.command.callback", terminated)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main(["models"])
    assert stop.value.code == 143
    assert put_right
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_reader_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run(["models"]) == 141
        monkeypatch.undo()


def test_streams_that_the_caller_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(make_bundle(tmp_path / "tiny.moec"))])
    assert stop.value.code == 0
    sys.stdin.close()
    sys.stdout.close()


def test_files_of_the_user_are_not_blamed_on_the_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(make_bundle(tmp_path / "tiny.moec"))
    (tmp_path / "other").write_text("neither traces nor a machine")
    for option in ("--traces", "--machine"):
        arguments = ["plan", bundle, "--machine", MACHINE, option, str(tmp_path / "other")]
        said = expect(arguments, errors.BundleError, capsys)
        assert "compile the model again" not in said
        assert "pickle" not in said


def test_pages_where_none_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(make_bundle(tmp_path / "tiny.moec"))
    for place in (tmp_path, tmp_path / "none" / "page.html"):
        expect(["inspect", bundle, "--html", str(place)], errors.OutputError, capsys)


@pytest.mark.parametrize("template", [b"caf\xe9", b"{{ messages"])
def test_a_chat_template_that_is_none(
    template: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jinja").write_bytes(template)
    arguments = ["serve", "x.moec", "--port", "0", "--chat-template", str(tmp_path / "t.jinja")]
    assert "t.jinja" in expect(arguments, errors.RequestError, capsys)


@pytest.mark.parametrize(
    "amount", [("--host-memory", "9TiB"), ("--device-memory", "9TiB"), ("--device-memory", "1GiB,9TiB")]
)
def test_more_memory_than_the_machine_has(
    amount: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(make_bundle(tmp_path / "tiny.moec"))
    machine = MACHINE if amount[0] == "--host-memory" else GPU_MACHINE
    arguments = ["plan", bundle, "--machine", machine, *amount]
    assert "more than the machine has" in expect(arguments, errors.BudgetError, capsys)


@pytest.mark.parametrize("options", [["--tokens", "64"], ["--synthetic", "skewed", "--traces", "x.npz"]])
def test_options_of_a_simulation_that_nothing_reads(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", "x.moec", *options]) == 2
    assert "--synthetic" in capsys.readouterr().err


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile"]) == 2
    assert run(["generate", "x.moec"]) == 2
    assert run(["no-such-command"]) == 2
    assert "Usage" in capsys.readouterr().err

"""Bad input of ``moec compile``: a message that says what, a non-zero exit, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moec import errors
from moec.__main__ import run
from tests.support.commands import EXAMPLE, MACHINE, expect


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the example to damage."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "checkpoint"))


def edit_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def compile_arguments(checkpoint: Path, tmp_path: Path) -> list[str]:
    return ["compile", str(checkpoint), "-o", str(tmp_path / "out.moec"), "--calibration", "none"]


def assert_nothing_left(tmp_path: Path) -> None:
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint"}


def test_no_such_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no" / "such" / "model"
    assert str(missing) in expect(compile_arguments(missing, tmp_path), errors.CheckpointError, capsys)
    assert_nothing_left(tmp_path)


def test_no_such_quantization(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*compile_arguments(checkpoint, tmp_path), "--quantization"]
    assert run([*arguments, "int5"]) == 2
    said = capsys.readouterr().err
    assert "int5 is neither a file nor one of none, keep, int8, int4" in " ".join(said.split())
    policy = checkpoint / "policy.json"
    policy.write_text(json.dumps({"name": "p", "method": "magic", "roles": {}, "rules": []}))
    assert "magic" in expect([*arguments, str(policy)], errors.UsageError, capsys)
    assert_nothing_left(tmp_path)


def test_not_a_mixture_of_experts(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(checkpoint, model_type="llama", architectures=["LlamaForCausalLM"])
    said = expect(compile_arguments(checkpoint, tmp_path), errors.UnsupportedModelError, capsys)
    assert "Mixture-of-Experts" in said
    assert_nothing_left(tmp_path)


def test_unsupported_type(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(checkpoint, model_type="gigamoe_9")
    said = expect(compile_arguments(checkpoint, tmp_path), errors.UnsupportedModelError, capsys)
    assert "gigamoe_9" in said
    assert_nothing_left(tmp_path)


def test_more_experts_a_token_than_there_are(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_config(checkpoint, num_experts_per_tok=40)
    said = expect(compile_arguments(checkpoint, tmp_path), errors.CheckpointError, capfd)
    assert "choose 40 of 16 experts" in said
    assert "Traceback" not in said
    assert_nothing_left(tmp_path)


def test_truncated_weights(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    said = expect(compile_arguments(checkpoint, tmp_path), errors.CheckpointError, capsys)
    assert "model.safetensors" in said
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_cut_off(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / name).write_text('{"model"')
    said = expect(compile_arguments(checkpoint, tmp_path), errors.CheckpointError, capsys)
    assert name in said
    assert "trace" not in said, "it is said before long work"
    assert_nothing_left(tmp_path)


def test_wrong_shape(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    edit_config(checkpoint, moe_intermediate_size=config["moe_intermediate_size"] * 2)
    said = expect(compile_arguments(checkpoint, tmp_path), errors.CheckpointError, capsys)
    assert "experts" in said
    assert_nothing_left(tmp_path)


def test_existing_output(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.moec"
    output.mkdir()
    (output / "precious").write_text("do not lose me")
    expect(compile_arguments(checkpoint, tmp_path), errors.OutputError, capsys)
    expect([*compile_arguments(checkpoint, tmp_path), "--force"], errors.OutputError, capsys)
    assert (output / "precious").read_text() == "do not lose me"


def test_unknown_target(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*compile_arguments(checkpoint, tmp_path), "--target", "cuda-sm_12"]
    assert "cuda-sm_89" in expect(arguments, errors.UsageError, capsys)
    assert_nothing_left(tmp_path)
    # It is said before anything is read or fetched.
    arguments[1] = "owner/a-model-that-would-be-downloaded"
    assert "cuda-sm_89" in expect(arguments, errors.UsageError, capsys)


def test_output_where_no_folder_can_be(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compile", str(checkpoint), "-o", str(checkpoint / "config.json" / "out.moec")]
    said = expect(arguments, errors.OutputError, capsys)
    assert "config.json is not a folder" in said
    assert "trace" not in said, "it is said before long work"
    assert_nothing_left(tmp_path)


def test_without_the_compilers_packages(tmp_path: Path) -> None:
    arguments = ["compile", str(EXAMPLE), "-o", "out.moec"]
    code = f"import sys; sys.modules['torch'] = None\nfrom moec.__main__ import main; main({arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == errors.MissingDependencyError.exit_code, done.stderr
    assert "torch is not installed" in done.stderr
    assert "moec[compile]" in done.stderr
    assert_nothing_left(tmp_path)


def test_bad_calibration(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "checkpoint" / "prompts.jsonl"
    prompts.write_text('{"prompt": "fine"}\n{"promt": "typo"}\n')
    arguments = ["compile", str(checkpoint), "-o", str(tmp_path / "out.moec"), "--calibration", str(prompts)]
    assert "line 2" in expect(arguments, errors.CheckpointError, capsys)
    assert_nothing_left(tmp_path)


@pytest.mark.slow
def test_a_disk_that_fills_up_half_way(tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    assert run(["compile", str(EXAMPLE), "-o", str(modules), "--modules-only"]) == 0
    pack = [
        sys.executable,
        "-m",
        "moec",
        "pack",
        str(EXAMPLE),
        str(modules),
        "-o",
        str(tmp_path / "out.moec"),
    ]
    command = ["bash", "-c", 'ulimit -f 1024; exec "$@"', "bash", *pack]  # files of a MiB
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == errors.OutputError.exit_code, done.stderr
    assert "File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["modules"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--fit", "20ms"], "there is no machine"),
        (["--fit", "8GiB", "--machine", MACHINE], "needs no --machine"),
        (["--machine", MACHINE], "without --fit"),
        (["--fit", "8GiB", "--quantization", "int4"], "cannot be given together"),
        (["--fit", "soon"], "neither a size nor a time"),
        (["--fit", "0.5"], "neither a size nor a time"),
        (["--fit", "8GiB"], "needs calibration"),
    ],
)
def test_targets_of_fit_are_a_size_or_a_time_on_a_machine(
    arguments: list[str],
    text: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert text in expect([*compile_arguments(checkpoint, tmp_path), *arguments], errors.UsageError, capsys)
    assert_nothing_left(tmp_path)

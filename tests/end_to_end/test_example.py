"""The shipped, trained example: every command on a real bundle, and what must hold of a finished one."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec import runtime
from moec.__main__ import run
from moec.artifacts.files.reader import open_bundle
from moec.errors import BudgetError, BundleError, DeviceError, RequestError
from tests.support.compiling import compile_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v2"
PROMPT = "And it came to pass"


@pytest.fixture
def bundle(example_bundle: Path) -> Path:
    return example_bundle


def output_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert run(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_verify_against_transformers(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(bundle, tmp_path / "tiny.moec")
    facts = output_of(["verify", str(bundle), "--reference", str(EXAMPLE), "--json"], capsys)
    assert facts["tokens"] == 512
    assert facts["argmax_agreement"] >= 0.99
    assert facts["mean_kl"] < 1e-2
    assert facts["mean_kl"] < facts["kl_99"] < facts["max_kl"]
    assert facts["perplexity"] == pytest.approx(facts["reference_perplexity"], rel=5e-3)
    (published,) = output_of(["inspect", str(bundle), "--json"], capsys)["accuracy"]
    assert published["reference"] == EXAMPLE.name
    assert published["text"] == "shipped prompts"
    assert published["agreement"] == {name: facts[name] for name in published["agreement"]}
    assert run(["inspect", str(bundle)]) == 0
    assert "accuracy, teacher-forced" in capsys.readouterr().out


def test_generate_is_repeatable_and_reads_as_text(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(bundle), PROMPT, "--max-new-tokens", "24", "--seed", "3"]
    first = output_of([*arguments, "--json"], capsys)
    assert first["token_ids"] == output_of([*arguments, "--json"], capsys)["token_ids"]
    assert len(first["token_ids"]) <= 24
    assert run(arguments) == 0
    assert capsys.readouterr().out.rstrip("\n") == first["text"]


def test_token_ids_in_and_out(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(bundle), "--token-ids", "0,5,9", "--greedy", "--max-new-tokens", "4"]
    new_ids = output_of([*arguments, "--json"], capsys)["token_ids"]
    assert run(arguments) == 0
    assert capsys.readouterr().out.strip() == ",".join(map(str, new_ids))


def test_chat_answers_line_by_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["chat", str(bundle), "--max-new-tokens", "8", "--greedy"]
    talk = f"{PROMPT}\n\nAnd he said\n/exit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(talk))
    assert run([*arguments, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["role"] for answer in answers] == ["assistant", "assistant"]
    assert answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"] + len(answers[0]["token_ids"])
    monkeypatch.setattr("sys.stdin", io.StringIO(talk))
    assert run(arguments) == 0
    assert capsys.readouterr().out == "".join(answer["content"] + "\n" for answer in answers)
    assert run([*arguments, "--top-k", "3"]) == 2


def test_every_file_is_as_readable_as_the_umask_lets_it_be(bundle: Path) -> None:
    mask = os.umask(0o077)
    os.umask(mask)
    for path in bundle.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o666 == 0o666 & ~mask, path


def test_inspect_says_what_is_inside(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = output_of(["inspect", str(bundle), "--json"], capsys)
    assert facts["model_type"] == "deepseek_v2"
    assert len(facts["experts"]) == 6
    assert facts["profile"]["provenance"] == "traced"
    assert facts["profile"]["tokens"] > 1000
    assert facts["schedules"]
    assert facts["quantization"] == "none"
    routed = sum(layer["experts"] for layer in facts["experts"]) * facts["bodies"][0]["expert_bytes"]
    assert routed < facts["formats"][facts["dtype"]] < routed + facts["dense_bytes"]
    assert run(["inspect", str(bundle)]) == 0
    said = capsys.readouterr().out
    assert "weights (quantization none)" in said
    assert "mul(silu(gate), up)" in said
    assert "latent" in said


def test_plan_adds_a_schedule(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy.moec"))
    machine = EXAMPLE.parent / "machines" / "rtx-4060-laptop-8gb.json"
    before = len(open_bundle(copy).schedule.schedules)
    arguments = ["plan", str(copy), "--machine", str(machine), "--device-memory", "24MiB", "--json"]
    schedule = output_of(arguments, capsys)
    assert schedule["budgets"]["device_memory_bytes"] == 24 << 20
    assert len(open_bundle(copy).schedule.schedules) == before + 1
    assert run([*arguments[:-2], "1KiB"]) == BudgetError.exit_code
    assert len(open_bundle(copy).schedule.schedules) == before + 1


def test_bench_reports_a_ratio(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(bundle), "--prompt-tokens", "8", "--new-tokens", "4", "--batch", "2", "--json"]
    facts = output_of(arguments, capsys)
    assert facts["ratio_to_floor"] == pytest.approx(facts["decode_ms_per_step"] / facts["floor_ms_per_step"])
    assert facts["active_bytes_per_token"] > 1 << 20
    # More sequences than a step has tokens for by default.
    many = ["bench", str(bundle), "--prompt-tokens", "1", "--new-tokens", "2", "--batch", "600", "--json"]
    assert output_of(many, capsys)["batch"] == 600
    endless = ["bench", str(bundle), "--prompt-tokens", "2000", "--new-tokens", "2", "--batch", "10000000"]
    assert run(endless) == BudgetError.exit_code


def test_any_changed_byte_is_found(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy.moec"))
    for path in sorted(file for file in copy.rglob("*") if file.is_file()):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(BundleError):
            runtime.load(copy)
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    runtime.load(copy).close()


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's code without its weights."""
    output = tmp_path_factory.mktemp("modules") / "tiny.modules"
    compile_checkpoint(EXAMPLE, output, modules_only=True)
    return output


def test_pack_elsewhere_gives_the_same_bundle(bundle: Path, modules: Path, tmp_path: Path) -> None:
    output = tmp_path / "tiny.moec"
    assert run(["pack", str(EXAMPLE), str(modules), "-o", str(output)]) == 0
    assert open_bundle(output).manifest.files == open_bundle(bundle).manifest.files


def test_pack_refuses_another_models_modules(modules: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(EXAMPLE, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.25}))
    assert run(["pack", str(other), str(modules), "-o", str(tmp_path / "out")]) == 3


@pytest.mark.slow
def test_killed_and_run_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    output, whole = tmp_path / "tiny.moec", tmp_path / "whole.moec"
    options = ["compile", str(EXAMPLE), "--target", "cpu", "-o"]
    command = [sys.executable, "-m", "moec", *options, str(output)]
    victim = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    weights = tmp_path / "tiny.moec.partial" / "bundle" / "weights"
    deadline = time.monotonic() + 240
    while not (weights.is_dir() and any(weights.iterdir())):
        assert victim.poll() is None, "it ended before its weights were seen"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not output.exists()
    assert run([*options, str(output)]) == 0
    assert not (tmp_path / "tiny.moec.partial").exists()
    assert run([*options, str(whole)]) == 0
    assert open_bundle(output).manifest.files == open_bundle(whole).manifest.files


def test_budget_is_a_hard_limit_and_does_not_change_tokens(bundle: Path) -> None:
    sizes: Any = {"cache_tokens": np.int64(256), "max_batch": np.int64(2)}
    with runtime.load(bundle, **sizes) as model:
        ids = model.encode(PROMPT)
        roomy = model.generate(ids, max_new_tokens=32, do_sample=False)
        all_experts = model.memory.expert_bytes
        least = model.memory.total_bytes - all_experts
    with runtime.load(bundle, cache_tokens=256, max_batch=2, host_memory=least + all_experts // 4) as model:
        assert model.memory.total_bytes <= least + all_experts // 4
        np.testing.assert_array_equal(model.generate(ids, max_new_tokens=32, do_sample=False), roomy)
        assert model.stats.evictions > 0
        assert model.stats.bytes_moved > 0
    with pytest.raises(BudgetError, match="too small"):
        runtime.load(bundle, cache_tokens=256, max_batch=2, host_memory=least // 2)


def test_requests_out_of_range(bundle: Path) -> None:
    with runtime.load(bundle, cache_tokens=4096) as model:
        vocab, context = model.record.vocab_size, model.record.max_context
        for bad in ([vocab], [-1], [], [1] * (context + 1)):
            with pytest.raises(RequestError):
                model.generate(bad, max_new_tokens=1)
        with pytest.raises(RequestError):
            model.generate([1] * (context - 1), max_new_tokens=8)
    for device in ("cuda:0", "tpu"):
        with pytest.raises(DeviceError):
            runtime.load(bundle, device=device)


def test_the_runtime_needs_no_compiler(bundle: Path) -> None:
    code = (
        "import sys; from moec import runtime\n"
        f"model = runtime.load({str(bundle)!r}); model.generate([1, 2, 3], max_new_tokens=2)\n"
        "print(sorted({'torch', 'transformers', 'tvm', 'moec.compiler'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"

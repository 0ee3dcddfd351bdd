"""Bundles of GGUF files against transformers eager with the dequantized weights, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM

from moec import runtime
from moec.artifacts.files.codec import to_json
from moec.cli import moec
from moec.cli.output import ProgressBar, StageLog
from moec.cli.probe import RuntimeProbe
from moec.compiler.pipeline import pack_model
from moec.compiler.request import Calibration, Surroundings
from moec.errors import UnsupportedModelError
from tests.support.agreement import SHORT_RELATIVE, check_agreement, endless, expected_of, reference
from tests.support.compiling import compile_checkpoint
from tests.support.gguf_files import write_gguf
from tests.support.tiny_models import TINY, save

FORMATS = {"Q8_0": "int8-g32", "Q4_0": "int4-g32", "Q4_1": "int4-g32-m", "Q5_0": "int8-g32", "MXFP4": "mxfp4"}
CANARY = ("mixtral", "Q4_0")
CASES = (
    CANARY,
    ("deepseek_v2", "Q4_0"),
    ("deepseek_v2_lite", "Q8_0"),
    ("deepseek_v3", "Q8_0"),
    ("gpt_oss", "MXFP4"),
    ("gpt_oss", "BF16"),
    ("mixtral", "Q4_1"),
    ("mixtral", "Q5_0"),
    ("qwen3_moe", "Q8_0"),
)
WIDER: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": None, "intermediate_size": 96},
    "gpt_oss": {"intermediate_size": 64},
}
"""What the tiny models need so that all rows are whole blocks, or what GGUF has no key for."""


@pytest.fixture(autouse=True)
def _whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fields in WIDER.items():
        monkeypatch.setitem(TINY, name, _changed(TINY[name], fields))


def _changed(make: Any, fields: dict[str, Any]) -> Any:
    def config() -> Any:
        made = make()
        for field, value in fields.items():
            setattr(made, field, value)
        return made

    return config


def cases() -> list[Any]:
    return [case if case == CANARY else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("name", "kind"), cases())
def test_a_bundle_is_the_model_of_the_dequantized_weights(name: str, kind: str, tmp_path: Path) -> None:
    """DeepSeek-V3 with the latents' matrix whole, as older files have it; DeepSeek-V2 in parts."""
    save(name, tmp_path / "model", dtype=torch.float32)
    written = write_gguf(
        tmp_path / "model",
        tmp_path / "gguf",
        GGMLQuantizationType[kind],
        split_latents=name != "deepseek_v3",
        parts=3 if name == "deepseek_v2" else 1,
    )
    manifest = compile_checkpoint(written.file, tmp_path / "model.moec", dtype="f32")
    assert manifest.model_name == "model"
    assert kind in manifest.checkpoint_types
    assert manifest.formats.keys() == {"float32", *([FORMATS[kind]] if kind in FORMATS else [])}
    expected = expected_of(reference(written.plain), within=SHORT_RELATIVE)
    with runtime.load(tmp_path / "model.moec", max_step_tokens=48) as model:
        check_agreement(model, expected, within=SHORT_RELATIVE)


SUPER_BLOCKS = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "head_dim": 32,
    "num_hidden_layers": 2,
}


def _mixed(name: str) -> GGMLQuantizationType:
    """As in files called Q4_K_M: in some layers the last matrices of experts have six bits, and so has the head."""
    six = name.startswith("output") or ("ffn_down_exps" in name and "blk.0" in name)
    return GGMLQuantizationType.Q6_K if six else GGMLQuantizationType.Q4_K


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "formats", "error"),
    [
        (GGMLQuantizationType.Q4_K, {"int4-g32-m"}, 1e-3),
        (GGMLQuantizationType.Q6_K, {"int8-g32"}, 2e-2),
        (_mixed, {"int4-g32-m", "int8-g32"}, 2e-2),
    ],
)
def test_super_blocks_are_kept_nearly(
    kind: Any, formats: set[str], error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of Q4_K rounded to float16, and values of Q6_K to 8 bits: most tokens' logits stay near those of the file.

    Not all: where random routers hold two experts nearly equal, the other one is another model.
    """
    monkeypatch.setitem(TINY, "qwen3_moe", _changed(TINY["qwen3_moe"], SUPER_BLOCKS))
    save("qwen3_moe", tmp_path / "model", dtype=torch.float32)
    written = write_gguf(tmp_path / "model", tmp_path / "gguf", kind)
    manifest = compile_checkpoint(written.file, tmp_path / "model.moec", dtype="f32")
    assert manifest.formats.keys() == {"float32", *formats}
    expected = expected_of(reference(written.plain))
    with runtime.load(tmp_path / "model.moec", max_step_tokens=48) as model:
        found = model.forward(expected.tokens)
    off = np.abs(found - expected.logits).max(-1) / np.abs(expected.logits).max(-1)
    assert 0 < np.median(off) < error


@pytest.mark.slow
def test_transformers_loads_the_same_model(tmp_path: Path) -> None:
    """By its own reader of GGUF, which knows this architecture, but no file that has no vocabulary."""
    save("qwen3_moe", tmp_path / "model", dtype=torch.float32)
    written = write_gguf(tmp_path / "model", tmp_path / "gguf", GGMLQuantizationType.Q8_0)
    compile_checkpoint(written.file, tmp_path / "model.moec", dtype="f32")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(
        written.file.parent, gguf_file=written.file.name, config=config, dtype=torch.float32
    )
    expected = expected_of(endless(theirs.eval()), within=SHORT_RELATIVE)
    with runtime.load(tmp_path / "model.moec", max_step_tokens=48) as model:
        check_agreement(model, expected, within=SHORT_RELATIVE)


@pytest.mark.slow
def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``compile`` with a tokenizer from elsewhere, ``inspect``, ``verify`` and ``pack`` of modules."""
    monkeypatch.setitem(TINY, "qwen3_moe", _changed(TINY["qwen3_moe"], {"vocab_size": 2048}))
    save("qwen3_moe", tmp_path / "model", dtype=torch.float32)

    def more(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("t5")

    written = write_gguf(tmp_path / "model", tmp_path / "gguf", GGMLQuantizationType.Q8_0, more=more)
    bundle, run = tmp_path / "model.moec", CliRunner().invoke
    arguments = ["compile", str(written.file), "-o", str(bundle), "--calibration", "none"]
    refused = run(moec, arguments)
    assert isinstance(refused.exception, UnsupportedModelError)
    made = run(moec, [*arguments, "--tokenizer", "examples/tiny-deepseek-v2"])
    assert made.exit_code == 0, made.output
    assert (bundle / "tokenizer" / "tokenizer.json").is_file()
    assert "made of a checkpoint of" in run(moec, ["inspect", str(bundle)]).output
    facts = json.loads(run(moec, ["inspect", str(bundle), "--json"]).output)
    assert facts["checkpoint_types"].keys() == {"F32", "Q8_0"}
    verified = run(
        moec, ["verify", str(bundle), "--reference", str(written.file), "--tokens", "64", "--json"]
    )
    assert json.loads(verified.stdout)["mean_kl"] < 1e-2
    compile_modules = [*arguments, "--modules-only", "--tokenizer", "examples/tiny-deepseek-v2"]
    compile_modules[3] = str(tmp_path / "modules")
    assert run(moec, compile_modules).exit_code == 0
    around = Surroundings(StageLog(quiet=True), ProgressBar("pack"), RuntimeProbe(), ())
    there = pack_model(
        str(written.file), tmp_path / "modules", tmp_path / "there", Calibration(enabled=False), around
    )
    here = json.loads((bundle / "manifest.json").read_text())
    weights = {name: to_json(record) for name, record in there.files.items() if name.startswith("weights/")}
    assert weights
    assert weights.items() <= here["files"].items()

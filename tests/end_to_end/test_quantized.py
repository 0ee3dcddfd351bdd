"""Bundles with quantized weights against transformers eager with the same weights, dequantized, in float32."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moec import runtime
from moec.artifacts.files.records import read_record
from moec.artifacts.packing import PackingRecord
from moec.cli.output import ProgressBar, StageLog
from moec.cli.probe import RuntimeProbe
from moec.compiler.pipeline import pack_model
from moec.compiler.quantization import policy_named
from moec.compiler.request import Calibration, Surroundings
from moec.formats import FORMATS
from tests.support.agreement import SHORT_RELATIVE, check_agreement, expected_of, reference
from tests.support.compiling import compile_checkpoint
from tests.support.compressed_checkpoints import compressed_checkpoint
from tests.support.dequantized import dequantize_dense, dequantize_experts, take_experts
from tests.support.packed_checkpoints import awq_checkpoint, gptq_checkpoint
from tests.support.quantized_checkpoints import fp8_deepseek_v3, mxfp4_gpt_oss
from tests.support.tiny_models import save

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.quantized_checkpoints import Published

CANARY = ("deepseek_v2_lite", "int4-g32")
MODELS = ("deepseek_v2_lite", "gpt_oss", "mixtral", "qwen2_moe")


def cases() -> list[Any]:
    """Every format on one model, one format on the others; one pair in ``make test``."""
    pairs = [(MODELS[0], name) for name in FORMATS] + [(model, "mxfp4") for model in MODELS[1:]]
    return [pair if pair == CANARY else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("model_name", "format_name"), cases())
def test_a_recipe_makes_the_model_of_dequantized_weights(
    model_name: str, format_name: str, tmp_path: Path
) -> None:
    """Experts in the format, other products, embedding and head in 8 bits."""
    save(model_name, tmp_path / "checkpoint", dtype=torch.float32)
    policy = policy_named(format_name)
    manifest = compile_checkpoint(
        tmp_path / "checkpoint", tmp_path / "model.moec", dtype="f32", quantization=policy
    )
    assert manifest.quantization == format_name
    assert {format_name, "float32"} <= manifest.formats.keys()
    judge = reference(tmp_path / "checkpoint")
    dequantize_experts(judge, FORMATS[format_name])
    dequantize_dense(judge, tmp_path / "model.moec")
    expected = expected_of(judge, within=SHORT_RELATIVE)
    with runtime.load(tmp_path / "model.moec", max_step_tokens=48) as model:
        check_agreement(model, expected, within=SHORT_RELATIVE)


@pytest.mark.slow
def test_experts_that_were_rounded_with_feedback_are_those_that_run(tmp_path: Path) -> None:
    save("deepseek_v2_lite", tmp_path / "checkpoint", dtype=torch.float32)
    policy = replace(policy_named("int4"), method="feedback")
    bundle = tmp_path / "model.moec"
    compile_checkpoint(tmp_path / "checkpoint", bundle, dtype="f32", quantization=policy, calibrate=True)
    assert read_record(PackingRecord, "packing", bundle / "packing.json").quantization == policy
    judge, nearest = reference(tmp_path / "checkpoint"), reference(tmp_path / "checkpoint")
    dequantize_dense(judge, bundle)
    take_experts(judge, bundle)
    dequantize_experts(nearest, FORMATS["int4-g32"])
    differing = [
        name
        for name, value in judge.state_dict().items()
        if name.endswith("down_proj") and not torch.equal(value, nearest.state_dict()[name])
    ]
    assert differing
    expected = expected_of(judge, within=SHORT_RELATIVE)
    with runtime.load(bundle, max_step_tokens=48) as model:
        check_agreement(model, expected, within=SHORT_RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["deepseek_v3", "gpt_oss"])
def test_a_quantized_checkpoint_is_kept_and_is_the_model_of_its_values(
    model_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mxfp4_gpt_oss(tmp_path, monkeypatch) if model_name == "gpt_oss" else fp8_deepseek_v3(tmp_path)
    manifest = compile_checkpoint(made.folder, tmp_path / "model.moec", dtype="f32")
    assert manifest.quantization == "keep"
    assert ("mxfp4" if model_name == "gpt_oss" else "fp8-e4m3") in manifest.formats
    judge = reference(made.plain)
    expected = expected_of(judge, within=SHORT_RELATIVE)
    with runtime.load(tmp_path / "model.moec", max_step_tokens=48) as model:
        check_agreement(model, expected, within=SHORT_RELATIVE)


PACKED: dict[str, tuple[Callable[[Path], Published], str | None]] = {
    "gptq": (partial(gptq_checkpoint, name="mixtral"), "int4-g32"),
    "gptq, zero points": (
        partial(gptq_checkpoint, name="qwen3_moe", symmetric=False, layout="gptq_v2"),
        "int4-g32-z",
    ),
    "gptq, 8 bits, a scale a row": (
        partial(gptq_checkpoint, name="deepseek_v2_lite", bits=8, group=-1),
        "int8-g128",
    ),
    "gptq, order of activations": (partial(gptq_checkpoint, name="mixtral", reordered=True), None),
    "awq": (partial(awq_checkpoint, name="deepseek_v2_lite"), "int4-g32-z"),
    "compressed-tensors, int4": (
        partial(
            compressed_checkpoint,
            name="qwen3_moe",
            layout="pack-quantized",
            settings={"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        ),
        "int4-g32",
    ),
    "compressed-tensors, FP8": (
        partial(
            compressed_checkpoint,
            name="deepseek_v3",
            layout="float-quantized",
            settings={"num_bits": 8, "type": "float", "strategy": "channel"},
        ),
        "fp8-e4m3",
    ),
}
"""What writes a checkpoint into a folder, and the format of its experts in the bundle."""


@pytest.mark.parametrize(
    "case", [name if name == "gptq" else pytest.param(name, marks=pytest.mark.slow) for name in PACKED]
)
def test_packed_checkpoints_are_the_model_of_their_values(case: str, tmp_path: Path) -> None:
    make, kind = PACKED[case]
    made = make(tmp_path)
    manifest = compile_checkpoint(made.folder, tmp_path / "model.moec", dtype="f32")
    assert set(manifest.formats) == {"float32", *([] if kind is None else [kind])}
    expected = expected_of(reference(made.plain), within=SHORT_RELATIVE)
    with runtime.load(tmp_path / "model.moec", max_step_tokens=48) as model:
        check_agreement(model, expected, within=SHORT_RELATIVE)


@pytest.mark.slow
def test_packing_elsewhere_makes_the_same_weights(tmp_path: Path) -> None:
    """The policy is in the modules."""
    save("mixtral", tmp_path / "checkpoint", dtype=torch.bfloat16)
    policy = policy_named("int4")
    here = compile_checkpoint(tmp_path / "checkpoint", tmp_path / "here.moec", quantization=policy)
    compile_checkpoint(tmp_path / "checkpoint", tmp_path / "modules", quantization=policy, modules_only=True)
    around = Surroundings(StageLog(quiet=True), ProgressBar("pack"), RuntimeProbe(), ())
    there = pack_model(
        str(tmp_path / "checkpoint"),
        tmp_path / "modules",
        tmp_path / "there.moec",
        Calibration(enabled=False),
        around,
    )
    assert (there.quantization, there.formats) == (here.quantization, here.formats)
    weights = {name: record for name, record in here.files.items() if name.startswith("weights/")}
    assert weights
    assert weights.items() <= there.files.items()

"""Experts rounded by what enters them on calibration tokens, as transformers sees it; packed like all others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from moec.artifacts.layout.experts import layout
from moec.artifacts.quantization import Quantization
from moec.artifacts.steps import ExpertsStep
from moec.compiler.calibration import rounding as rounding_module
from moec.compiler.calibration.chain import CalibrationRun
from moec.compiler.calibration.rounding import (
    FeedbackRounding,
    feedback_rounding,
    is_linear_in_up,
    moments_of,
)
from moec.compiler.calibration.values import ValueFiles
from moec.compiler.calibration.weights import CheckpointWeights
from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.packing import pack
from moec.compiler.profiling.calibration import Prompt
from moec.compiler.quantization import policy_named, quantize
from moec.compiler.request import Calibration
from moec.errors import BundleError, CheckpointError
from moec.formats import FORMATS, dequantize, dequantize_rows
from moec.formats.nearest import round_to_nearest
from tests.support.feedback import CALIBRATION, FEEDBACK, TOKENS
from tests.support.graphs import parts
from tests.support.notes import Notes
from tests.support.tiny_models import build, save

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.partition import PartitionedModel
    from moec.formats import Format


def prepared(
    folder: Path, policy: Quantization, name: str = "mixtral"
) -> tuple[Checkpoint, PartitionedModel, PartitionedModel]:
    """A checkpoint, its chain, and the chain with formats."""
    checkpoint = open_checkpoint(save(name, folder / "checkpoint"))
    made = parts(name)
    plain = replace(made, packing=replace(made.packing, config_sha256=checkpoint.config_sha256))
    return checkpoint, plain, quantize(plain, policy)


def packed(
    checkpoint: Checkpoint, chosen: PartitionedModel, output: Path, rounding: FeedbackRounding | None
) -> dict[str, bytes]:
    result = pack(
        checkpoint, chosen.model, chosen.packing, chosen.constants, output, calibrated=rounding, workers=2
    )
    return {file.path.name: (output / file.path).read_bytes() for file in result.files}


def inputs() -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By layer what transformers feeds the experts, and which it chooses."""
    model, found = build("mixtral"), dict[int, list[Any]]()
    for layer, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_pre_hook(
            lambda _, args, layer=layer: found.setdefault(layer, []).append(args[:2])
        )
    with torch.inference_mode():
        for ids in TOKENS:
            model(torch.tensor([ids]))
    return {
        layer: (torch.cat([x.reshape(-1, 64) for x, _ in each]), torch.cat([index for _, index in each]))
        for layer, each in found.items()
    }


def outputs(
    model: PartitionedModel, files: dict[str, bytes], kind: Format
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What each expert makes of the tokens that chose it: as it was, as it was packed, and rounded to nearest."""
    weights, body = build("mixtral").state_dict(), model.model.bodies[0]
    for layer, (x, index) in inputs().items():
        module = f"model.layers.{layer}.mlp.experts"
        both, downs = weights[f"{module}.gate_up_proj"], weights[f"{module}.down_proj"]
        data = np.frombuffer(files[f"experts-{layer:05d}.bin"], np.uint8).reshape(len(downs), -1)
        for expert, down in enumerate(downs):
            plain = {"gate": both[expert].chunk(2)[0], "up": both[expert].chunk(2)[1], "down": down}
            found, nearest = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
            for name, weight in plain.items():
                part = layout(body).part(name)
                rows = data[expert, part.offset_bytes :][: part.size_bytes].reshape(part.shape)
                found[name] = torch.from_numpy(dequantize_rows(kind, rows, weight.shape[1]))
                nearest[name] = torch.from_numpy(dequantize(kind, round_to_nearest(kind, weight.numpy())))
            entered = x[(index == expert).any(1)]
            made = [
                (torch.nn.functional.silu(entered @ each["gate"].T) * (entered @ each["up"].T))
                @ each["down"].T
                for each in (plain, found, nearest)
            ]
            yield made[0], made[1], made[2]


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("name", "gain"), [("int4", 0.9), pytest.param("int8", 1.0, marks=pytest.mark.slow)])
def test_experts_are_nearer_than_rounded_to_nearest(
    name: str, gain: float, scaled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With columns of down and rows of up scaled, and without."""
    monkeypatch.setattr(rounding_module, "SCALING_TOKENS", 1 if scaled else 1 << 20)
    policy = replace(policy_named(name), method="feedback")
    checkpoint, plain, chosen = prepared(tmp_path, policy)
    log = Notes()
    with feedback_rounding(plain, checkpoint, CALIBRATION, log) as rounding:
        files = packed(checkpoint, chosen, tmp_path / "out", rounding)
    assert "600 calibration tokens, which is few" in log.notes[0]
    errors = [0.0, 0.0]
    for expected, found, nearest in outputs(chosen, files, FORMATS[str(chosen.model.bodies[0].format)]):
        errors[0] += float((found - expected).square().sum())
        errors[1] += float((nearest - expected).square().sum())
    assert errors[0] < gain * errors[1]


@pytest.mark.slow
def test_every_part_is_where_it_belongs(tmp_path: Path) -> None:
    """Gate and up alternate in this checkpoint, matrices are input-major, and there are biases."""
    checkpoint, plain, chosen = prepared(tmp_path, FEEDBACK, "gpt_oss")
    with feedback_rounding(plain, checkpoint, CALIBRATION, Notes()) as rounding:
        files = packed(checkpoint, chosen, tmp_path / "out", rounding)
    weights, body = build("gpt_oss").state_dict(), chosen.model.bodies[0]
    for layer in chosen.model.experts:
        values = {
            name.removeprefix(f"{layer.module}."): value
            for name, value in weights.items()
            if name.startswith(layer.module)
        }
        data = np.frombuffer(files[f"experts-{layer.layer:05d}.bin"], np.uint8).reshape(layer.experts, -1)
        for expert in range(layer.experts):
            both, biases = values["gate_up_proj"][expert].T, values["gate_up_proj_bias"][expert]
            expected = {"gate": both[::2], "up": both[1::2], "down": values["down_proj"][expert].T}
            expected |= {"gate_bias": biases[::2], "up_bias": biases[1::2]}
            expected |= {"down_bias": values["down_proj_bias"][expert]}
            for part in layout(body).parts:
                raw, wanted = (
                    data[expert, part.offset_bytes :][: part.size_bytes],
                    expected[part.name].numpy(),
                )
                if part.name.endswith("bias"):
                    np.testing.assert_array_equal(raw.view(np.float32), wanted)
                    continue
                found = dequantize_rows(FORMATS["int4-g32"], raw.reshape(part.shape), wanted.shape[1])
                assert np.square(found - wanted).mean() < 0.02 * np.square(wanted).mean()


def test_all_else_is_rounded_to_nearest_and_packing_resumes(tmp_path: Path) -> None:
    checkpoint, plain, chosen = prepared(tmp_path, FEEDBACK)
    nearest = packed(checkpoint, quantize(plain, policy_named("int4")), tmp_path / "nearest", None)
    with feedback_rounding(plain, checkpoint, CALIBRATION, Notes()) as rounding:
        files = packed(checkpoint, chosen, tmp_path / "out", rounding)
        journal = (tmp_path / "out" / "pack-journal.jsonl").read_text()
        assert packed(checkpoint, chosen, tmp_path / "out", rounding) == files
        assert (tmp_path / "out" / "pack-journal.jsonl").read_text() == journal
    assert files["dense.safetensors"] == nearest["dense.safetensors"]
    assert files["experts-00000.bin"] != nearest["experts-00000.bin"]
    other = Calibration(prompts=CALIBRATION.prompts[:2] if CALIBRATION.prompts else None)
    with feedback_rounding(plain, checkpoint, other, Notes()) as rounding:
        changed = packed(checkpoint, chosen, tmp_path / "out", rounding)
    assert changed["experts-00000.bin"] != files["experts-00000.bin"]


def test_experts_that_nothing_entered_are_rounded_to_nearest(tmp_path: Path) -> None:
    checkpoint, plain, chosen = prepared(tmp_path, FEEDBACK)
    few = Calibration(prompts=(Prompt(None, (5, 6)),))
    nearest = packed(checkpoint, quantize(plain, policy_named("int4")), tmp_path / "nearest", None)
    with feedback_rounding(plain, checkpoint, few, Notes()) as rounding:
        files = packed(checkpoint, chosen, tmp_path / "out", rounding)
    part = layout(chosen.model.bodies[0]).part("down")
    downs = [
        np.frombuffer(each["experts-00000.bin"], np.uint8).reshape(5, -1)[:, part.offset_bytes :][
            :, : part.size_bytes
        ]
        for each in (files, nearest)
    ]
    assert (downs[0] == downs[1]).all(1).any()


def test_values_that_are_not_finite_name_their_tensor(tmp_path: Path) -> None:
    checkpoint, plain, chosen = prepared(tmp_path, FEEDBACK)
    with feedback_rounding(plain, checkpoint, CALIBRATION, Notes()) as rounding:
        weights = checkpoint.path / "model.safetensors"
        entry = next(entry for name, entry in checkpoint.index.items() if "experts.3.w2" in name)
        with weights.open("r+b") as file:
            file.seek(entry.begin)
            file.write(np.float32(np.nan).tobytes())
        with pytest.raises(CheckpointError, match=r"down_proj\[3\] cannot be stored as int4-g32"):
            packed(checkpoint, chosen, tmp_path / "out", rounding)


def test_only_what_enters_experts_is_kept(tmp_path: Path) -> None:
    checkpoint, plain, _ = prepared(tmp_path, FEEDBACK)
    (tmp_path / "values").mkdir()
    values = ValueFiles(tmp_path / "values")
    run = CalibrationRun(plain, CheckpointWeights(checkpoint, plain), TOKENS, values)
    steps = [step for step in plain.model.steps if isinstance(step, ExpertsStep)]
    keep = {name for step in steps for name in (step.hidden, step.index)}
    run.forward(keep=keep)
    assert all(name in values for name in keep)
    assert len(list((tmp_path / "values").iterdir())) == len(keep)
    for step, (x, index) in zip(steps, inputs().values(), strict=True):
        torch.testing.assert_close(values[step.hidden], x, rtol=1e-4, atol=1e-5)
        assert torch.equal(values[step.index].sort().values, index.sort().values)


def test_threads_and_their_teams_are_as_many_as_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, plain, chosen = prepared(tmp_path, FEEDBACK)
    teams: set[int] = set()

    def noted(*arguments: Any) -> NDArray[np.float32]:
        teams.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return moments_of(*arguments)

    monkeypatch.setattr(rounding_module, "moments_of", noted)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    before = threadpool_info()
    with feedback_rounding(plain, checkpoint, CALIBRATION, Notes()) as rounding, threadpool_limits(8, "blas"):
        packed(checkpoint, chosen, tmp_path / "out", rounding)
    assert teams == {3}
    assert threadpool_info() == before


def test_packing_by_itself_cannot(tmp_path: Path) -> None:
    checkpoint, _, chosen = prepared(tmp_path, FEEDBACK)
    with pytest.raises(BundleError, match="the method feedback"):
        packed(checkpoint, chosen, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_rows_of_up_are_scaled_where_they_are_factors() -> None:
    body = parts("mixtral").model.bodies[0]
    assert is_linear_in_up(body)
    assert is_linear_in_up(replace(body, activation=("mul", "up", ("gelu", "gate"))))
    assert not is_linear_in_up(replace(body, up_bias=True))
    assert not is_linear_in_up(replace(body, activation=("mul", ("silu", "gate"), ("add", "up", 1.0))))
    assert not is_linear_in_up(replace(body, activation=("mul", ("silu", "up"), "up")))
    assert not is_linear_in_up(replace(body, gated=False, activation=("relu", "up")))
    assert not is_linear_in_up(parts("gpt_oss").model.bodies[0])

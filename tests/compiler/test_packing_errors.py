"""A checkpoint or disk that cannot be packed is a typed error, before anything is written if possible."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.packing import PackResult, pack
from moec.errors import BundleError, CheckpointError, OutputError
from tests.support.packing_records import meta_model, records
from tests.support.tiny_models import save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONSTANTS = {"table": torch.tensor([1.0, float("-inf"), 3.0])}


class Case(NamedTuple):
    folder: Path
    output: Path

    def edit(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        """Change the checkpoint's tensors."""
        file = self.folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    def pack(self, warn: Callable[[str, int], None] | None = None) -> PackResult:
        checkpoint = open_checkpoint(self.folder)
        model, packing = records(meta_model(checkpoint.config), checkpoint.config)
        return pack(checkpoint, model, packing, CONSTANTS, self.output, warn=warn)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(save("deepseek_v3", tmp_path / "model"), tmp_path / "out")


def refused(case: Case) -> str:
    with pytest.raises(CheckpointError) as caught:
        case.pack()
    assert not case.output.exists()
    assert caught.value.do
    return str(caught.value)


def test_missing_dense_tensor(case: Case) -> None:
    case.edit(lambda tensors: tensors.pop("model.norm.weight"))
    assert "1 tensor missing in the checkpoint: model.norm.weight." in refused(case)


def test_missing_tensors_of_experts_are_named(case: Case) -> None:
    gone = ["model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.2.mlp.experts.11.down_proj.weight"]
    case.edit(lambda tensors: [tensors.pop(name) for name in gone])
    text = refused(case)
    assert "2 tensors missing" in text
    assert all(name in text for name in gone)


def test_missing_experts_of_a_layer(case: Case) -> None:
    case.edit(lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp.experts." in name])
    text = refused(case)
    assert "model.layers.1.mlp.experts.gate_up_proj" in text
    assert "model.layers.1.mlp.experts.down_proj" in text


def test_missing_gates_of_a_layer(case: Case) -> None:
    case.edit(lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp.experts." in n and "gate_proj" in n])
    assert "experts.gate_up_proj (from mlp.experts.*.gate_proj.weight)" in refused(case)


def test_at_most_ten_missing_tensors_are_named(case: Case) -> None:
    case.edit(lambda t: [t.pop(n) for n in list(t) if "self_attn" in n])
    text = refused(case)
    assert text.count("self_attn") == 10
    assert "more" in text


def test_unexpected_tensor(case: Case) -> None:
    case.edit(lambda tensors: tensors.update({"model.layers.0.adapter.weight": torch.zeros(2)}))
    assert "1 tensor unexpected in the checkpoint: model.layers.0.adapter.weight." in refused(case)


def test_known_extras_are_left_out_and_listed(case: Case) -> None:
    extras = ["model.layers.3.eh_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    case.edit(lambda tensors: tensors.update({name: torch.zeros(2) for name in extras}))
    assert case.pack().extras == tuple(sorted(extras))


def test_wrong_shape(case: Case) -> None:
    case.edit(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}))
    text = refused(case)
    assert "model.norm.weight has the wrong shape: [65] in the checkpoint, [64] by its config" in text


def test_wrong_shape_of_an_expert(case: Case) -> None:
    name = "model.layers.2.mlp.experts.7.gate_proj.weight"
    case.edit(lambda tensors: tensors.update({name: torch.zeros(16, 64)}))
    assert f"{name} has the wrong shape: [16, 64] in the checkpoint, [32, 64]" in refused(case)


def test_too_many_experts(case: Case) -> None:
    names = [f"model.layers.2.mlp.experts.12.{part}_proj.weight" for part in ("gate", "up", "down")]
    shapes = [(32, 64), (32, 64), (64, 32)]
    case.edit(lambda tensors: tensors.update({n: torch.zeros(s) for n, s in zip(names, shapes, strict=True)}))
    assert "unexpected" in refused(case)


def test_modules_of_another_model(case: Case) -> None:
    checkpoint = open_checkpoint(case.folder)
    model, packing = records(meta_model(checkpoint.config), checkpoint.config | {"hidden_size": 1})
    with pytest.raises(CheckpointError, match="compiled for another model"):
        pack(checkpoint, model, packing, CONSTANTS, case.output)


def test_records_that_do_not_belong_together(case: Case) -> None:
    checkpoint = open_checkpoint(case.folder)
    model, packing = records(meta_model(checkpoint.config), checkpoint.config)
    with pytest.raises(BundleError, match="do not belong together"):
        pack(checkpoint, model, packing, {}, case.output)


def test_nan_is_warned_of_once_a_tensor_and_counted(case: Case) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = float("nan")
        tensors["model.layers.1.mlp.experts.4.up_proj.weight"][1, 2:5] = float("inf")
        tensors["model.layers.1.mlp.experts.4.gate_proj.weight"][0, 0] = float("-inf")

    case.edit(spoil)
    warned: list[tuple[str, int]] = []
    result = case.pack(lambda tensor, count: warned.append((tensor, count)))
    assert result.nonfinite == {"model.norm.weight": 1, "model.layers.1.mlp.experts.gate_up_proj[4]": 4}
    assert sorted(warned) == sorted(result.nonfinite.items())


def test_shard_that_shrinks_while_packing(case: Case) -> None:
    checkpoint = open_checkpoint(case.folder)
    model, packing = records(meta_model(checkpoint.config), checkpoint.config)
    file = case.folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="ends at byte"):
        pack(checkpoint, model, packing, CONSTANTS, case.output)


def test_too_small_disk(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(case.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"bytes \(949\.2 KiB\) too small") as caught:
        case.pack()
    assert "1000 bytes are free" in str(caught.value)
    assert list((case.output / "weights").iterdir()) == []


def test_full_disk_midway_then_room_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real, room = os.write, [300_000]

    def write(file: int, data: memoryview) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OutputError, match="disk is full"):
        case.pack()
    assert any(path.suffix == ".part" for path in (case.output / "weights").iterdir())
    monkeypatch.setattr(os, "write", real)
    case.pack()
    assert all(path.suffix != ".part" for path in (case.output / "weights").iterdir())


def test_output_that_is_not_a_folder(case: Case) -> None:
    case.output.write_text("a file")
    with pytest.raises(OutputError, match="Cannot write"):
        case.pack()
    assert case.output.read_text() == "a file"


def test_folder_without_permission(case: Case) -> None:
    if os.geteuid() == 0:
        case.output.symlink_to("/proc/1/none")  # root may write anywhere else
    else:
        case.output.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Cannot write"):
        case.pack()


def test_config_without_weights(case: Case) -> None:
    (case.folder / "model.safetensors").unlink()
    assert "No weights in" in refused(case)


def test_layers_past_the_last_are_known_by_config_or_by_what_they_have(case: Case) -> None:
    """Layers that predict ahead are left out; others would mean a config of a smaller model."""
    case.edit(lambda tensors: tensors.update({"model.layers.3.mlp.gate.weight": torch.zeros(2)}))
    file = case.folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    assert "1 tensor unexpected in the checkpoint: model.layers.3.mlp.gate.weight" in refused(case)
    file.write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert case.pack().extras == ("model.layers.3.mlp.gate.weight",)

"""Conversions of transformers that packing does not know by heart run as they are, one expert at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from moec.compiler.checkpoint.safetensors_header import read_header
from moec.compiler.packing.tensors.binding import Converted, Stacked, bind, convert_expert, expert_tensors
from moec.compiler.packing.tensors.check import check_names
from moec.compiler.packing.tensors.reading import FileSource, TensorReader
from moec.compiler.packing.tensors.stored import Stored, stored_tensors
from moec.errors import CheckpointError
from tests.support.packing_records import meta_model
from tests.support.tiny_models import TINY

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

UP = "model.layers.0.mlp.experts.gate_up_proj"
GATES = ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"]


@pytest.fixture
def model() -> PreTrainedModel:
    return meta_model(TINY["qwen3_moe"]().to_dict())


def tensors_in(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Stored]:
    save_file(tensors, folder / "model.safetensors")
    return stored_tensors(read_header(folder / "model.safetensors"), {})


def use(monkeypatch: pytest.MonkeyPatch, converter: WeightConverter) -> None:
    name = "moec.compiler.packing.tensors.binding.get_model_conversion_mapping"
    monkeypatch.setattr(name, lambda _: [converter])


def test_transposed_fused_experts(
    tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As qwen3_vl_moe: the checkpoint has [E, H, 2I], the model [E, 2I, H]."""
    use(
        monkeypatch,
        WeightConverter("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", [Transpose(1, 2)]),
    )
    fused = torch.randn(8, 64, 64)
    binding = bind(model, tensors_in(tmp_path, {UP: fused})).parameters[UP]
    assert isinstance(binding, Converted)
    reader = TensorReader(FileSource())
    for expert in range(8):
        made = convert_expert(binding, expert, lambda stored: reader.whole(stored, torch.float32), model)
        assert torch.equal(made, fused[expert].mT)


def test_merged_experts_with_more_to_do(
    tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = [MergeModulelist(0), Concatenate(1), Transpose(1, 2)]
    use(monkeypatch, WeightConverter(GATES, "mlp.experts.gate_up_proj", operations))
    names = [
        f"model.layers.0.mlp.experts.{e}.{part}_proj.weight" for e in range(12) for part in ("gate", "up")
    ]
    tensors = {name: torch.randn(2, 3) for name in names}
    binding = bind(model, tensors_in(tmp_path, tensors)).parameters[UP]
    assert isinstance(binding, Converted)
    reader = TensorReader(FileSource())
    read: list[str] = []

    def load(stored: Stored) -> torch.Tensor:
        read.append(stored.name)
        return reader.whole(stored, torch.float32)

    for expert in (0, 2, 11):
        gate, up = names[2 * expert : 2 * expert + 2]
        made = convert_expert(binding, expert, load, model)
        assert torch.equal(made, torch.cat([tensors[gate], tensors[up]]).mT)
        assert read == [gate, up]
        read.clear()


def test_fused_gates_and_ups(tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As step3p7: fused over the experts, but gate and up apart."""
    sources = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    use(monkeypatch, WeightConverter(sources, "mlp.experts.gate_up_proj", [Concatenate(1)]))
    gate, up = torch.randn(8, 32, 64), torch.randn(8, 32, 64)
    tensors = {"model.layers.0.mlp.gate_proj.weight": gate, "model.layers.0.mlp.up_proj.weight": up}
    binding = bind(model, tensors_in(tmp_path, tensors)).parameters[UP]
    assert isinstance(binding, Stacked)
    reader = TensorReader(FileSource())
    for expert in range(8):
        parts = [reader.whole(stored, torch.float32) for stored in expert_tensors(binding, expert)]
        assert torch.equal(torch.cat(parts), torch.cat([gate[expert], up[expert]]))


def test_conversion_that_fails_names_tensors_and_shapes(
    tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(
        monkeypatch,
        WeightConverter("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", [Transpose(1, 2)]),
    )
    bindings = bind(model, tensors_in(tmp_path, {UP: torch.zeros(8, 5)}))
    with pytest.raises(CheckpointError, match=r"Cannot make .*gate_up_proj \[8, 64, 64\] from .* \[8, 5\]"):
        check_names(model, bindings, [UP])


def test_conversion_to_the_wrong_shape(
    tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(
        monkeypatch,
        WeightConverter("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", [Transpose(1, 2)]),
    )
    bindings = bind(model, tensors_in(tmp_path, {UP: torch.zeros(8, 64, 32)}))
    with pytest.raises(CheckpointError, match=r"\[8, 32, 64\] in the checkpoint, \[8, 64, 64\]"):
        check_names(model, bindings, [UP])


def test_tied_parameter_may_have_either_name(tmp_path: Path, model: PreTrainedModel) -> None:
    tensors = tensors_in(tmp_path, {"lm_head.weight": torch.zeros(128, 64)})
    found, _ = check_names(model, bind(model, tensors), ["model.embed_tokens.weight"])
    assert found["model.embed_tokens.weight"].stored_tensors[0].name == "lm_head.weight"

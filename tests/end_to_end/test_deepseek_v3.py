"""DeepSeek-V3 as it is published: FP8 in ragged blocks, in shards, with its MTP layer, against what it means."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
import torch

from moec import runtime
from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.packing import pack
from moec.errors import CheckpointError
from tests.support.agreement import check_agreement, expected_of, reference
from tests.support.compiling import compile_checkpoint
from tests.support.packing_records import meta_model, records
from tests.support.tiny_models import save
from tests.support.tiny_models.deepseek_fp8 import save_as_published

NEW_TOKENS = 16


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As published, and what it means in float32."""
    folder = tmp_path_factory.mktemp("v3")
    return save_as_published(save("deepseek_v3", folder / "model"), folder)


def packed(folder: Path, output: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Experts' files, and the tensors that were left out."""
    checkpoint = open_checkpoint(folder)
    model, packing = records(meta_model(checkpoint.config, torch.float32), checkpoint.config)
    result = pack(checkpoint, model, packing, {"table": torch.zeros(3)}, output)
    experts = [output / file.path for file in result.files if "experts" in file.path.name]
    return {path.name: path.read_bytes() for path in experts}, result.extras


def test_it_packs_as_what_it_means_and_its_mtp_layer_is_left_out(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    published, plain = checkpoints
    assert len(list(published.glob("*.safetensors"))) > 3
    found, extras = packed(published, tmp_path / "a")
    assert (found, ()) == packed(plain, tmp_path / "b")
    assert {name.rsplit(".", 1)[0] for name in extras} > {
        f"model.layers.3.{part}" for part in ("eh_proj", "enorm", "hnorm", "shared_head.head", "embed_tokens")
    }
    assert all(name.startswith("model.layers.3.") for name in extras)
    assert not any(name.endswith("_scale_inv") for name in extras)


def test_a_layer_of_the_model_itself_may_not_be_missing(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    """One layer more in the config, and the MTP layer would be taken for it but for what it lacks or has besides."""
    folder = Path(copytree(checkpoints[0], tmp_path / "more"))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(CheckpointError, match=r"unexpected.*model\.layers\.3\.(eh_proj|embed_tokens)"):
        packed(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tokens_are_those_of_the_dequantized_model(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    published, plain = checkpoints
    compile_checkpoint(published, tmp_path / "v3.moec", dtype="f32")
    expected = expected_of(reference(plain), NEW_TOKENS)
    with runtime.load(tmp_path / "v3.moec", max_step_tokens=24) as model:
        check_agreement(model, expected)

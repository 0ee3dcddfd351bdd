"""Random checkpoints load, random bundles verify and generate, and their values are what they should be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from benchmarks.make_checkpoint import CONFIGS
from benchmarks.random_weights.bundle import write_bundle, write_weights
from benchmarks.random_weights.checkpoint import published_tensors, write_checkpoint
from benchmarks.random_weights.values import SMALL_POOL_VALUES, RandomPool, RandomPools
from moec import runtime
from moec.artifacts.files.bundle import Modules
from moec.artifacts.files.checks import dense_problems, experts_problems
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.files.safetensors import read_table
from moec.artifacts.ids import LayerId, TensorName
from moec.artifacts.layout.experts import layout
from moec.artifacts.paths import DENSE_NAME, experts_name
from moec.compiler.modules import save_modules
from moec.compiler.quantization import policy_named, quantize
from moec.formats import FORMATS, dequantize_rows
from tests.support.canaries import most_slow
from tests.support.compiling import compile_checkpoint
from tests.support.graphs import parts
from tests.support.tiny_models import TINY, save

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.artifacts.files.manifest import FileRecord
    from moec.compiler.partition import PartitionedModel

ROOT = Path(__file__).parents[2]
MODELS = ["deepseek_v2_lite", "deepseek_v3", "gpt_oss", "qwen3_moe", "mixtral"]


def tiny_config(name: str, folder: Path) -> Path:
    config = TINY[name]()
    config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    return folder / "config.json"


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_is_whole_and_loads(name: str, tmp_path: Path) -> None:
    config = tiny_config(name, tmp_path / "config")
    folder = tmp_path / "checkpoint"
    size = write_checkpoint(config, folder, shard_bytes=100_000, pool_values=SMALL_POOL_VALUES, workers=2)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == size
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    assert (model.model.norm.weight == 1).all()
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("name", most_slow(MODELS, ("mixtral",)))
def test_bundle_verifies_and_generates(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "checkpoint", dtype=torch.bfloat16)
    modules, output = tmp_path / "m", tmp_path / "model.moec"
    compile_checkpoint(tmp_path / "checkpoint", modules, dtype="bf16", modules_only=True)
    write_bundle(modules, output, deviation=0.1, pool_values=SMALL_POOL_VALUES, workers=2)
    bundle = open_bundle(output, verify="full")
    norm = next(place for name, place in bundle.dense.items() if name.endswith("input_layernorm.weight"))
    assert norm.dtype == "float32"
    raw = (output / "weights" / "dense.safetensors").read_bytes()
    first = np.frombuffer(raw[norm.offset_bytes :], np.float32, norm.size_bytes // 4)
    assert (first == 1).all()
    with runtime.load(output, device="cpu") as loaded:
        tokens = loaded.generate([3, 4, 5], max_new_tokens=6, do_sample=False, eos_token_id=[])
        logits = loaded.forward([3, 4, 5])
    assert tokens.shape == (1, 9)
    assert np.isfinite(logits).all()
    assert logits.std() > 0
    alike = tmp_path / "alike.moec"
    write_bundle(modules, alike, pool_values=SMALL_POOL_VALUES, workers=2, alike=True)
    assert open_bundle(alike, verify="full").model == bundle.model
    inodes = {path.stat().st_ino for path in (alike / "weights").glob("experts-*")}
    assert len(inodes) == len(bundle.model.bodies)


def written(found: PartitionedModel, folder: Path) -> tuple[Path, dict[str, FileRecord]]:
    """Random weights of a model: where they are, and their files."""
    modules, output = folder / "m", folder / "out"
    for each in (modules, output / "weights"):
        each.mkdir(parents=True)
    save_modules(found, modules)
    manifest: Any = None
    whole = Modules(modules, manifest, found.model, found.packing, {})
    return output, write_weights(whole, output, RandomPools(SMALL_POOL_VALUES, 0.1), 2)


def test_quantized_weights_are_as_the_records_say(tmp_path: Path) -> None:
    found = quantize(parts("gpt_oss", "bfloat16"), policy_named("int4"))
    output, files = written(found, tmp_path)
    table = read_table(output / DENSE_NAME)
    assert list(dense_problems(found.model, table)) == []
    assert list(experts_problems(found.model, {path: file.size_bytes for path, file in files.items()})) == []
    data = (output / DENSE_NAME).read_bytes()
    head, shape = table[TensorName("lm_head.weight")], found.model.vocab_size
    rows = np.frombuffer(data[head.offset_bytes :][: head.size_bytes], np.uint8).reshape(shape, -1)
    values = dequantize_rows(FORMATS["int8-g128"], rows, found.model.hidden_size)
    assert 0.08 < values.std() < 0.12
    part = layout(found.model.bodies[0]).part("down")
    expert = np.fromfile(output / experts_name(LayerId(0)), np.uint8)[part.offset_bytes :][: part.size_bytes]
    kind = FORMATS["int4-g32"]
    values = dequantize_rows(kind, expert.reshape(part.shape), found.model.bodies[0].intermediate)
    assert 0.08 < values.std() < 0.12


def test_forms_of_a_parameter_are_of_one(tmp_path: Path) -> None:
    output, _ = written(parts("deepseek_v2_lite", "bfloat16"), tmp_path)
    table, data = read_table(output / DENSE_NAME), (output / DENSE_NAME).read_bytes()
    keys = "model.layers.{}.self_attn.kv_b_proj.weight#{}"

    def form(layer: int, number: int) -> NDArray[np.uint16]:
        place = table[TensorName(keys.format(layer, number))]
        return np.frombuffer(data[place.offset_bytes :][: place.size_bytes], np.uint16).reshape(place.shape)

    assert np.array_equal(form(0, 1), form(0, 2).swapaxes(1, 2))
    assert not np.array_equal(form(0, 1), form(1, 1))
    assert len(np.unique(np.concatenate([form(0, 2), form(0, 3)], 1))) > form(0, 2).size // 2


def test_bundle_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, benchmarks.make_checkpoint, benchmarks.random_weights.bundle; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout.strip() == "False"


def environment() -> dict[str, str]:
    return {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PATH": ""}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_pool_is_normal_and_does_not_depend_on_threads(dtype: str) -> None:
    pool = RandomPool(dtype, 1 << 16, 0.5, workers=1)
    raw = b"".join(bytes(piece) for piece in pool.pieces(1 << 16, 1 << 16))
    values = torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).float()
    assert values.std().item() == pytest.approx(0.5, rel=0.02)
    assert abs(values.mean().item()) < 0.01
    assert raw == bytes(RandomPool(dtype, 1 << 16, 0.5, workers=3).values.tobytes())


def test_pool_goes_round() -> None:
    pool = RandomPool("bfloat16", 1009)
    raw = b"".join(bytes(piece) for piece in pool.pieces(1000, 2000))
    assert np.array_equal(np.frombuffer(raw, np.uint16), np.resize(np.roll(pool.values, -1000), 2000))


@pytest.mark.parametrize(
    ("name", "tensors", "gigabytes"),
    [
        ("deepseek-v2-lite", 5291, 31.4),
        ("qwen3-30b-a3b", 18867, 61.1),
        ("mixtral-8x7b", 995, 93.4),
        ("gpt-oss-20b", 459, 13.8),
    ],
)
def test_real_configs_have_the_published_tensors(
    name: str, tensors: int, gigabytes: float, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(CONFIGS[name].read_bytes())
    found = published_tensors(tmp_path, "bfloat16")
    assert len(found) == tensors
    assert sum(tensor.size_bytes for tensor in found) / 1e9 == pytest.approx(gigabytes, abs=0.05)

"""What pack writes is, bit for bit, what transformers loads."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.generation import generation_defaults
from moec.compiler.packing import pack
from moec.compiler.packing.tensors.reading import FileSource
from moec.compiler.packing.tensors.recipes import evaluate
from moec.compiler.partition import partition
from moec.compiler.trace import trace
from tests.support.canaries import most_slow
from tests.support.packing_records import expected_dense, expected_expert, loaded_model, raw, records
from tests.support.tiny_models import TINY, build, save

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

CONSTANTS = {"table": torch.tensor([1.0, float("-inf"), 3.0])}


class CountingSource(FileSource):
    """Counts how often each byte of each file is read."""

    def __init__(self) -> None:
        self.spans: dict[Path, list[tuple[int, int]]] = {}

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        self.spans.setdefault(path, []).append((offset, offset + len(buffer)))
        super().read_into(path, offset, buffer)

    def overlaps(self) -> int:
        """Bytes that were read more than once."""
        count = 0
        for spans in self.spans.values():
            end = 0
            for first, last in sorted(spans):
                count += max(min(end, last) - first, 0)
                end = max(end, last)
        return count


def packs_as_loaded(folder: Path, output: Path, dtype: torch.dtype) -> CountingSource:
    """Pack ``folder`` and compare all bytes with the model that transformers loads from it."""
    reference: PreTrainedModel = loaded_model(folder, dtype)
    checkpoint = open_checkpoint(folder)
    model, packing = records(reference, checkpoint.config)
    source = CountingSource()
    result = pack(checkpoint, model, packing, CONSTANTS, output, source=source)
    assert [str(file.path) for file in result.files] == [
        "weights/dense.safetensors",
        *(f"weights/experts-{layer.layer:05d}.bin" for layer in model.experts),
    ]
    assert not result.nonfinite
    packed = load_file(output / "weights/dense.safetensors")
    for name, value in expected_dense(reference, packing, CONSTANTS).items():
        assert raw(packed[name]) == raw(value), name
        assert packed[name].dtype == value.dtype
    for expert_source, layer in zip(packing.experts, model.experts, strict=True):
        data = (output / f"weights/experts-{layer.layer:05d}.bin").read_bytes()
        stride, rest = divmod(len(data), layer.experts)
        assert rest == 0
        for expert in range(layer.experts):
            wanted = expected_expert(reference, model, expert_source, expert)
            assert data[expert * stride : (expert + 1) * stride] == wanted, (layer.layer, expert)
    assert source.overlaps() == 0
    return source


@pytest.mark.parametrize("name", most_slow(TINY))
def test_sharded_checkpoint_packs_as_transformers_loads_it(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "model", shard="100KB")
    source = packs_as_loaded(tmp_path / "model", tmp_path / "out", torch.float32)
    assert len(source.spans) > 2


@pytest.mark.parametrize(("name", "dtype"), [("mixtral", torch.float32), ("gpt_oss", torch.bfloat16)])
def test_single_bf16_file_packs_at_another_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(name, tmp_path / "model", dtype=torch.bfloat16)
    packs_as_loaded(tmp_path / "model", tmp_path / "out", dtype)


def test_float32_checkpoint_packs_as_bf16(tmp_path: Path) -> None:
    save("deepseek_v3", tmp_path / "model")
    packs_as_loaded(tmp_path / "model", tmp_path / "out", torch.bfloat16)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_fused_checkpoint_packs_as_transformers_loads_it(name: str, tmp_path: Path) -> None:
    """The checkpoint holds transformers' own parameters, experts fused."""
    save(name, tmp_path / "model")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    state = {key: value.clone() for key, value in reference.state_dict().items() if key != "lm_head.weight"}
    state["lm_head.weight"] = reference.state_dict()["lm_head.weight"].clone()
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    packs_as_loaded(tmp_path / "model", tmp_path / "out", torch.float32)


def test_small_pieces_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.compiler.packing.tensors.reading.PIECE_BYTES", 1000)
    save("qwen2_moe", tmp_path / "model")
    source = packs_as_loaded(tmp_path / "model", tmp_path / "out", torch.bfloat16)
    assert max(end - begin for spans in source.spans.values() for begin, end in spans) < 40000
    assert Counter(len(spans) > 200 for spans in source.spans.values())[True]


def test_dense_file_is_aligned(tmp_path: Path) -> None:
    save("phimoe", tmp_path / "model", dtype=torch.bfloat16)
    packs_as_loaded(tmp_path / "model", tmp_path / "out", torch.bfloat16)
    data = (tmp_path / "out/weights/dense.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    assert begin % 4096 == 0
    header = json.loads(data[8:begin])
    fillers = [name for name in header if name.startswith("moec.padding.")]
    assert fillers == [f"moec.padding.{number}" for number in range(len(fillers))]
    assert all(
        (begin + entry["data_offsets"][0]) % 64 == 0 for name, entry in header.items() if name not in fillers
    )


def packs_as_recorded(folder: Path, output: Path) -> dict[str, torch.Tensor]:
    """Compile ``folder`` for bfloat16 and pack it; all bytes are as the recipes say of the loaded model."""
    checkpoint = open_checkpoint(folder)
    parts = partition(
        trace(checkpoint.config, dtype="bfloat16", max_context=64),
        generation=generation_defaults(checkpoint.config, checkpoint.generation_config),
        config_sha256=checkpoint.config_sha256,
    )
    source = CountingSource()
    pack(checkpoint, parts.model, parts.packing, parts.constants, output, source=source)
    reference = loaded_model(folder, torch.float32)
    state = reference.state_dict()
    dtypes = parts.packing.parameter_dtypes
    assert set(dtypes.values()) == {"bfloat16", "float32"}
    sources = {name: state[name].to(getattr(torch, dtype)) for name, dtype in dtypes.items()}
    sources |= {f"constant:{key}": value for key, value in parts.constants.items()}
    packed: dict[str, torch.Tensor] = load_file(output / "weights/dense.safetensors")
    for tensor in parts.packing.dense:
        assert raw(packed[tensor.name]) == raw(evaluate(tensor, sources.__getitem__)), tensor.name
        assert packed[tensor.name].dtype == getattr(torch, tensor.dtype)
    for expert_source, layer in zip(parts.packing.experts, parts.model.experts, strict=True):
        data = (output / f"weights/experts-{layer.layer:05d}.bin").read_bytes()
        wanted = [expected_expert(reference, parts.model, expert_source, e) for e in range(layer.experts)]
        assert data == b"".join(wanted)
    assert source.overlaps() == 0
    return packed


@pytest.mark.parametrize("name", most_slow(TINY))
def test_compiled_models_pack_a_narrow_checkpoint(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "model", dtype=torch.bfloat16)
    packed = packs_as_recorded(tmp_path / "model", tmp_path / "out")
    stored = build(name, dtype=torch.bfloat16).state_dict()
    norms = {path: value for path, value in packed.items() if "norm" in path and value.ndim == 1}
    assert norms
    assert all(value.dtype == torch.float32 for value in norms.values())
    for path in norms.keys() & stored.keys():
        assert torch.equal(norms[path], stored[path].float()), path


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "gpt_oss"])
def test_only_matrices_of_a_wide_checkpoint_are_rounded(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "model", shard="100KB")
    packed = packs_as_recorded(tmp_path / "model", tmp_path / "out")
    norm, matrix = "model.norm.weight", "model.layers.0.self_attn.o_proj.weight"
    exact = build(name).state_dict()
    assert torch.equal(packed[norm], exact[norm])
    assert not torch.equal(packed[norm], exact[norm].bfloat16().float()), "its values need float32"
    assert torch.equal(packed[matrix], exact[matrix].bfloat16())

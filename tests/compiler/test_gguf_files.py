"""GGUF files as checkpoints: what is read off their metadata, and what is refused."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig

from moec.compiler.checkpoint import TensorEntry, open_checkpoint
from moec.compiler.checkpoint.gguf.architectures import ARCHITECTURES
from moec.compiler.checkpoint.gguf.header import read_header
from moec.compiler.checkpoint.gguf.names import renamed
from moec.compiler.tracing.model.build import build_config
from moec.errors import CheckpointError, MoecError, UnsupportedModelError
from tests.support.gguf_files import write_gguf
from tests.support.tiny_models import TINY, save

Q8_0 = GGMLQuantizationType.Q8_0

SAME = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "kv_lora_rank",
    "layer_types",
    "max_position_embeddings",
    "moe_intermediate_size",
    "n_group",
    "n_shared_experts",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "q_lora_rank",
    "rms_norm_eps",
    "rope_parameters",
    "routed_scaling_factor",
    "sliding_window",
    "tie_word_embeddings",
    "topk_group",
    "vocab_size",
)
"""Fields that decide what the model computes."""


def write(path: Path, architecture: str = "llama", **metadata: Any) -> Path:
    """A file with one tensor and this metadata."""
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_configs_are_those_of_the_checkpoints(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "model", dtype=torch.float32)
    written = write_gguf(tmp_path / "model", tmp_path / "gguf", Q8_0)
    found = build_config(open_checkpoint(written.file).config)
    expected = AutoConfig.from_pretrained(tmp_path / "model")
    assert type(found) is type(expected)
    for field in SAME:
        own, other = getattr(found, field, None), getattr(expected, field, None)
        if field in ("n_group", "topk_group"):
            own, other = own or 1, other or 1
        assert own == other, field


def test_parts_and_folders_are_one_model(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "model", dtype=torch.float32)
    whole = write_gguf(tmp_path / "model", tmp_path / "whole", Q8_0)
    write_gguf(tmp_path / "model", tmp_path / "parts", Q8_0, parts=3)
    folder = open_checkpoint(tmp_path / "parts")
    second = open_checkpoint(sorted((tmp_path / "parts").glob("*.gguf"))[1])
    one = open_checkpoint(whole.file)
    assert len(folder.shards) == 3
    assert folder.shards == second.shards
    assert folder.index == second.index
    assert second.name == one.name == "model"
    assert folder.config == one.config
    assert {name: (e.dtype, e.shape) for name, e in folder.index.items()} == {
        name: (e.dtype, e.shape) for name, e in one.index.items()
    }
    (tmp_path / "parts" / folder.shards[2]).unlink()
    with pytest.raises(CheckpointError, match="1 of 3 parts of model missing"):
        open_checkpoint(tmp_path / "parts")


def test_a_folder_with_two_models_needs_a_name(tmp_path: Path) -> None:
    write(tmp_path / "a-Q4_0.gguf")
    write(tmp_path / "a-Q8_0.gguf")
    with pytest.raises(CheckpointError, match="several GGUF models: a-Q4_0, a-Q8_0"):
        open_checkpoint(tmp_path)


def test_dtype_is_that_of_files_without_blocks(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "model", dtype=torch.float32)
    for kind, expected in (("F16", "float16"), ("BF16", "bfloat16"), ("Q4_0", "bfloat16")):
        written = write_gguf(tmp_path / "model", tmp_path / kind, GGMLQuantizationType[kind])
        assert open_checkpoint(written.file).config["dtype"] == expected


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda data: b"GGML" + data[4:], CheckpointError, "not a GGUF file"),
        (lambda data: data[:4] + b"\1\0\0\0" + data[8:], CheckpointError, "of version 1"),
        (lambda data: data[:4] + b"\0\0\0\3" + data[8:], CheckpointError, "big-endian"),
        (lambda data: data[:-40], CheckpointError, "damaged or cut off"),
        (lambda data: data[:50], CheckpointError, "damaged or cut off"),
        (lambda data: b"", CheckpointError, "not a GGUF file"),
        (lambda data: data.replace(b"llama", b"mamba"), UnsupportedModelError, "'mamba'.*deepseek2, gpt-oss"),
    ],
)
def test_unusable_files(change: Any, kind: type[MoecError], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(kind, match=f"(?s){message}"):
        open_checkpoint(path)


def test_dense_models_and_missing_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no routed experts"):
        open_checkpoint(write(tmp_path / "dense.gguf"))
    with pytest.raises(CheckpointError, match=r"does not say its llama\.embedding_length"):
        open_checkpoint(write(tmp_path / "bare.gguf", expert_count=4))


def test_types_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "gpt-oss")
    size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q8_K][1]
    writer.add_tensor("output.weight", np.zeros((2, size), np.uint8), raw_dtype=GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"1 tensors of type Q8_K: output\.weight"):
        open_checkpoint(path)


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "model", dtype=torch.float32)
    written = write_gguf(
        tmp_path / "model",
        tmp_path / "gguf",
        Q8_0,
        more=lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.zeros(4, np.float32)),
    )
    with pytest.raises(CheckpointError, match=r"unexpected in the GGUF file: blk\.0\.attn_q\.bias"):
        open_checkpoint(written.file)


def test_what_a_deepseek_file_leaves_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def many() -> Any:
        config = original()
        config.n_routed_experts, config.n_group, config.topk_group = 160, None, None
        config.topk_method, config.num_hidden_layers = "greedy", 2
        return config

    original = TINY["deepseek_v2_lite"]
    monkeypatch.setitem(TINY, "deepseek_v2_lite", many)
    save("deepseek_v2_lite", tmp_path / "model", dtype=torch.float32)
    written = write_gguf(tmp_path / "model", tmp_path / "gguf", Q8_0)
    assert "groups of experts" in open_checkpoint(written.file).notes[0]


def test_tokens_that_end_a_text(tmp_path: Path) -> None:
    tokens = ["a", "<|endoftext|>", "<|return|>", "<|end|>", "<|call|>"]

    def more(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([1, 3, 3, 3, 3])
        writer.add_eos_token_id(2)
        writer.add_bos_token_id(1)
        writer.add_float32("general.sampling.temp", 0.5)

    save("gpt_oss", tmp_path / "model", dtype=torch.float32)
    written = write_gguf(tmp_path / "model", tmp_path / "gguf", Q8_0, more=more)
    assert open_checkpoint(written.file).generation_config == {
        "eos_token_id": [1, 2, 4],
        "bos_token_id": 1,
        "temperature": 0.5,
        "do_sample": True,
    }


def test_metadata_and_places_are_those_that_the_package_reads(tmp_path: Path) -> None:
    """Every kind of value, strings and arrays of them included."""
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama")
    for number, kind in enumerate(("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")):
        getattr(writer, f"add_{kind}")(f"a.{kind}", number * (-1 if kind.startswith("int") else 1))
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve ▁")
    writer.add_array("a.strings", ["", "x", "你好"])
    writer.add_array("a.numbers", [1.5, -2.5])
    writer.add_custom_alignment(64)
    for number, kind in enumerate(("F32", "Q4_0", "Q6_K", "BF16")):
        used = GGMLQuantizationType[kind]
        data = np.zeros((number + 1, 2, 256), np.float32)
        rows = np.zeros((number + 1, 2, 210), np.uint8) if kind == "Q6_K" else gguf.quantize(data, used)
        writer.add_tensor(f"t.{kind}", rows, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, theirs = read_header(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert found.metadata[key] == field.contents(), key
    assert len(found.tensors) == len(theirs.tensors) == 4
    for tensor in theirs.tensors:
        entry = found.tensors[tensor.name]
        place = (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
        assert (entry.dtype, entry.begin, entry.size_bytes) == place
        assert entry.shape == tuple(int(size) for size in reversed(tensor.shape))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_headers_are_refused_or_read(seed: int, tmp_path: Path) -> None:
    """Random bytes changed: nothing but an error of ours, soon."""
    path = write(tmp_path / "x.gguf", block_count=3)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for place in rng.integers(8, 200, 3):
        data[place] = rng.integers(256)
    path.write_bytes(data)
    with suppress(CheckpointError):
        assert read_header(path).path == path


def test_gate_and_up_in_one_tensor_and_experts_in_one_each() -> None:
    """Newer files of some converters, and those from before April 2024."""
    fused = TensorEntry(Path("x"), "F32", (2, 6, 4), 1000, 1000 + 2 * 6 * 4 * 4)
    index = renamed({"blk.3.ffn_gate_up_exps.weight": fused}, ARCHITECTURES["qwen3moe"].places, {})
    prefix = "model.layers.3.mlp.experts"
    assert {name: (entry.shape, entry.begin, entry.end) for name, entry in index.items()} == {
        f"{prefix}.0.gate_proj.weight": ((3, 4), 1000, 1048),
        f"{prefix}.0.up_proj.weight": ((3, 4), 1048, 1096),
        f"{prefix}.1.gate_proj.weight": ((3, 4), 1096, 1144),
        f"{prefix}.1.up_proj.weight": ((3, 4), 1144, 1192),
    }
    one = TensorEntry(Path("x"), "F16", (6, 4), 0, 48)
    old = renamed({"blk.0.ffn_down.5.weight": one}, ARCHITECTURES["llama"].places, {})
    assert old == {"model.layers.0.block_sparse_moe.experts.5.w2.weight": one}

"""Opening checkpoints: folders in every layout, what is wrong with them, and hub ids without a network."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from moec.compiler.checkpoint import config_sha256, fetch_weights, open_checkpoint
from moec.compiler.checkpoint.safetensors_header import read_header
from moec.errors import CheckpointError, NetworkError

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {"model_type": "mixtral", "hidden_size": 64}
TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.ones(5, dtype=torch.bfloat16),
}


def write(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors or TENSORS, folder / "model.safetensors")
    return folder


def write_shards(folder: Path) -> Path:
    write(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, value) in enumerate(TENSORS.items()):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: value}, folder / weight_map[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def refused(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        fetch_weights(open_checkpoint(folder))
    assert caught.value.do
    return str(caught.value)


@pytest.mark.parametrize("layout", [write, write_shards])
def test_entries_point_at_the_bytes(layout: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(layout(tmp_path / "model"))
    assert set(checkpoint.index) == set(TENSORS)
    for name, entry in checkpoint.index.items():
        data = entry.file.read_bytes()[entry.begin : entry.end]
        assert data == TENSORS[name].view(torch.uint8).numpy().tobytes()
        assert entry.shape == tuple(TENSORS[name].shape)
    assert checkpoint.index["b"].dtype == "BF16"
    assert fetch_weights(checkpoint) is checkpoint


def test_side_files(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "merges.txt", "README.md"):
        (folder / name).write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    checkpoint = open_checkpoint(str(folder))
    assert [f.name for f in checkpoint.tokenizer_files] == [
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [f.name for f in checkpoint.license_files] == ["LICENSE"]
    assert checkpoint.generation_config == {"temperature": 0.5}
    assert checkpoint.config == CONFIG


def test_fingerprint_ignores_who_saved_it() -> None:
    saved = CONFIG | {
        "transformers_version": "1",
        "dtype": "float32",
        "_name_or_path": "x",
        "torch_dtype": "f",
    }
    assert config_sha256(saved) == config_sha256(CONFIG)
    assert config_sha256(dict(reversed(CONFIG.items()))) == config_sha256(CONFIG)
    assert config_sha256(CONFIG | {"hidden_size": 65}) != config_sha256(CONFIG)


def test_no_such_path(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "none", "a/b/c", "a b/c", tmp_path / "x"):
        text = refused(name)
        assert f"No such path: {name}." in text


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    write(tmp_path)
    assert f"Did you mean its folder, {tmp_path}?" in refused(tmp_path / "model.safetensors")


def test_no_config(tmp_path: Path) -> None:
    assert "No config.json" in refused(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_broken_config(text: str, tmp_path: Path) -> None:
    (write(tmp_path) / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refused(tmp_path)


def test_config_alone_is_enough_to_open(tmp_path: Path) -> None:
    (write(tmp_path) / "model.safetensors").unlink()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.index == {}
    assert "No weights in" in refused(tmp_path)


def test_index_alone_is_enough_to_open(tmp_path: Path) -> None:
    for shard in write_shards(tmp_path).glob("*.safetensors"):
        shard.unlink()
    assert open_checkpoint(tmp_path).shards == ("model-0.safetensors", "model-1.safetensors")
    assert "2 weight files missing" in refused(tmp_path)


def test_weights_of_another_format_alone(tmp_path: Path) -> None:
    (write(tmp_path) / "model.safetensors").rename(tmp_path / "model.h5")
    text = refused(tmp_path)
    assert "model.h5" in text
    assert "save_pretrained" in text


def test_missing_shard(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 weight file missing in .*: model-1\.safetensors"):
        open_checkpoint(tmp_path)


def test_index_that_names_a_tensor_the_shard_lacks(tmp_path: Path) -> None:
    file = write_shards(tmp_path) / "model.safetensors.index.json"
    weight_map = json.loads(file.read_text())["weight_map"]
    file.write_text(json.dumps({"weight_map": weight_map | {"c": "model-0.safetensors"}}))
    assert "Tensor c is not in" in refused(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": "../x.safetensors"}, {"a": 3}, {"a": "x.bin"}])
def test_broken_index(weight_map: Any, tmp_path: Path) -> None:
    (write_shards(tmp_path) / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    assert "no usable weight_map" in refused(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 8, 50, -1])
def test_truncated_file(size: int, tmp_path: Path) -> None:
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    text = refused(tmp_path)
    assert str(file) in text
    assert "truncated" in text


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        (b"not json", b"", "not valid JSON"),
        (b"[]", b"", "not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (json.dumps({"a": 1}).encode(), b"", "not dtype, shape"),
        (json.dumps(entry(extra=1)).encode(), bytes(8), "not dtype, shape"),
        (json.dumps(entry(dtype="F5")).encode(), bytes(8), "'F5'"),
        (json.dumps(entry(shape=[-2])).encode(), bytes(8), "no valid shape"),
        (json.dumps(entry(shape=[True, 2])).encode(), bytes(8), "no valid shape"),
        (json.dumps(entry(shape=[3])).encode(), bytes(8), "does not take 8 bytes"),
        (json.dumps(entry(data_offsets=[8, 0])).encode(), bytes(8), "does not take -8 bytes"),
        (json.dumps(entry(data_offsets=[4, 12])).encode(), bytes(12), "does not begin where"),
        (json.dumps(entry() | {"b": entry()["a"]}).encode(), bytes(8), "does not begin where"),
        (json.dumps(entry()).encode(), bytes(9), "1 bytes after its last tensor"),
        (json.dumps(entry()).encode(), bytes(7), "truncated"),
    ],
)
def test_bad_header(header: bytes, data: bytes, why: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert why in str(caught.value)


def test_header_of_absurd_length(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="more than the format's"):
        read_header(file)


def test_empty_header_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 2) + b"{}")
    assert read_header(file) == {}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def cached(cache: Path) -> Path:
    """The snapshot folder of ``owner/name`` in ``cache``."""
    repo = cache / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    return repo / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("offline", [True, False])
def test_hub_out_of_reach(offline: bool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(NetworkError) as caught:
        open_checkpoint("owner/name")
    assert "Cannot get owner/name from the hub" in caught.value.what
    assert caught.value.why
    assert "HF_HUB_OFFLINE" in caught.value.do
    assert caught.value.exit_code == 11


@pytest.mark.parametrize("offline", [True, False])
def test_cached_snapshot_needs_no_hub(offline: bool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    write_shards(cached(cache))
    checkpoint = open_checkpoint("owner/name")
    assert checkpoint.hub
    assert checkpoint.source == "owner/name"
    assert set(fetch_weights(checkpoint).index) == set(TENSORS)


def test_hub_metadata_comes_without_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = write_shards(cached(cache))
    (snapshot / "model-1.safetensors").unlink()
    checkpoint = open_checkpoint("owner/name")
    assert checkpoint.index == {}
    assert checkpoint.shards == ("model-0.safetensors", "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"missing in .*model-1\.safetensors"):
        fetch_weights(checkpoint)


def test_folder_wins_over_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert not open_checkpoint("owner/name").hub

"""Hub ids against a hub on this machine: what is fetched when, and what the hub refuses."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from moec.compiler.checkpoint import fetch_weights, open_checkpoint, with_table
from moec.errors import CheckpointError, NetworkError, UnsupportedModelError
from tests.support.compiling import compile_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMIT = "c" * 40
TENSOR = {"a": torch.arange(4.0)}


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder as the model ``owner/name``; ``owner/gated`` is gated."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fetched: set[str] = set()
        self.sent_bytes = 0


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        file = self.server.folder / path.rpartition("/")[2]
        if path.startswith("/api/models/owner/name") and path.endswith(("name", "main")):
            names = [{"rfilename": one.name} for one in sorted(self.server.folder.iterdir())]
            listing = {"id": "owner/name", "sha": COMMIT, "siblings": names, "tags": [], "downloads": 0}
            self.reply(200, json.dumps(listing | {"private": False}).encode(), {}, body=body)
        elif path == f"/api/models/owner/name/tree/{COMMIT}":
            files = [
                {"type": "file", "path": one.name, "size": one.stat().st_size, "oid": one.name}
                for one in sorted(self.server.folder.iterdir())
            ]
            self.reply(200, json.dumps(files).encode(), {}, body=body)
        elif re.match(f"/owner/name/resolve/(main|{COMMIT})/", path) and file.is_file():
            if body:
                self.server.fetched.add(file.name)
            headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            data = file.read_bytes()
            if ranged := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                data = data[int(ranged[1]) : int(ranged[2]) + 1]
            self.reply(206 if ranged else 200, data, headers, body=body)
        elif "owner/gated" in path:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"}, body=body)
        elif "revision/other" in path:
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.server.sent_bytes += len(data)
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    for name in ("tokenizer.json", "LICENSE", "README.md", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    save_file(TENSOR, folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
        server.shutdown()


@pytest.mark.parametrize("single", [False, True])
def test_weights_come_last(single: bool, hub: Hub) -> None:
    if single:
        (hub.folder / "model.safetensors.index.json").unlink()
        (hub.folder / "model-1.safetensors").rename(hub.folder / "model.safetensors")
    checkpoint = open_checkpoint("owner/name")
    assert {"config.json", "tokenizer.json", "LICENSE"} <= hub.fetched
    assert not any(name.endswith((".safetensors", ".bin")) for name in hub.fetched)
    assert [file.name for file in checkpoint.tokenizer_files] == ["tokenizer.json"]
    assert checkpoint.index == {}
    entry = fetch_weights(checkpoint).index["a"]
    assert entry.file.read_bytes()[entry.begin : entry.end] == TENSOR["a"].numpy().tobytes()


def test_a_model_that_does_not_compile_is_refused_before_its_weights_are_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    (hub.folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 1, "vocab_size": 8}))
    with pytest.raises(UnsupportedModelError, match="not a Mixture-of-Experts"):
        compile_checkpoint("owner/name", tmp_path / "out.moec")
    assert "config.json" in hub.fetched
    assert not any(name.endswith(".safetensors") for name in hub.fetched)
    assert not (tmp_path / "out.moec").exists()


def test_what_is_quantized_in_a_way_that_is_not_read_is_refused_before_that(hub: Hub, tmp_path: Path) -> None:
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (hub.folder / "config.json").write_text(
        json.dumps({"model_type": "mixtral", "quantization_config": quantization})
    )
    with pytest.raises(UnsupportedModelError, match="NF4") as caught:
        compile_checkpoint("owner/name", tmp_path / "out.moec")
    assert "--quantization" in caught.value.do
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_tensors_are_listed_without_their_values(hub: Hub, tmp_path: Path) -> None:
    """A range of each file: the header, and no more than a header may take."""
    save_file({"b": torch.zeros(1 << 20, dtype=torch.float8_e4m3fn)}, hub.folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    listed = with_table(open_checkpoint("owner/name"))
    found = {name: (entry.dtype, entry.shape) for name, entry in listed.index.items()}
    assert found == {"a": ("F32", (4,)), "b": ("F8_E4M3", (1 << 20,))}
    assert hub.sent_bytes < 1 << 20


def test_tensors_of_torch_save_are_not_listed(hub: Hub) -> None:
    for name in ("model.safetensors.index.json", "model-1.safetensors"):
        (hub.folder / name).unlink()
    with pytest.raises(CheckpointError, match="no tensors that can be listed"):
        with_table(open_checkpoint("owner/name"))


def test_no_weights(hub: Hub) -> None:
    for name in ("model.safetensors.index.json", "model-1.safetensors", "pytorch_model.bin"):
        (hub.folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"No model|No weights"):
        fetch_weights(open_checkpoint("owner/name"))


@pytest.mark.parametrize("single", [False, True])
def test_pytorch_weights_alone(single: bool, hub: Hub) -> None:
    (hub.folder / "model.safetensors.index.json").unlink()
    (hub.folder / "model-1.safetensors").unlink()
    torch.save(TENSOR, hub.folder / "pytorch_model.bin")
    if not single:
        (hub.folder / "pytorch_model.bin").rename(hub.folder / "part.bin")
        index = {"weight_map": {"a": "part.bin"}}
        (hub.folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint("owner/name")
    assert not any(name.endswith(".bin") for name in hub.fetched)
    entry = fetch_weights(checkpoint).index["a"]
    assert entry.file.read_bytes()[entry.begin : entry.end] == TENSOR["a"].numpy().tobytes()


@pytest.mark.parametrize(("name", "what"), [("owner/none", "no model"), ("owner/gated", "does not give")])
def test_hub_refuses(name: str, what: str, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=f"No such path: {name}.*{what}") as caught:
        open_checkpoint(name)
    assert "hf auth login" in caught.value.do


def test_no_such_revision(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="no model owner/name at revision other"):
        open_checkpoint("owner/name", revision="other")


def test_what_is_cached_is_enough_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone downloaded the config and the weights, but no licence and no tokenizer."""
    from huggingface_hub import snapshot_download

    snapshot_download(
        "owner/name", allow_patterns=["*.json", "*.safetensors"], ignore_patterns=["tokenizer*"]
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    checkpoint = fetch_weights(open_checkpoint("owner/name"))
    assert set(checkpoint.index) == {"a"}
    assert checkpoint.tokenizer_files == ()


def test_weights_that_are_not_cached_need_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint("owner/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    checkpoint = open_checkpoint("owner/name")
    with pytest.raises(NetworkError, match="Cannot get owner/name"):
        fetch_weights(checkpoint)

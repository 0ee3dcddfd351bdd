"""A GGUF model as a checkpoint of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.artifacts.fingerprint import config_sha256
from moec.compiler.checkpoint.folder import LICENSE_PATTERNS, matching
from moec.compiler.checkpoint.gguf.architectures import ARCHITECTURES
from moec.compiler.checkpoint.gguf.blocks import check_types
from moec.compiler.checkpoint.gguf.files import SUFFIX, model_files
from moec.compiler.checkpoint.gguf.generation import generation_config
from moec.compiler.checkpoint.gguf.header import read_header
from moec.compiler.checkpoint.gguf.metadata import Metadata
from moec.compiler.checkpoint.gguf.names import renamed
from moec.compiler.checkpoint.gguf.tokenizer import tokenizer_files
from moec.compiler.checkpoint.record import STORED_BYTES, Checkpoint
from moec.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from moec.compiler.checkpoint.gguf.header import Header
    from moec.compiler.checkpoint.record import TensorEntry

METHOD = "gguf"
"""What the config says that such a checkpoint is quantized with."""


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is a file that is called like one."""
    return path.is_file() and path.suffix == SUFFIX


def is_of_gguf(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's config was made here."""
    return (config.get("quantization_config") or {}).get("quant_method") == METHOD


def holds_gguf(folder: Path) -> bool:
    """Whether a folder has such files."""
    return any(folder.glob(f"*{SUFFIX}"))


def read_gguf(path: Path, *, source: str) -> Checkpoint:
    """Read the model in a GGUF file, or in its parts: metadata and headers, no weight.

    Args:
        path: a file, one of several parts, or a folder with one model.
        source: what the user named.

    Raises:
        CheckpointError: a file is missing or damaged, or lacks what its architecture needs.
        UnsupportedModelError: the architecture, or a tensor's type, is not read.
        MissingDependencyError: the gguf package is not installed.
    """
    files = model_files(path)
    headers = [read_header(file) for file in files]
    metadata = Metadata(files[0], headers[0].metadata)
    architecture = ARCHITECTURES.get(metadata.architecture)
    if architecture is None:
        raise UnsupportedModelError(
            f"{files[0]} has the architecture {metadata.architecture!r}, which moec does not read from GGUF.",
            f"It reads {', '.join(ARCHITECTURES)}.",
            "Use the checkpoint in transformers' layout; `moec models` lists what compiles from that.",
        )
    tensors = _joined(headers)
    check_types(files[0], tensors)
    generation = generation_config(metadata)
    config = {
        **architecture.config(metadata, tensors),
        **_common(files[0], tensors),
        **{key: value for key, value in generation.items() if key.endswith("_token_id")},
    }
    folder = files[0].parent
    return Checkpoint(
        source=source,
        revision=None,
        path=folder,
        config=config,
        config_sha256=config_sha256(config),
        generation_config=generation,
        shards=tuple(file.name for file in files),
        index=renamed(tensors, architecture.places, config),
        tokenizer_files=(),
        license_files=matching(folder, LICENSE_PATTERNS),
        hub=False,
        make_tokenizer=lambda: tokenizer_files(metadata),
        notes=architecture.notes(metadata),
    )


def _joined(headers: list[Header]) -> dict[str, TensorEntry]:
    tensors = {name: entry for header in headers for name, entry in header.tensors.items()}
    counted = headers[0].metadata.get("split.tensors.count", len(tensors))
    if counted != len(tensors) or len(tensors) != sum(len(header.tensors) for header in headers):
        raise CheckpointError(
            f"The parts of {headers[0].path} do not belong together.",
            f"They have {len(tensors)} tensors, the first part says {counted}.",
            "Download or copy all of them again.",
        )
    return tensors


def _common(file: Path, tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(
            f"{file} has no token_embd.weight.", "Every language model has it.", "Use another file."
        )
    types = {entry.dtype for entry in tensors.values()}
    quantized = types - STORED_BYTES.keys()
    return {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float16" if "F16" in types and not quantized and "BF16" not in types else "bfloat16",
        "quantization_config": {"quant_method": METHOD},
    }

"""A checkpoint as records: its config, its side files, and where each tensor's bytes lie. No weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

STORED_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Element types of safetensors that moec reads, and their sizes in bytes."""

_GGUF_ENDING = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a weight file, row by row."""

    file: Path
    dtype: str
    """As safetensors spells it, a key of ``STORED_BYTES``; or a block type of GGML, such as ``Q4_0``."""
    shape: tuple[int, ...]
    begin: int
    """Byte offset in the file, its header included."""
    end: int
    paired_rows: int = 0
    """Rows of a head, where row 2i of a head stands for its row i, and row 2i + 1 for row i of its second half: the
    order for rotary embeddings that GGUF's ``llama`` has. 0: rows are in order."""

    @property
    def size_bytes(self) -> int:
        """Of its values."""
        return self.end - self.begin

    def item(self, number: int) -> TensorEntry:
        """Slice ``number`` along the first dimension."""
        return replace(self.part(number, self.shape[0]), shape=self.shape[1:])

    def part(self, number: int, count: int) -> TensorEntry:
        """Part ``number`` of ``count`` equal ones along the first dimension."""
        size = self.size_bytes // count
        begin = self.begin + number * size
        return replace(self, shape=(self.shape[0] // count, *self.shape[1:]), begin=begin, end=begin + size)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, as transformers would have it."""

    source: str
    """What the user named: a folder, a file or a hub id."""
    revision: str | None
    path: Path
    config: dict[str, Any]
    """``config.json`` as it stands."""
    config_sha256: str
    generation_config: dict[str, Any] | None
    shards: tuple[str, ...]
    """File names of the weights, present or not; empty where the checkpoint has none."""
    index: dict[str, TensorEntry]
    """Empty until the weights are on this machine (``fetch_weights``)."""
    tokenizer_files: tuple[Path, ...]
    license_files: tuple[Path, ...]
    hub: bool
    """``source`` is a hub id, ``path`` its snapshot in the cache of huggingface_hub."""
    make_tokenizer: Callable[[], Mapping[str, bytes]] | None = None
    """Makes the tokenizer's files, by name, where the checkpoint has their content in another form; raises
    ``UnsupportedModelError`` where that cannot be done."""
    made_files: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the tokenizer that were made."""
    notes: tuple[str, ...] = ()
    """What a person should know of it."""

    @property
    def name(self) -> str:
        """What bundles call it: the hub id, or the folder's or the file's own name."""
        return self.source if self.hub else _GGUF_ENDING.sub("", Path(self.source).resolve().name)

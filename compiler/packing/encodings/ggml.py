"""GGML's blocks, as GGUF files have them: scales and codes of a few values of a row in one run of bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moec.compiler.checkpoint.gguf.blocks import block_codes, dequantize_blocks
from moec.compiler.checkpoint.gguf.codes import CARRIED, STAND_IN
from moec.compiler.checkpoint.record import STORED_BYTES
from moec.compiler.packing.encodings.record import Encoded
from moec.errors import CheckpointError
from moec.formats import pack_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moec.compiler.checkpoint.record import TensorEntry
    from moec.compiler.packing.encodings.record import Parts
    from moec.formats import Format


@dataclass(frozen=True)
class GgmlBlocks:
    """A matrix in one of GGML's block types."""

    kind: str
    """The type, such as ``Q4_0``."""
    bytes: TensorEntry
    """U8 ``[..., N, bytes of a row]``."""

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """All that is read."""
        return (self.bytes,)

    @property
    def format(self) -> str | None:
        """The format that says the same, or nearly (see `CARRIED`)."""
        return CARRIED[self.kind].format if self.kind in CARRIED else None

    @property
    def obstacle(self) -> str:
        """Why there is none."""
        return (
            "" if self.format else f"they have blocks of the type {self.kind}, for which there is no format"
        )

    @property
    def row_step(self) -> int:
        """Rows of a head where they are paired."""
        return max(self.bytes.paired_rows, 1)

    def item(self, number: int) -> GgmlBlocks:
        """One of a batch."""
        return replace(self, bytes=self.bytes.item(number))

    def values(self, begin: int, end: int, parts: Parts) -> torch.Tensor:
        """Float32 ``[n, K]``, as the gguf package has it."""
        return torch.from_numpy(dequantize_blocks(self.kind, parts.rows(self.bytes, begin, end).numpy()))

    def packed(self, kind: Format, begin: int, end: int, parts: Parts) -> torch.Tensor:
        """Rows of codes.

        Raises:
            CheckpointError: a scale is beyond what float16 has.
        """
        codes = block_codes(self.kind, parts.rows(self.bytes, begin, end).numpy())
        if codes.minima is not None and not (np.isfinite(codes.scales) & np.isfinite(codes.minima)).all():
            raise CheckpointError(
                f"A tensor of {self.bytes.file} has scales that are no numbers of 16 bits.",
                f"As {self.kind} it has larger ones.",
                "Pack with --quantization none or int8, or use another file.",
            )
        return torch.from_numpy(pack_rows(kind, codes))


def ggml_weights(index: Mapping[str, TensorEntry], _: Mapping[str, Any]) -> dict[str, Encoded]:
    """All tensors in blocks."""
    return {
        name: Encoded(_blocks(entry), entry.shape, (name,), stand_in=STAND_IN)
        for name, entry in index.items()
        if entry.dtype not in STORED_BYTES
    }


def _blocks(entry: TensorEntry) -> GgmlBlocks:
    *batch, rows, _ = entry.shape
    width = entry.size_bytes // max(rows, 1)
    for size in batch:
        width //= size
    return GgmlBlocks(entry.dtype, replace(entry, dtype="U8", shape=(*batch, rows, width)))

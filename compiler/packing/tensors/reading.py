"""Rows of the checkpoint's tensors, read with pread into one reused buffer.

Nothing is memory-mapped: mapped file pages count as resident memory, and they would follow the model's size.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch

from moec.compiler.checkpoint.record import STORED_BYTES, TensorEntry
from moec.errors import CheckpointError
from moec.formats import Format

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from moec.compiler.packing.tensors.stored import Stored

PIECE_BYTES = 8 << 20
"""Most bytes read at once where a tensor is streamed, unless one row (or one row of blocks) is larger."""
QUANTIZED_PIECE_BYTES = 2 << 20
"""The same where values are quantized: they are widened, and more threads are at work."""

TORCH_TYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


Reading: TypeAlias = "torch.dtype | Format"
"""What rows are read as: values of a type, or, of a tensor that is stored in this format, packed rows of its codes."""


class ByteSource(Protocol):
    """Where bytes come from; the tests put a counting one here."""

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` of the file."""


class FileSource:
    """Reads files with ``preadv``."""

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` of ``path``.

        Raises:
            CheckpointError: the file cannot be read or ends early.
        """
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                done = 0
                while done < len(buffer):
                    count = os.preadv(file, [buffer[done:]], offset + done)
                    if count == 0:
                        raise CheckpointError(
                            f"{path} ends at byte {offset + done}.",
                            "It became shorter while it was read.",
                            "Let whatever writes it finish, then run again.",
                        )
                    done += count
            finally:
                os.close(file)
        except OSError as error:
            raise CheckpointError(
                f"Cannot read {path}.", str(error), "Check the disk, then run again: pack resumes."
            ) from error


class TensorReader:
    """Reads tensors for one thread; a piece is valid until the next one is read."""

    def __init__(self, source: ByteSource, *, quantizing: bool = False) -> None:
        self._source = source
        self._piece_bytes = min(PIECE_BYTES, QUANTIZED_PIECE_BYTES) if quantizing else PIECE_BYTES
        self._buffer = np.empty(0, np.uint8)

    def pieces(self, stored: Stored, begin: int, end: int, as_: Reading) -> Iterator[torch.Tensor]:
        """Rows ``begin .. end`` of ``stored``, a few at a time, each ``[n, columns]``, or packed ``[n, row_bytes]``."""
        step, block = _piece_rows(stored, self._piece_bytes), _row_step(stored)
        parts = _FileParts(self._source)
        while begin < end:
            stop = min(end, (begin + step) // block * block)
            yield self._rows(stored, begin, stop, as_, parts, reuse=True)
            begin = stop

    def whole(self, stored: Stored, as_: Reading) -> torch.Tensor:
        """All of ``stored``, in memory of its own."""
        if stored.encoding is not None and len(stored.shape) > 2:
            return torch.stack([self.whole(stored.item(number), as_) for number in range(stored.shape[0])])
        rows = self._rows(stored, 0, stored.rows, as_, _FileParts(self._source), reuse=False)
        return rows if isinstance(as_, Format) else rows.reshape(stored.shape)

    def _rows(
        self, stored: Stored, begin: int, end: int, as_: Reading, parts: _FileParts, *, reuse: bool
    ) -> torch.Tensor:
        if stored.encoding is not None:
            if isinstance(as_, Format):
                return stored.encoding.packed(as_, begin, end, parts)
            return stored.encoding.values(begin, end, parts).to(as_)
        assert not isinstance(as_, Format), "plain values are quantized, not carried over"
        entry = stored.entry
        size = entry.size_bytes // max(stored.rows, 1)
        raw = self._bytes(entry, begin * size, end * size, reuse=reuse)
        if entry.paired_rows:
            raw = _halves_in_order(raw.view(-1, size), entry.paired_rows)
        return raw.view(TORCH_TYPES[entry.dtype]).view(end - begin, stored.columns).to(as_)

    def _bytes(self, entry: TensorEntry, begin: int, end: int, *, reuse: bool) -> torch.Tensor:
        size = end - begin
        if not reuse:
            buffer = np.empty(size, np.uint8)
        else:
            if len(self._buffer) < size:
                self._buffer = np.empty(size, np.uint8)
            buffer = self._buffer[:size]
        self._source.read_into(entry.file, entry.begin + begin, buffer.data)
        return torch.from_numpy(buffer)


class _FileParts:
    """The parts of one quantized weight (`encodings.Parts`)."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._whole: dict[TensorEntry, torch.Tensor] = {}

    def rows(self, entry: TensorEntry, begin: int, end: int) -> torch.Tensor:
        """Rows ``begin .. end`` along the first dimension, in memory of their own."""
        size = entry.size_bytes // max(entry.shape[0], 1)
        buffer = np.empty((end - begin) * size, np.uint8)
        self._source.read_into(entry.file, entry.begin + begin * size, buffer.data)
        raw = torch.from_numpy(buffer)
        if entry.paired_rows:
            raw = _halves_in_order(raw.view(-1, size), entry.paired_rows)
        shape = (end - begin, *entry.shape[1:])
        return raw.view(TORCH_TYPES[entry.dtype]).view(shape)

    def whole(self, entry: TensorEntry) -> torch.Tensor:
        """All of it, read once and kept."""
        if entry not in self._whole:
            self._whole[entry] = self.rows(entry, 0, entry.shape[0])
        return self._whole[entry]


def _piece_rows(stored: Stored, piece_bytes: int) -> int:
    """Rows of a piece, a multiple of the rows that share a scale."""
    width = max(stored.columns * (4 if stored.encoding else STORED_BYTES[stored.entry.dtype]), 1)
    block = _row_step(stored)
    return max(piece_bytes // width // block, 1) * block


def _row_step(stored: Stored) -> int:
    return stored.encoding.row_step if stored.encoding else max(stored.entry.paired_rows, 1)


def _halves_in_order(rows: torch.Tensor, head: int) -> torch.Tensor:
    """Bytes of rows ``[n, size]`` of whole heads, which have the rows of their two halves in turn, half after half."""
    return rows.view(-1, head // 2, 2, rows.shape[-1]).transpose(1, 2).reshape(-1)

"""Rows of the checkpoint's tensors, read with pread into one reused buffer.

Nothing is memory-mapped: mapped file pages count as resident memory, and they would follow the model's size.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch

from moec.compiler.checkpoint.gguf.blocks import block_codes, dequantize_blocks
from moec.compiler.checkpoint.record import STORED_BYTES, TensorEntry
from moec.compiler.packing.carrying import carry_fp8, carry_mxfp4, halves_in_order
from moec.compiler.packing.dequantize import scale_blocks, unpack_mxfp4
from moec.errors import CheckpointError
from moec.formats import Format, pack_rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from moec.compiler.packing.stored import Stored

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
        step = _piece_rows(stored, self._piece_bytes)
        while begin < end:
            stop = min(end, (begin + step) // stored.block[0] * stored.block[0])
            yield self._rows(stored, begin, stop, as_, reuse=True)
            begin = stop

    def whole(self, stored: Stored, as_: Reading) -> torch.Tensor:
        """All of ``stored``, in memory of its own."""
        if stored.encoding != "plain" and len(stored.shape) > 2:
            return torch.stack([self.whole(stored.item(number), as_) for number in range(stored.shape[0])])
        rows = self._rows(stored, 0, stored.rows, as_, reuse=False)
        return rows if isinstance(as_, Format) else rows.reshape(stored.shape)

    def _rows(self, stored: Stored, begin: int, end: int, as_: Reading, *, reuse: bool) -> torch.Tensor:
        size = (stored.entry.end - stored.entry.begin) // max(stored.rows, 1)
        raw = self._bytes(stored.entry, begin * size, end * size, reuse=reuse)
        if stored.entry.paired_rows:
            raw = halves_in_order(raw.view(end - begin, size), stored.entry.paired_rows)
        if stored.encoding == "plain":
            assert not isinstance(as_, Format), "plain values are quantized, not carried over"
            return raw.view(TORCH_TYPES[stored.entry.dtype]).view(end - begin, stored.columns).to(as_)
        if stored.encoding == "ggml":
            return _from_blocks(stored.entry.dtype, raw.view(end - begin, size), as_)
        assert stored.scale is not None
        first, last = begin // stored.block[0], -(-end // stored.block[0])
        scale_row = (stored.scale.end - stored.scale.begin) // stored.scale.shape[0]
        scales = self._bytes(stored.scale, first * scale_row, last * scale_row, reuse=False)
        if stored.encoding == "mxfp4":
            blocks = raw.view(end - begin, -1, 16)
            scales = scales.view(end - begin, -1)
            if isinstance(as_, Format):
                return carry_mxfp4(as_, blocks, scales)
            return unpack_mxfp4(blocks, scales).to(as_)
        grid = scales.view(TORCH_TYPES[stored.scale.dtype]).float().view(last - first, -1)
        if isinstance(as_, Format):
            return carry_fp8(as_, raw.view(end - begin, stored.columns), grid, stored.block, begin)
        weight = raw.view(torch.float8_e4m3fn).view(end - begin, stored.columns).float()
        scale_blocks(weight, grid, stored.block, begin)
        return weight.to(as_)

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


def _from_blocks(kind: str, rows: torch.Tensor, as_: Reading) -> torch.Tensor:
    """Rows of GGML's blocks ``[n, bytes]`` as values, or as packed rows of a format that says the same."""
    if isinstance(as_, Format):
        return torch.from_numpy(pack_rows(as_, block_codes(kind, rows.numpy())))
    return torch.from_numpy(dequantize_blocks(kind, rows.numpy())).to(as_)


def _piece_rows(stored: Stored, piece_bytes: int) -> int:
    """Rows of a piece, a multiple of the rows that share a scale."""
    width = max(stored.columns * (4 if stored.encoding != "plain" else STORED_BYTES[stored.entry.dtype]), 1)
    block = stored.block[0]
    return max(piece_bytes // width // block, 1) * block

"""Matrices of weights, plain or quantized, as the products see them: rows are opened and meet tiles of columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.dot import Columns, Rows, dot
from moec.compiler.kernels.cpu.packed import Packed, PackedBytes, RowPlace
from moec.compiler.kernels.cpu.packed_codes import SCALE_STORAGE
from moec.compiler.kernels.cpu.short_dot import ShortDots
from moec.compiler.kernels.emit import STORAGE, Argument, Buffer, Expr, at_address, i64, keep, scratch
from moec.formats import format_of
from moec.formats import row_bytes as packed_bytes

if TYPE_CHECKING:
    from moec.compiler.kernels.cpu.machine import Machine
    from moec.compiler.kernels.cpu.rounding import Rounded

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1}

STREAM_ROWS = 2
"""That are read at a time for few columns: where arithmetic is the limit the columns are loaded once, and else two are
read faster than one."""
PLAIN_LINES, PACKED_LINES = (384, 256, 128), (192, 128, 64)
"""How far ahead of rows memory is asked for, in cache lines: for each line three times, since some are dropped.

One core of Zen 4 reads bfloat16 at 22 GB/s where it asks once, at 28 where thrice.
"""
FEW = 2
"""Columns up to which plain rows want that: with more the requests themselves take time."""

Dots = Callable[[Columns], list[list[Expr]]]
"""Emits ``sum_k rows[r, k] * columns[c, k]`` of open rows; gives the scalars as ``[r][c]``."""
View = Callable[[str], Buffer]
"""Gives a flat buffer over the matrices' memory, of elements of a type."""


class Weights(Protocol):
    """Matrices with rows of one length in one piece of memory."""

    def open(self, places: Sequence[RowPlace], often: bool) -> Dots:
        """Make rows ready for tiles of columns: ``often`` where there are many."""


@dataclass(frozen=True)
class PlainWeights:
    """Elements of a plain type.

    Rows that are read once are asked for so many cache lines before (``ahead``).
    """

    buffer: Buffer
    dtype: str
    depth: int
    machine: Machine
    ahead: Sequence[int] | None

    def open(self, places: Sequence[RowPlace], often: bool) -> Dots:
        """See ``Weights``."""
        size = ELEMENT_BYTES[self.dtype]
        offsets = [keep(place.element(self.depth * size, size=size)) for place in places]
        rows = Rows(self.buffer, self.dtype, offsets)

        def ahead(columns: int) -> Sequence[int]:
            if often:
                return ()
            lines = PLAIN_LINES if self.ahead is None else self.ahead
            return lines if columns <= FEW else lines[len(lines) // 2 :][:1]

        return lambda columns: dot(rows, columns, self.depth, self.machine, ahead=ahead(len(columns.offsets)))


class QuantizedWeights:
    """Rows of a format: read as they are for few columns, as float32 copies in the workspace for many.

    Few columns are multiplied as they were rounded, where they were.
    """

    def __init__(
        self, packed: Packed, ahead: Sequence[int] | None, block_rows: int, shorts: ShortDots | None
    ) -> None:
        self.packed, self.shorts = packed, shorts
        self.ahead = PACKED_LINES if ahead is None else ahead
        self.stride = packed.layout.padded
        self._copies = scratch(block_rows * self.stride) if block_rows else None

    def open(self, places: Sequence[RowPlace], often: bool) -> Dots:
        """See ``Weights``."""
        shorts = self.shorts
        if shorts is not None and not often:
            return lambda columns: shorts.dot(places, columns, ahead=self.ahead)
        rows = self.packed.open(places, ahead=() if often else self.ahead)
        if not often:
            return lambda columns: self.packed.dot(rows, columns, ahead=self.ahead)
        packed, copies = self.packed, self._copies
        packed.unpack(rows, copies, self.stride)
        block = Rows(copies, "float32", [i64(number * self.stride) for number in range(len(places))])
        return lambda columns: dot(block, columns, packed.depth, packed.machine, ahead=())


def weights(
    view: View,
    name: str,
    depth: int,
    machine: Machine,
    *,
    stream_rows: int,
    block_rows: int,
    ahead: Sequence[int] | None = None,
    rounded: Rounded | None = None,
) -> Weights:
    """Matrices in one piece of memory.

    Args:
        view: of the memory.
        name: of the format, or of a plain type.
        depth: columns of a row.
        machine: the processor.
        stream_rows: that are open at a time for few columns. Quantized rows take room until the end of the scope.
        block_rows: that are open at a time for many columns.
        ahead: cache lines before a row that memory is asked for it, each time, where it is read once; the kernels' own
            choice if None.
        rounded: the vectors, for few columns, where they were rounded for this format.
    """
    kind = format_of(name)
    if kind is None:
        return PlainWeights(view(name), name, depth, machine, ahead)
    memory = PackedBytes(view("uint8"), view(SCALE_STORAGE[kind.scale]))
    shorts = None if rounded is None else ShortDots(kind, depth, memory, machine, rounded, stream_rows)
    packed = Packed(kind, depth, memory, machine, max(block_rows, 0 if shorts else stream_rows))
    return QuantizedWeights(packed, ahead, block_rows, shorts)


def memory_at(address: Expr, size_bytes: int) -> View:
    """Memory at a machine address (int64)."""
    return lambda dtype: at_address(address, size_bytes // ELEMENT_BYTES[dtype], dtype)


def memory_of(buffer: Buffer, size_bytes: int) -> View:
    """The memory of a flat buffer."""

    def view(dtype: str) -> Buffer:
        storage = STORAGE.get(dtype, dtype)
        if storage == str(buffer.dtype):
            return buffer
        return T.decl_buffer((i64(size_bytes // ELEMENT_BYTES[dtype]),), storage, data=buffer.data)

    return view


def matrix_argument(name: str, shape: tuple[int | Expr, ...], format_name: str) -> Argument:
    """A kernel's argument of matrices ``[.., N, K]``: quantized ones are ``uint8 [.., N, row_bytes]``."""
    kind = format_of(format_name)
    if kind is None:
        return Argument(name, shape, format_name)
    return Argument(name, (*shape[:-1], packed_bytes(kind, int(shape[-1]))), "uint8")


def row_bytes(name: str, depth: int) -> int:
    """Bytes from row to row."""
    kind = format_of(name)
    return depth * ELEMENT_BYTES[name] if kind is None else packed_bytes(kind, depth)

"""Random numbers as fast as memory: a pool of normal values made once, which tensors are filled from in turn.

Needs numpy and `moec.formats` alone. Two places of a model are never equal as long as they are not a multiple of the
pool's length apart, and that is a prime.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.formats import FORMATS, METHODS, pack_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

POOL_VALUES = 134_217_689
"""The largest prime below 2**27: 256 MiB of 16-bit values."""
SMALL_POOL_VALUES = 1_048_573
"""The largest prime below 2**20, for tests."""
POOL_ROWS = 2039
"""Quantized rows before they repeat, a prime."""
PIECE_BYTES = 8 << 20
"""What is written at once."""
STREAM_VALUES = 1 << 22
"""Values of one generator: the pool does not depend on the number of threads."""
DEVIATION = 0.02
"""Of weights; that of initialisation in all the models here."""
STORED = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


def all_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Finite float32 values rounded to the nearest bfloat16, as its bits."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class RandomPool:
    """Normal values of one deviation.

    Args:
        dtype: ``bfloat16`` (held as its bits), ``float16`` or ``float32``.
        values: how many there are before they repeat.
        deviation: standard deviation; the mean is 0.
        seed: equal seeds give equal values.
        workers: threads that make them.
    """

    def __init__(
        self,
        dtype: str,
        values: int = POOL_VALUES,
        deviation: float = DEVIATION,
        seed: int = 0,
        workers: int | None = None,
    ) -> None:
        self.values: NDArray[Any] = np.empty(values, STORED[dtype])
        starts = range(0, values, STREAM_VALUES)
        seeds = np.random.SeedSequence(seed).spawn(len(starts))

        def make(start: int, seed: np.random.SeedSequence) -> None:
            part = self.values[start : start + STREAM_VALUES]
            normal = np.random.Generator(np.random.SFC64(seed)).standard_normal(part.size, dtype=np.float32)
            normal *= np.float32(deviation)
            part[...] = bfloat16_bits(normal) if dtype == "bfloat16" else normal

        with ThreadPoolExecutor(workers or all_cores()) as pool:
            list(pool.map(make, starts, seeds))

    def at(self, start: int, count: int) -> NDArray[Any]:
        """A copy of ``count`` values from place ``start`` on, around the pool's end."""
        return self.values.take(np.arange(start, start + count), mode="wrap")

    def pieces(self, start: int, count: int) -> Iterator[memoryview]:
        """``count`` values from place ``start`` on, around the pool's end, as bytes in pieces; nothing is copied."""
        most = PIECE_BYTES // self.values.itemsize
        while count:
            start %= self.values.size
            piece = self.values[start : start + min(count, most)]
            yield piece.view(np.uint8).data
            start += piece.size
            count -= piece.size


class RowPool:
    """Packed rows of normal values in one format.

    Args:
        name: of the format.
        columns: of a row.
        deviation: standard deviation of the values.
    """

    def __init__(self, name: str, columns: int, deviation: float = DEVIATION) -> None:
        kind = FORMATS[name]
        values = np.random.Generator(np.random.SFC64(0)).standard_normal(
            (POOL_ROWS, columns), dtype=np.float32
        )
        values *= np.float32(deviation)
        self.rows: NDArray[np.uint8] = pack_rows(kind, METHODS["nearest"](kind, values))

    def pieces(self, start: int, count: int) -> Iterator[memoryview]:
        """``count`` rows from place ``start`` on, around the pool's end; nothing is copied."""
        while count:
            start %= len(self.rows)
            piece = self.rows[start : start + count]
            yield piece.data.cast("B")
            start += len(piece)
            count -= len(piece)


class RandomPools:
    """A pool for each element type and kind of row, made when first asked for; ask before threads share them."""

    def __init__(self, values: int = POOL_VALUES, deviation: float = DEVIATION) -> None:
        self._values, self._deviation = values, deviation
        self._made: dict[str, RandomPool] = {}
        self._rows: dict[tuple[str, int], RowPool] = {}

    def rows(self, name: str, columns: int) -> RowPool:
        """The pool of rows of ``columns`` values in the format ``name``."""
        if (name, columns) not in self._rows:
            self._rows[name, columns] = RowPool(name, columns, self._deviation)
        return self._rows[name, columns]

    def pool(self, dtype: str) -> RandomPool:
        """The pool of ``dtype``."""
        if dtype not in self._made:
            self._made[dtype] = RandomPool(dtype, self._values, self._deviation)
        return self._made[dtype]

"""The checkpoint's tensors as they count: a quantized weight and its scales are one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moec.compiler.packing.encodings import encoded_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moec.compiler.checkpoint.record import TensorEntry
    from moec.compiler.packing.encodings import Encoding


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint, dequantized when read."""

    name: str
    shape: tuple[int, ...]
    """Of its values."""
    entry: TensorEntry
    """Of a quantized weight its codes."""
    encoding: Encoding | None = None
    """None: it is stored as it is."""
    turned: bool = False
    """Its last two dimensions are the other way round than those of transformers' parameter."""
    stand_in: str | None = None
    """A format that its values are rounded to, rather than to 16 bits, where its codes are not carried over."""

    def item(self, number: int) -> Stored:
        """Slice ``number`` along the first dimension, e.g. one expert of a fused tensor."""
        if self.encoding is None:
            return replace(self, shape=self.shape[1:], entry=self.entry.item(number))
        encoding = self.encoding.item(number)
        return replace(self, shape=self.shape[1:], entry=encoding.entries[0], encoding=encoding)

    def unflatten(self, count: int) -> Stored:
        """``[count * n, ...]`` as ``[count, n, ...]``; itself where it cannot be: its shape is found wrong later."""
        if self.encoding is not None or not self.shape or self.shape[0] % count:
            return self
        shape = (count, self.shape[0] // count, *self.shape[1:])
        return replace(self, shape=shape, entry=replace(self.entry, shape=shape))

    @property
    def format(self) -> str | None:
        """The name of the format that says the same, bit for bit; None where there is none."""
        return None if self.encoding is None else self.encoding.format

    @property
    def size_bytes(self) -> int:
        """Of all that is read."""
        entries = (self.entry,) if self.encoding is None else self.encoding.entries
        return sum(entry.size_bytes for entry in entries)

    @property
    def rows(self) -> int:
        """Rows that can be read apart: all dimensions but the last, or of a vector its elements."""
        return self.shape[0] if len(self.shape) == 1 else math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Values in a row."""
        return self.shape[-1] if len(self.shape) > 1 else 1


def stored_tensors(index: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, Stored]:
    """Every tensor by its name, quantized weights by the one that they would have unquantized.

    Raises:
        UnsupportedModelError: the checkpoint is quantized in a way that moec does not read.
        CheckpointError: the parts of a quantized weight do not fit each other.
    """
    encoded = encoded_weights(index, config)
    parts = {part for weight in encoded.values() for part in weight.parts}
    plain = {name: Stored(name, entry.shape, entry) for name, entry in index.items() if name not in parts}
    return plain | {
        name: Stored(
            name, weight.shape, weight.encoding.entries[0], weight.encoding, weight.turned, weight.stand_in
        )
        for name, weight in encoded.items()
    }

"""The memory behind the paged cache: keys and values of every attention layer, and the keys of indexers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.model import DTYPE_BYTES
from moec.runtime.device import View

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.model import AttentionSpec, SelectionSpec
    from moec.runtime.device import Device


class CacheStorage:
    """One piece of the device's memory that holds all layers' pages.

    Args:
        device: whose kernels use it.
        layers: an attention of each attention layer, in order (see `moec.artifacts.layout.cache.cache_layers`).
        pages: pages of each layer.
        selections: the selection of each layer that has an indexer, in order.

    Raises:
        BudgetError: the device has too little memory.
    """

    def __init__(
        self,
        device: Device,
        layers: tuple[AttentionSpec, ...],
        pages: int,
        selections: Sequence[SelectionSpec] = (),
    ) -> None:
        wanted = [(spec.dtype, _shapes(spec, pages)) for spec in layers]
        wanted += [(spec.dtype, [(pages, 1, PAGE_TOKENS, spec.dim)]) for spec in selections]
        sizes = [_size(shape, dtype) for dtype, shapes in wanted for shape in shapes]
        self._memory = device.allocate(sum(sizes))
        address = self._memory.address
        made: list[tuple[Any, ...]] = []
        for dtype, shapes in wanted:
            tensors: list[Any] = []
            for shape in shapes:
                tensors.append(device.tensor(View(address, dtype, shape)))
                address += _size(shape, dtype)
            made.append(tuple(tensors))
        self._layers, self._indexes = made[: len(layers)], made[len(layers) :]

    def layer(self, number: int) -> tuple[Any, ...]:
        """Key pages, and value pages unless the attention is latent, of attention layer ``number``."""
        return self._layers[number]

    def index(self, number: int) -> Any:
        """Key pages of the indexer of selecting layer ``number``."""
        return self._indexes[number][0]


def _shapes(spec: AttentionSpec, pages: int) -> list[tuple[int, ...]]:
    keys = (pages, spec.kv_heads, PAGE_TOKENS, spec.key_dim)
    return [keys] if spec.latent else [keys, (pages, spec.kv_heads, PAGE_TOKENS, spec.value_dim)]


def _size(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one tensor, a multiple of 64: a page holds 32 tokens of at least 2 bytes."""
    size = DTYPE_BYTES[dtype]
    for extent in shape:
        size *= extent
    assert size % 64 == 0
    return size

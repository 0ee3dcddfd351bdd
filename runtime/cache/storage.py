"""The memory behind the paged cache: keys and values of every attention layer."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING, Any

from moec.artifacts.cache import PAGE_TOKENS
from moec.artifacts.model import DTYPE_BYTES
from moec.runtime.tensors import tensor_at

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec


class CacheStorage:
    """One anonymous mapping that holds all layers' pages; memory comes as they are first written.

    Args:
        layers: the attention of each attention layer, in order.
        pages: pages of each layer.
    """

    def __init__(self, layers: tuple[AttentionSpec, ...], pages: int) -> None:
        shapes = [_shapes(spec, pages) for spec in layers]
        sizes = [
            [_size(shape, spec.dtype) for shape in group] for spec, group in zip(layers, shapes, strict=True)
        ]
        self._memory = mmap.mmap(-1, max(mmap.PAGESIZE, sum(map(sum, sizes))))
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._layers: list[tuple[Any, ...]] = []
        for spec, group, bytes_each in zip(layers, shapes, sizes, strict=True):
            tensors: list[Any] = []
            for shape, size in zip(group, bytes_each, strict=True):
                tensors.append(tensor_at(address, spec.dtype, shape))
                address += size
            self._layers.append(tuple(tensors))

    def layer(self, number: int) -> tuple[Any, ...]:
        """Key pages, and value pages unless the attention is latent, of attention layer ``number``."""
        return self._layers[number]


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

"""The memory behind the paged cache: keys and values of every attention layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.artifacts.cache import PAGE_TOKENS
from moec.artifacts.model import DTYPE_BYTES
from moec.runtime.devices.protocol import View

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec
    from moec.runtime.devices.protocol import Device


class CacheStorage:
    """One piece of the device's memory that holds all layers' pages.

    Args:
        device: whose kernels use it.
        layers: an attention of each attention layer, in order (see `moec.artifacts.cache.cache_layers`).
        pages: pages of each layer.

    Raises:
        BudgetError: the device has too little memory.
    """

    def __init__(self, device: Device, layers: tuple[AttentionSpec, ...], pages: int) -> None:
        shapes = [(spec, shape) for spec in layers for shape in _shapes(spec, pages)]
        self._memory = device.allocate(sum(_size(shape, spec.dtype) for spec, shape in shapes))
        address = self._memory.address
        self._layers: list[tuple[Any, ...]] = []
        for spec in layers:
            tensors: list[Any] = []
            for shape in _shapes(spec, pages):
                tensors.append(device.tensor(View(address, spec.dtype, shape)))
                address += _size(shape, spec.dtype)
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

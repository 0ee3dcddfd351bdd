"""The attention kernels for GPUs, in the emulator, against the reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.model import AttentionSpec
from moec.artifacts.program import HOPPER
from moec.compiler.kernels import reference
from moec.compiler.kernels.cuda.attention import attention, has_hopper, workspace
from moec.runtime.tensors import aligned_empty
from tests.support.canaries import most_slow
from tests.support.cuda_emulator import Emulated
from tests.support.selections import drawn, words_of

Array = NDArray[Any]
SEQUENCES, PAGES_EACH = 4, 40
EXACT, ROUNDED = 4e-6, 3e-3
"""Largest error: of decoding and of float32, and where queries and weights are rounded to 16 bits."""


def spec_of(heads: tuple[int, int], dims: tuple[int, int], **changes: Any) -> AttentionSpec:
    options = {
        "window": 0, "chunk": 0, "softcap": 0.0, "sinks": False, "latent": False, "dtype": "float16",
        "heads": None, **changes,
    }  # fmt: skip
    return AttentionSpec("a", *heads, *dims, dims[0] ** -0.5, **options)


@cache
def emulated(spec: AttentionSpec, hopper: bool) -> Emulated:
    return Emulated(attention(spec, hopper=hopper))


def aligned(values: Array, dtype: str) -> Array:
    array = aligned_empty(values.shape, dtype)
    array[...] = values
    return array


@dataclass
class Cache:
    """A paged cache as the runtime keeps it, with what was put in beside it; unwritten places are NaN."""

    spec: AttentionSpec
    hopper: bool = False
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def __post_init__(self) -> None:
        spec = self.spec
        shape = (SEQUENCES * PAGES_EACH, spec.kv_heads, PAGE_TOKENS)
        self.keys = aligned(np.full((*shape, spec.key_dim), np.nan), spec.dtype)
        self.values = aligned(np.full((*shape, spec.value_dim), np.nan), spec.dtype)
        self.table = aligned(self.random.permutation(shape[0]).reshape(SEQUENCES, PAGES_EACH), "int32")
        self.history: list[list[tuple[Array, Array]]] = [[] for _ in range(SEQUENCES)]
        self.sinks = aligned(self.random.normal(size=spec.query_heads), "float32")
        self.workspace = aligned(np.full(workspace(spec)[0], 255), "uint8")  # floats that are NaN

    def rounded(self, values: Array) -> Array:
        limit = 65504.0 if self.spec.dtype == "float16" else np.inf
        return np.clip(values, -limit, limit).astype(self.spec.dtype).astype(np.float64)

    def fill(self, sequence: int, count: int) -> None:
        """Put ``count`` tokens into the cache without a kernel."""
        for _ in range(count):
            key = self.rounded(self.random.normal(size=(self.spec.kv_heads, self.spec.key_dim)))
            value = self.rounded(self.random.normal(size=(self.spec.kv_heads, self.spec.value_dim)))
            place = len(self.history[sequence])
            page, slot = self.table[sequence, place // PAGE_TOKENS], place % PAGE_TOKENS
            self.keys[page, :, slot], self.values[page, :, slot] = key, value
            self.history[sequence].append((key, value))

    def step(self, tokens: list[tuple[int, int]], scale: float = 1.0) -> tuple[Array, Array]:
        """Run (sequence, tokens) pairs through the kernel: what came out, and what the reference says."""
        spec, count = self.spec, sum(number for _, number in tokens)
        sequence = [number for number, new in tokens for _ in range(new)]
        q = aligned(self.random.normal(size=(1, count, spec.query_heads, spec.key_dim)), "float32")
        k = aligned(self.random.normal(size=(1, count, spec.kv_heads, spec.key_dim)) * scale, "float32")
        v = aligned(self.random.normal(size=(1, count, spec.kv_heads, spec.value_dim)) * scale, "float32")
        position = []
        for token, number in enumerate(sequence):
            position.append(len(self.history[number]))
            self.history[number].append((self.rounded(k[0, token]), self.rounded(v[0, token])))
        chosen = [drawn(self.random, place) for place in position] if spec.selected else None
        out = aligned(np.full((1, count, spec.query_heads, spec.value_dim), 7.0), "float32")
        name = f"attention_a{HOPPER if self.hopper else ''}"
        emulated(spec, self.hopper)(
            name, q, k, None if spec.latent else v, self.keys, None if spec.latent else self.values,
            self.table, aligned(np.array(sequence), "int32"), aligned(np.array(position), "int32"),
            None if chosen is None else words_of(chosen, PAGES_EACH + 1),
            self.sinks if spec.sinks else None, self.workspace if self.workspace.size else None, out,
        )  # fmt: skip
        expected = [
            self._expected(q[0, token], number, position[token], None if chosen is None else chosen[token])
            for token, number in enumerate(sequence)
        ]
        self._check_appended(sequence, position)
        return out[0], np.stack(expected)

    def _expected(
        self, query: Array, sequence: int, position: int, chosen: NDArray[np.bool_] | None
    ) -> Array:
        keys, values = (np.stack(part) for part in zip(*self.history[sequence], strict=True))
        sinks = self.sinks.astype(np.float64) if self.spec.sinks else None
        return reference.attention(
            self.spec, query.astype(np.float64), keys, values, position, sinks, selected=chosen
        )

    def _check_appended(self, sequence: list[int], position: list[int]) -> None:
        for number, place in zip(sequence, position, strict=True):
            page, slot = self.table[number, place // PAGE_TOKENS], place % PAGE_TOKENS
            key, value = self.history[number][place]
            assert (self.keys[page, :, slot] == key).all()
            assert self.spec.latent or (self.values[page, :, slot] == value).all()


def check(cache: Cache, tokens: list[tuple[int, int]], tolerance: float) -> None:
    found, expected = cache.step(tokens)
    error = np.abs(found - expected)
    assert error.max() < tolerance, (tokens, error.max(), np.argwhere(~(error < tolerance))[:4])


DECODED = {
    "grouped 8 to 1": spec_of((16, 2), (64, 64)),
    "grouped, padded": spec_of((6, 2), (80, 48)),
    "one key head": spec_of((20, 1), (32, 32)),
    "no groups": spec_of((3, 3), (128, 128)),
    "wide": spec_of((8, 1), (256, 256)),
    "key wider than value": spec_of((12, 1), (192, 128)),
    "window": spec_of((8, 1), (64, 64), window=5),
    "long window and sinks": spec_of((8, 1), (64, 64), window=40, sinks=True),
    "chunk": spec_of((4, 2), (64, 64), chunk=50),
    "softcap": spec_of((2, 2), (64, 64), softcap=3.0, sinks=True),
    "float32": spec_of((4, 2), (24, 16), dtype="float32", window=40, sinks=True),
    "float32, latent": spec_of((4, 1), (24, 16), dtype="float32", latent=True, softcap=5.0),
    "odd": spec_of((4, 2), (33, 17)),
    "latent": spec_of((16, 1), (576, 512), latent=True),
    "latent of many heads": spec_of((40, 1), (288, 264), latent=True, window=300, sinks=True),
    "narrow latent": spec_of((4, 1), (40, 24), latent=True),
    "selected": spec_of((4, 2), (64, 64), selected=True),
    "selected, float32": spec_of((4, 1), (24, 16), dtype="float32", latent=True, selected=True, sinks=True),
    "selected latent": spec_of((4, 1), (40, 24), latent=True, selected=True),
    "selected latent of many heads": spec_of((70, 1), (576, 512), latent=True, selected=True, sinks=True),
}


WIDEST = {"selected latent of many heads"}
"""What takes half a minute in the emulator."""


@pytest.mark.parametrize("name", most_slow(DECODED, DECODED.keys() - WIDEST))
def test_decoding(name: str) -> None:
    cache = Cache(DECODED[name])
    check(cache, [(1, 1)], EXACT)
    cache.fill(0, 100 if cache.spec.key_dim > 256 else 450)
    cache.fill(2, 31)
    check(cache, [(0, 1), (1, 1), (2, 1)], EXACT)
    check(cache, [(3, 3), (0, 2), (2, 3)], EXACT)


STEPS: list[list[tuple[int, int]]] = [[(0, 9)], [(1, 40)], [(0, 45), (2, 23), (3, 1), (1, 1)]]
"""(sequence, new tokens): two prompts, then what follows one of them and a long context, and two decoded tokens."""


@pytest.mark.parametrize("name", most_slow(DECODED, DECODED.keys() - WIDEST))
def test_prefill(name: str) -> None:
    cache = Cache(DECODED[name])
    cache.fill(2, 100)
    for step in STEPS:
        check(cache, step, ROUNDED)


@pytest.mark.parametrize("name", [name for name, spec in DECODED.items() if has_hopper(spec)])
def test_prefill_on_hopper(name: str) -> None:
    cache = Cache(DECODED[name], hopper=True)
    cache.fill(2, 300)
    for step in (*STEPS, [(2, 30), (1, 100)]):
        check(cache, step, ROUNDED)


@pytest.mark.parametrize("name", ["grouped 8 to 1", "latent", "float32", "odd"])
@pytest.mark.parametrize("count", [2, 12])
def test_what_is_cached_in_float16_saturates(name: str, count: int) -> None:
    """The keys that the cache then holds are checked in every step."""
    cache = Cache(DECODED[name])
    found, _ = cache.step([(0, count)], scale=1e5)
    assert np.isfinite(found).all()
    if DECODED[name].dtype == "float16":
        assert np.abs(np.nan_to_num(cache.keys)).max() == 65504


@pytest.mark.parametrize("name", ["grouped 8 to 1", "latent", "softcap"])
@pytest.mark.parametrize("count", [1, 9])
def test_the_same_step_gives_the_same_bits(name: str, count: int) -> None:
    """Whatever the workspace held before."""
    results = []
    for held in (1, 255):
        cache = Cache(DECODED[name])
        cache.fill(0, 300)
        cache.workspace[...] = held
        results.append(cache.step([(0, count)])[0])
    assert (results[0] == results[1]).all()


def test_a_context_over_many_pages_is_divided_and_put_together() -> None:
    """All blocks that a context can be divided over, several tiles each."""
    cache = Cache(spec_of((4, 4), (16, 16)))
    cache.fill(0, 1200)
    check(cache, [(0, 1)], EXACT)
    check(cache, [(0, 8)], EXACT)

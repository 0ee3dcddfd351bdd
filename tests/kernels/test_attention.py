from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.model import AttentionSpec, LatentHeads
from moec.compiler.kernels import reference
from moec.compiler.kernels.cpu.attention import attention
from moec.compiler.kernels.cpu.latents import workspace
from moec.compiler.kernels.emit import ALIGNMENT_BYTES

Array = NDArray[np.float64]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = 5e-6
"""What is cached is compared as rounded; all else is float32."""
Compile = Callable[[Any, int], Callable[..., None]]

STEPS: list[list[tuple[int, int]]] = [
    [(0, 7)],
    [(0, 1), (1, 33), (3, 2)],
    [(0, 1), (1, 1), (3, 1)],
    [(2, 100), (0, 3)],
    [(s, 1) for s in range(6)],
    [(5, 70), (4, 1), (2, 1)],
]
"""(sequence, new tokens) of each step: prefills and decodes, alone and together."""


def _spec(counts: tuple[int, int], dims: tuple[int, int], dtype: str, **changes: Any) -> AttentionSpec:
    options = {"window": 0, "chunk": 0, "softcap": 0.0, "sinks": False, "latent": False, "heads": None}
    return AttentionSpec("a", *counts, *dims, dims[0] ** -0.5, **{**options, **changes}, dtype=dtype)  # type: ignore[arg-type]


CASES = [
    (16, _spec((8, 1), (40, 24), "bfloat16")),
    (16, _spec((16, 1), (72, 64), "float32", latent=True)),
    (8, _spec((4, 2), (16, 16), "float32", window=5, sinks=True)),
    (8, _spec((12, 4), (64, 64), "float16", window=40, sinks=True)),
    (4, _spec((6, 6), (33, 17), "float32", chunk=8, softcap=30.0)),
    (16, _spec((10, 1), (35, 9), "bfloat16", chunk=50, latent=True)),
    (8, _spec((6, 1), (80, 64), "float16", latent=True, heads=LatentHeads(32, 24, "bfloat16"))),
    (16, _spec((3, 1), (31, 20), "float32", latent=True, sinks=True, heads=LatentHeads(9, 13, "float32"))),
    (8, _spec((6, 1), (40, 24), "float32", latent=True, selected=True)),
    (16, _spec((4, 2), (16, 16), "bfloat16", window=40, sinks=True, selected=True)),
]
WORDS = 7
"""Of a token's selection: one more than a sequence has pages."""


def _selected(generator: torch.Generator, tokens: int) -> torch.Tensor:
    """Some of the positions, none of some pages; a token always sees itself (bits beyond it do no harm)."""
    bits = torch.rand(tokens, WORDS, PAGE_TOKENS, generator=generator) < 0.3
    return bits & (torch.rand(tokens, WORDS, 1, generator=generator) < 0.7)


def _words(bits: torch.Tensor) -> torch.Tensor:
    powers = 2 ** torch.arange(PAGE_TOKENS, dtype=torch.int64)
    return ((bits * powers).sum(-1) - (1 << 32) * bits[..., -1]).int()


class _Cache:
    """A paged cache as the runtime keeps it, with what was put in beside it; unwritten places are NaN."""

    def __init__(self, spec: AttentionSpec, generator: torch.Generator) -> None:
        self.spec, self.generator = spec, generator
        shape = (40, spec.kv_heads, PAGE_TOKENS)
        dtype = DTYPES[spec.dtype]
        self.keys = torch.full((*shape, spec.key_dim), float("nan")).to(dtype)
        self.values = torch.full((*shape, spec.value_dim), float("nan")).to(dtype)
        self.table = torch.randperm(40, generator=generator)[:36].reshape(6, 6).int()
        self.history: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(6)]
        self.matrices = self._matrices()

    def _matrices(self) -> list[torch.Tensor]:
        """Of the heads that a latent stands for, as the kernel takes them."""
        spec, heads = self.spec, self.spec.heads
        if heads is None:
            return []
        own, value = (
            (self.random(spec.query_heads, dim, spec.value_dim) * spec.value_dim**-0.5).to(
                DTYPES[heads.dtype]
            )
            for dim in (heads.nope_dim, heads.value_dim)
        )
        return [own.transpose(1, 2).contiguous(), own, value]

    def expanded(self, keys: Array, values: Array) -> tuple[AttentionSpec, Array, Array]:
        """What the reference attends to."""
        if not self.matrices:
            return self.spec, keys, values
        own, value = (matrix.double().numpy() for matrix in self.matrices[1:])
        return reference.expand_latents(self.spec, keys, own, value)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.keys] if self.spec.latent else [self.keys, self.values]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """As the cache holds them."""
        return values.to(DTYPES[self.spec.dtype]).float()


@pytest.mark.parametrize(
    ("lanes", "dtype"), [(16, "bfloat16"), (4, "bfloat16"), (4, "float16"), (8, "float16")]
)
def test_cached_values_are_rounded_to_nearest_even(compiled: Compile, lanes: int, dtype: str) -> None:
    spec = _spec((1, 1), (64, 64), dtype, latent=True, window=1)
    attend = compiled(attention(spec, lanes=lanes), lanes)
    bits = torch.arange(-(1 << 31), 1 << 31, 524_287, dtype=torch.int64).to(torch.int32)
    numbers = bits.view(torch.float32)[: len(bits) // 64 * 64]
    tokens = len(numbers) // 64
    pages = -(-tokens // PAGE_TOKENS)
    cache = torch.zeros(pages, 1, PAGE_TOKENS, 64, dtype=DTYPES[dtype])
    table = torch.arange(pages).reshape(1, -1).int()
    values, place = numbers.reshape(1, tokens, 1, 64), torch.arange(tokens).int()
    attend(values, values, cache, table, torch.zeros(tokens).int(), place, torch.empty(1, tokens, 1, 64))
    largest = torch.finfo(DTYPES[dtype]).max
    held = numbers.clamp(-largest, largest) if dtype == "float16" else numbers
    found, expected = cache.reshape(-1)[: tokens * 64], held.to(DTYPES[dtype])
    same = (found == expected) | (found.isnan() & expected.isnan())
    assert same.all(), numbers[~same][:4]


@pytest.mark.parametrize(("lanes", "spec"), CASES)
def test_attention_matches_the_reference(compiled: Compile, lanes: int, spec: AttentionSpec) -> None:
    attend = compiled(attention(spec, lanes=lanes), lanes)
    cache = _Cache(spec, torch.Generator().manual_seed(3))
    sinks = cache.random(spec.query_heads)
    for step in STEPS:
        _step(spec, cache, attend, sinks, step)


def _step(
    spec: AttentionSpec,
    cache: _Cache,
    attend: Any,
    sinks: torch.Tensor,
    step: list[tuple[int, int]],
) -> None:
    sequence = [number for number, count in step for _ in range(count)]
    q = cache.random(1, len(sequence), spec.query_heads, spec.query_dim)
    k = cache.random(1, len(sequence), spec.kv_heads, spec.key_dim)
    v = cache.random(1, len(sequence), spec.kv_heads, spec.value_dim)
    position = []
    for token, number in enumerate(sequence):
        position.append(len(cache.history[number]))
        cache.history[number].append((cache.rounded(k[0, token]), cache.rounded(v[0, token])))
    place = (cache.table, torch.tensor(sequence).int(), torch.tensor(position).int())
    out = torch.full((1, len(sequence), spec.query_heads, spec.result_dim), 7.0).to(q.dtype)
    own = [k] if spec.latent else [k, v]
    bits = _selected(cache.generator, len(sequence))
    bits.view(len(sequence), -1)[torch.arange(len(sequence)), torch.tensor(position)] = True
    chosen = [_words(bits)] if spec.selected else []
    more = [*chosen, *([sinks] if spec.sinks else []), *cache.matrices]
    fixed, each = workspace(spec)
    memory = torch.full((fixed + each * len(sequence) + ALIGNMENT_BYTES,), 255, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % ALIGNMENT_BYTES :][: fixed + each * len(sequence)]
    attend(q, *own, *cache.tensors, *place, *more, *([memory] if fixed else []), out)
    for token, number in enumerate(sequence):
        keys = torch.stack([key for key, _ in cache.history[number]]).double().numpy()
        values = torch.stack([value for _, value in cache.history[number]]).double().numpy()
        alone, keys, values = cache.expanded(keys, values)
        expected = reference.attention(
            alone,
            q[0, token].double().numpy(),
            keys,
            values,
            position[token],
            sinks.double().numpy() if spec.sinks else None,
            selected=bits[token].reshape(-1)[: position[token] + 1].numpy() if spec.selected else None,
        )
        error = np.abs(out[0, token].double().numpy() - expected).max()
        assert error < TOLERANCE, (step, token)

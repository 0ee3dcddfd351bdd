"""Attention of heads that a cached latent stands for, in the emulator, against the reference on expanded heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.model import AttentionSpec, LatentHeads
from moec.artifacts.program import HOPPER
from moec.compiler.kernels import reference
from moec.compiler.kernels.cuda.attention import attention, has_hopper, workspace
from moec.compiler.kernels.cuda.attention.expanded import room as expanded_room
from moec.compiler.kernels.cuda.attention.expanded.plan import LEAST_TOKENS
from tests.kernels.cuda.test_attention import aligned
from tests.support import arrays
from tests.support.canaries import most_slow
from tests.support.cuda_emulator import Emulated
from tests.support.selections import drawn, words_of

Array = NDArray[Any]
SEQUENCES, PAGES_EACH = 6, 20
EXACT = 2e-5
ROUNDED = {"float16": 2e-3, "bfloat16": 1.2e-2, "float32": EXACT}
"""Largest error by the type of the matrices: activations, latents too, are rounded to it."""


def spec_of(
    count: int, dims: tuple[int, int, int, int], dtype: str = "bfloat16", **changes: Any
) -> AttentionSpec:
    """``dims``: entries of a key from the latent, of its shared part, of a value, of the latent."""
    nope, rope, value, rank = dims
    options = {
        "window": 0,
        "chunk": 0,
        "softcap": 0.0,
        "sinks": False,
        "latent": True,
        "dtype": "float16" if dtype != "float32" else dtype,
    }
    heads = LatentHeads(nope, value, dtype)  # type: ignore[arg-type]
    return AttentionSpec(
        "a", count, 1, rank + rope, rank, (nope + rope) ** -0.5, **{**options, **changes}, heads=heads
    )


@cache
def emulated(spec: AttentionSpec, hopper: bool, _rows: int) -> Emulated:
    return Emulated(attention(spec, hopper=hopper))


@dataclass
class Cache:
    """A paged cache of latents, with what was put in beside it; unwritten places are NaN."""

    spec: AttentionSpec
    hopper: bool = False
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(11))

    def __post_init__(self) -> None:
        spec, heads = self.spec, self.spec.heads
        assert heads is not None
        shape = (SEQUENCES * PAGES_EACH, 1, PAGE_TOKENS, spec.key_dim)
        self.keys = aligned(np.full(shape, np.nan), spec.dtype)
        self.table = aligned(self.random.permutation(shape[0]).reshape(SEQUENCES, PAGES_EACH), "int32")
        self.history: list[list[Array]] = [[] for _ in range(SEQUENCES)]
        self.sinks = aligned(self.random.normal(size=spec.query_heads), "float32")
        own = self._matrix((spec.query_heads, heads.nope_dim, spec.value_dim))
        value = self._matrix((spec.query_heads, heads.value_dim, spec.value_dim))
        self.own, self.value = (matrix.double().numpy() for matrix in (own, value))
        turned = own.transpose(1, 2).contiguous()
        self.matrices = [arrays.aligned(matrix) for matrix in (turned, own, value)]

    def _matrix(self, shape: tuple[int, ...]) -> torch.Tensor:
        assert self.spec.heads is not None
        values = torch.from_numpy(self.random.normal(size=shape) * shape[-1] ** -0.5)
        return values.to(arrays.DTYPES[self.spec.heads.dtype])

    def rounded(self, values: Array) -> Array:
        return values.astype(self.spec.dtype).astype(np.float64)

    def fill(self, sequence: int, count: int) -> None:
        """Put ``count`` tokens into the cache without a kernel."""
        for _ in range(count):
            key = self.rounded(self.random.normal(size=(1, self.spec.key_dim)))
            place = len(self.history[sequence])
            page, slot = self.table[sequence, place // PAGE_TOKENS], place % PAGE_TOKENS
            self.keys[page, :, slot] = key
            self.history[sequence].append(key)

    def step(self, tokens: list[tuple[int, int]], held: int = 255) -> tuple[Array, Array]:
        """Run (sequence, tokens) pairs through the kernel: what came out, and what the reference says."""
        spec, count = self.spec, sum(number for _, number in tokens)
        sequence = [number for number, new in tokens for _ in range(new)]
        q = aligned(self.random.normal(size=(1, count, spec.query_heads, spec.query_dim)), "float32")
        k = aligned(self.random.normal(size=(1, count, 1, spec.key_dim)), "float32")
        position = []
        for token, number in enumerate(sequence):
            position.append(len(self.history[number]))
            self.history[number].append(self.rounded(k[0, token]))
        chosen = [drawn(self.random, place) for place in position] if spec.selected else None
        out = aligned(np.full((1, count, spec.query_heads, spec.result_dim), 7.0), "float32")
        fixed, each = workspace(spec)
        memory = aligned(np.full(fixed + each * count, held), "uint8")
        name = f"attention_a{HOPPER if self.hopper else ''}"
        emulated(spec, self.hopper, expanded_room.FIXED_ROWS)(
            name, q, k, self.keys, self.table, aligned(np.array(sequence), "int32"),
            aligned(np.array(position), "int32"), None if chosen is None else words_of(chosen, PAGES_EACH + 1),
            self.sinks if spec.sinks else None, *self.matrices, memory, out,
        )  # fmt: skip
        expected = np.stack(
            [
                self._expected(
                    q[0, token], number, position[token], None if chosen is None else chosen[token]
                )
                for token, number in enumerate(sequence)
            ]
        )
        for number, place in zip(sequence, position, strict=True):
            page, slot = self.table[number, place // PAGE_TOKENS], place % PAGE_TOKENS
            assert (self.keys[page, :, slot] == self.history[number][place]).all()
        return out[0], expected

    def _expected(
        self, query: Array, sequence: int, position: int, chosen: NDArray[np.bool_] | None
    ) -> Array:
        latents = np.stack(self.history[sequence][: position + 1])
        alone, keys, values = reference.expand_latents(self.spec, latents, self.own, self.value)
        sinks = self.sinks.astype(np.float64) if self.spec.sinks else None
        return reference.attention(
            alone, query.astype(np.float64), keys, values, position, sinks, selected=chosen
        )


def check(held: Cache, tokens: list[tuple[int, int]], tolerance: float) -> None:
    found, expected = held.step(tokens)
    error = np.abs(found - expected)
    assert error.max() < tolerance, (tokens, error.max(), np.argwhere(~(error < tolerance))[:4])


SPECS = {
    "as DeepSeek's": spec_of(2, (128, 64, 128, 512)),
    "small": spec_of(6, (32, 16, 32, 64)),
    "float16": spec_of(3, (48, 24, 40, 72), "float16", sinks=True),
    "window": spec_of(2, (32, 16, 16, 64), window=70, sinks=True),
    "window of wide heads": spec_of(1, (64, 64, 64, 64), window=150, sinks=True, softcap=4.0),
    "chunk and softcap": spec_of(2, (16, 16, 32, 48), chunk=150, softcap=3.0),
    "float32": spec_of(2, (12, 8, 20, 24), "float32"),
    "odd": spec_of(2, (20, 6, 10, 30)),
    "selected": spec_of(6, (32, 16, 32, 64), selected=True),
    "selected, float32": spec_of(2, (12, 8, 20, 24), "float32", selected=True),
}


@pytest.mark.parametrize(
    "name",
    most_slow(
        SPECS, SPECS.keys() - {"as DeepSeek's", "float16", "window of wide heads", "chunk and softcap"}
    ),
)
def test_few_tokens(name: str) -> None:
    held = Cache(SPECS[name])
    held.fill(0, 150)
    check(held, [(1, 1)], EXACT)
    check(held, [(0, 1)], EXACT)
    check(held, [(0, 2), (1, 3), (2, 3)], EXACT)


@pytest.mark.parametrize(
    "name",
    most_slow(
        SPECS, SPECS.keys() - {"as DeepSeek's", "selected, float32", "float16", "window of wide heads"}
    ),
)
def test_short_prompts(name: str) -> None:
    held = Cache(SPECS[name])
    assert held.spec.heads is not None
    held.fill(0, 100)
    check(held, [(0, 1), (1, 21), (2, 9), (3, 1)], ROUNDED[held.spec.heads.dtype])


@pytest.mark.parametrize("name", most_slow(SPECS, SPECS.keys() - {"as DeepSeek's", "selected"}))
def test_a_prompt_in_pieces_beside_decoded_tokens(name: str) -> None:
    """Long runs see expanded keys, those of earlier steps among them; short ones attend to latents."""
    held = Cache(SPECS[name])
    assert held.spec.heads is not None
    tolerance = ROUNDED[held.spec.heads.dtype]
    held.fill(4, 90)
    check(held, [(1, LEAST_TOKENS + 1)], tolerance)
    check(held, [(0, 1), (4, 1), (1, LEAST_TOKENS), (3, 31), (5, 150), (2, 1)], tolerance)


@pytest.mark.parametrize(
    "name", most_slow(["as DeepSeek's", "window of wide heads"], ["window of wide heads"])
)
def test_expanded_keys_on_hopper(name: str) -> None:
    held = Cache(SPECS[name], hopper=True)
    assert has_hopper(held.spec)
    held.fill(4, 90)
    check(held, [(1, LEAST_TOKENS + 1)], ROUNDED["bfloat16"])
    check(held, [(0, 1), (4, 1), (1, LEAST_TOKENS), (3, 31), (5, 150), (2, 1)], ROUNDED["bfloat16"])


@pytest.mark.slow
def test_expanded_keys_come_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context for which the workspace has no room at once; a run that needs too many rounds goes through latents."""
    monkeypatch.setattr(expanded_room, "FIXED_ROWS", 128)
    spec = spec_of(16, (8, 8, 8, 8), "float16", sinks=True)
    held = Cache(spec)
    held.fill(0, 440)
    check(held, [(0, LEAST_TOKENS + 2), (1, 5)], ROUNDED["float16"])
    held.fill(2, 200)
    held.fill(3, 300)
    check(held, [(2, 140), (3, 130), (1, 1)], ROUNDED["float16"])


@pytest.mark.parametrize("count", [2, 30, LEAST_TOKENS + 3])
def test_the_same_step_gives_the_same_bits(count: int) -> None:
    """Whatever the workspace held before."""
    results = []
    for number in (1, 255):
        held = Cache(SPECS["small"])
        held.fill(0, 130)
        results.append(held.step([(0, count), (1, 2)], number)[0])
    assert (results[0] == results[1]).all()

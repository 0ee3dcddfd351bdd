"""Cases of attention to whole sources, and of biases by distance, for kernels of every target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.model import AttentionSpec
from moec.compiler.kernels import reference

if TYPE_CHECKING:
    from moec.artifacts.model import DType

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _spec(
    name: str,
    heads: int,
    dim: int,
    dtype: DType,
    *,
    causal: bool = False,
    cross: bool = False,
    reach: int = 0,
    scaling: float = 1.0,
) -> AttentionSpec:
    shape = {"query_heads": heads, "kv_heads": heads, "key_dim": dim, "value_dim": dim}
    off = {"window": 0, "chunk": 0, "softcap": 0.0, "sinks": False, "latent": False}
    kind = {"causal": causal, "cross": cross, "bias_reach": reach}
    return AttentionSpec(name, **shape, **off, **kind, scaling=scaling, dtype=dtype, heads=None)  # type: ignore[arg-type]


SPECS: dict[str, AttentionSpec] = {
    "t5 encoder": _spec("a", 3, 64, "float16", reach=20),
    "t5 decoder": _spec("a", 3, 64, "float16", causal=True, reach=20),
    "t5 encoder, float32": _spec("a", 2, 20, "float32", reach=7),
    "cross": _spec("a", 4, 64, "float16", cross=True),
    "cross, float32": _spec("a", 2, 16, "float32", cross=True, scaling=0.25),
    "bart encoder": _spec("a", 2, 128, "float16", scaling=128**-0.5),
}


class SourceCase:
    """One step over several sequences, whose pages lie anywhere; places that nobody wrote are NaN.

    Args:
        spec: which attention.
        lengths: positions that each sequence has.
        queries: tokens of each sequence in the step where it is causal or cross; the last ones. All by default.
    """

    def __init__(
        self, spec: AttentionSpec, lengths: tuple[int, ...], queries: tuple[int, ...] | None = None
    ) -> None:
        assert spec.causal or spec.cross or queries is None, "an encoder sees all of a source at once"
        self.spec, self.lengths = spec, lengths
        self._generator = torch.Generator().manual_seed(len(lengths))
        counts = queries or lengths
        width = -(-max(lengths) // PAGE_TOKENS)
        order = torch.randperm(2 * width * len(lengths), generator=self._generator)
        self.table = order[: width * len(lengths)].reshape(len(lengths), width).int()
        shape = (len(order), spec.kv_heads, PAGE_TOKENS)
        self.k_cache = torch.full((*shape, spec.key_dim), float("nan")).to(DTYPES[spec.dtype])
        self.v_cache = torch.full((*shape, spec.value_dim), float("nan")).to(DTYPES[spec.dtype])
        self.rows = [row for row, count in enumerate(counts) for _ in range(count)]
        self.positions = [
            position
            for length, count in zip(lengths, counts, strict=True)
            for position in range(length - count, length)
        ]
        # T5 does not scale products, and learns queries for which they are as large as others' scaled ones.
        usual = spec.key_dim**-0.5 / spec.scaling
        self.q = usual * self._random(1, len(self.rows), spec.query_heads, spec.key_dim)
        self.keys = [self._random(length, spec.kv_heads, spec.key_dim) for length in lengths]
        self.values = [self._random(length, spec.kv_heads, spec.value_dim) for length in lengths]
        self.bias = 2 * self._random(spec.query_heads, 2 * spec.bias_reach + 1)
        self.out = torch.full((1, len(self.rows), spec.query_heads, spec.value_dim), 7.0)
        self._write([(row, range(length)) for row, length in enumerate(lengths)], only_before=not spec.cross)

    def append_arguments(self) -> list[torch.Tensor]:
        """Of ``append_<name>``, for all positions of all sequences."""
        self.k_cache.fill_(float("nan"))
        self.v_cache.fill_(float("nan"))
        rows = torch.tensor([row for row, length in enumerate(self.lengths) for _ in range(length)])
        places = torch.cat([torch.arange(length) for length in self.lengths])
        keys, values = torch.cat(self.keys)[None], torch.cat(self.values)[None]
        return [keys, values, self.k_cache, self.v_cache, self.table, rows.int(), places.int()]

    def arguments(self) -> list[torch.Tensor]:
        """Of ``attention_<name>`` but for a workspace, which comes before the last."""
        spec = self.spec
        rows, places = torch.tensor(self.rows).int(), torch.tensor(self.positions).int()
        last = torch.tensor([self.lengths[row] - 1 for row in self.rows]).int()
        own = (
            torch.stack([tensors[row][place] for row, place in zip(self.rows, self.positions, strict=True)])[
                None
            ]
            for tensors in (self.keys, self.values)
        )
        told = [rows, last] if spec.cross else [rows, places] if spec.causal else [rows, places, last]
        bias = [self.bias] if spec.bias_reach else []
        return [
            self.q,
            *([] if spec.cross else own),
            self.k_cache,
            self.v_cache,
            self.table,
            *told,
            *bias,
            self.out,
        ]

    def error(self) -> float:
        """The largest difference from the reference."""
        errors = []
        for token, (row, place) in enumerate(zip(self.rows, self.positions, strict=True)):
            expected = reference.attention(
                self.spec,
                self.q[0, token].double().numpy(),
                self._rounded(self.keys[row]).double().numpy(),
                self._rounded(self.values[row]).double().numpy(),
                place,
                None,
                self.bias.double().numpy() if self.spec.bias_reach else None,
            )
            errors.append(np.abs(self.out[0, token].double().numpy() - expected).max())
        return float(max(errors))

    def check_cache(self) -> None:
        """Every key and value is in its page, and nothing anywhere else."""
        held = torch.zeros(self.k_cache.shape[0], PAGE_TOKENS, dtype=torch.bool)
        for row, length in enumerate(self.lengths):
            for place in range(length):
                page, slot = int(self.table[row, place // PAGE_TOKENS]), place % PAGE_TOKENS
                held[page, slot] = True
                for cache, tensors in ((self.k_cache, self.keys), (self.v_cache, self.values)):
                    expected = self._rounded(tensors[row][place])
                    assert torch.equal(cache[page, :, slot].float(), expected), (row, place)
        empty = self.k_cache.transpose(1, 2)[~held]
        assert empty.isnan().all()

    def _write(self, sequences: list[tuple[int, range]], *, only_before: bool) -> None:
        """What earlier steps have put into the cache."""
        for row, places in sequences:
            own = {place for r, place in zip(self.rows, self.positions, strict=True) if r == row}
            for place in places:
                if only_before and place in own:
                    continue
                page, slot = int(self.table[row, place // PAGE_TOKENS]), place % PAGE_TOKENS
                self.k_cache[page, :, slot] = self.keys[row][place].to(self.k_cache.dtype)
                self.v_cache[page, :, slot] = self.values[row][place].to(self.v_cache.dtype)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(DTYPES[self.spec.dtype]).float()

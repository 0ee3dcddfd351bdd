"""Attention over a paged cache: decode reads the context once, prefill against torch's own attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kernels import reference
from benchmarks.kernels.cases import EXACT, ROUNDED, Case, Judgement, judge
from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.layout.footprint import cache_token_bytes
from moec.artifacts.model import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.kernels.module import Module
    from moec.artifacts.model import AttentionSpec

DECODE = ((1, 512), (1, 4096), (1, 32768), (8, 4096))
"""(sequences, context of each)."""
PREFILL_TOKENS = 4096
PREFILL_AIM = 0.5
ROTATED_BYTES = 200 << 20
"""Decode goes round among caches of so many bytes together, so that the second-level cache does not hold them."""
MOST_CALLS = 400
SELECTED = 2048
"""Positions that a token sees where only some are selected, as DeepSeek-V3.2 has it."""


@dataclass(frozen=True, eq=False)
class Step:
    """Operands of one call: T tokens of B sequences at the ends of their contexts."""

    spec: AttentionSpec
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    caches: tuple[torch.Tensor, ...]
    table: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    sinks: torch.Tensor | None
    matrices: tuple[torch.Tensor, ...]
    """Of the heads that latents stand for: absorb, expand, value."""
    out: torch.Tensor
    selected: torch.Tensor | None = None
    """Which positions each token sees, ``[T, positions]``, where the spec is selected."""

    def operands(self) -> list[torch.Tensor]:
        """In the order of the kernel's arguments."""
        own = [self.keys] if self.spec.latent else [self.keys, self.values]
        sinks = [] if self.sinks is None else [self.sinks]
        places = [self.table, self.sequence, self.position]
        bits = [] if self.selected is None else [words_of(self.selected)]
        return [self.query, *own, *self.caches, *places, *bits, *sinks, *self.matrices, self.out]

    def expected(self) -> torch.Tensor:
        """By the reference in float64, on what the cache holds once the step's own keys are in it."""
        results = []
        for number in range(self.table.shape[0]):
            rows = self.sequence == number
            position = self.position[rows]
            key, *value = (self._context(cache, number, position) for cache in self.caches)
            for cached, new in zip((key, *value), (self.keys, self.values), strict=False):
                cached[position.long()] = new[0, rows].to(cached.dtype)
            values = value[0] if value else key[..., : self.spec.value_dim]
            spec, query = self.spec, self.query[0, rows]
            if self.matrices:
                spec, key, values = reference.expand_latents(spec, key, *self.matrices[1:])
            shown = None if self.selected is None else self.selected[rows][:, : key.shape[0]]
            results.append(reference.attention(spec, query, key, values, position, self.sinks, shown))
        return torch.cat(results)[None]

    def _context(self, cache: torch.Tensor, number: int, position: torch.Tensor) -> torch.Tensor:
        """A copy of a sequence's cached tensor, ``[C, Hkv, D]``."""
        pages = cache[self.table[number].long()].transpose(1, 2)
        return pages.reshape(-1, *pages.shape[2:])[: int(position.max()) + 1].clone()


def attention_cases(
    module: Module,
    decode: tuple[tuple[int, int], ...] = DECODE,
    prefill_tokens: int = PREFILL_TOKENS,
    rotated_bytes: int = ROTATED_BYTES,
) -> Iterator[Callable[[], Case]]:
    """What makes each case; the memory is taken when one is made."""
    for spec in module.model.attentions:
        for sequences, context in decode:
            yield partial(_decode, module, spec, sequences, context, rotated_bytes)
        yield partial(_prefill, module, spec, prefill_tokens)


def make_caches(spec: AttentionSpec, pages: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random keys, and values where they are not part of the keys: ``[pages, Hkv, 32, D]``."""
    dims = [spec.key_dim] if spec.latent else [spec.key_dim, spec.value_dim]
    dtype = getattr(torch, spec.dtype)
    return tuple(
        torch.empty(pages, spec.kv_heads, PAGE_TOKENS, dim, dtype=dtype, device=device).normal_()
        for dim in dims
    )


def make_step(
    spec: AttentionSpec,
    caches: tuple[torch.Tensor, ...],
    pages: torch.Tensor,
    new: int,
    context: int,
) -> Step:
    """The last ``new`` tokens of each sequence; ``pages`` ``[B, M]`` says which pages are whose."""
    device, sequences = pages.device, pages.shape[0]
    tokens = sequences * new
    number = torch.arange(sequences, device=device).repeat_interleave(new).int()
    position = torch.arange(context - new, context, device=device).repeat(sequences).int()
    return Step(
        spec,
        torch.randn(1, tokens, spec.query_heads, spec.query_dim, device=device),
        torch.randn(1, tokens, spec.kv_heads, spec.key_dim, device=device),
        torch.randn(1, tokens, spec.kv_heads, spec.value_dim, device=device),
        caches,
        pages.int().contiguous(),
        number,
        position,
        torch.randn(spec.query_heads, device=device) if spec.sinks else None,
        make_matrices(spec, device),
        torch.empty(1, tokens, spec.query_heads, spec.result_dim, device=device),
        drawn(position, pages.shape[1] * PAGE_TOKENS) if spec.selected else None,
    )


def drawn(position: torch.Tensor, positions: int) -> torch.Tensor:
    """`SELECTED` of the positions up to each token's own, at random, or all of them: ``[T, positions]``."""
    places = torch.arange(positions, device=position.device)
    scores = torch.rand(len(position), positions, device=position.device)
    scores.masked_fill_(places > position[:, None], -1.0)
    least = torch.topk(scores, min(SELECTED, positions)).values[:, -1:]
    return (scores >= least) & (scores >= 0)


def words_of(selected: torch.Tensor) -> torch.Tensor:
    """int32 ``[T, words]``: a bit a position, as a selection's kernel writes them."""
    places = torch.arange(PAGE_TOKENS, device=selected.device)
    words = (selected.reshape(len(selected), -1, PAGE_TOKENS).long() << places).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().contiguous()


def make_matrices(spec: AttentionSpec, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random ones of the heads that latents stand for, where they stand for any."""
    if spec.heads is None:
        return ()
    own, value = (
        (torch.randn(spec.query_heads, dim, spec.value_dim, device=device) * spec.value_dim**-0.5).to(
            getattr(torch, spec.heads.dtype)
        )
        for dim in (spec.heads.nope_dim, spec.heads.value_dim)
    )
    return own.transpose(1, 2).contiguous(), own, value


def _decode(module: Module, spec: AttentionSpec, sequences: int, context: int, rotated_bytes: int) -> Case:
    device, width = module.device, -(-context // PAGE_TOKENS)
    seen = min(context, spec.window or context, spec.chunk or context, SELECTED if spec.selected else context)
    moved = sequences * seen * cache_token_bytes(spec) + _matrix_bytes(spec)
    count = max(1, min(MOST_CALLS, rotated_bytes // moved))
    caches = make_caches(spec, count * sequences * width, device)
    pages = torch.randperm(count * sequences * width, device=device).reshape(count, sequences, width)
    steps = [make_step(spec, caches, own, 1, context) for own in pages]
    calls = [module.bind(f"attention_{spec.name}", *step.operands(), tokens=sequences) for step in steps]
    flops = 2 * sequences * seen * spec.query_heads * (spec.key_dim + spec.value_dim)
    return Case(
        describe(spec),
        f"decode {sequences} x {context}",
        calls,
        lambda: judge(calls[0], steps[0].out, steps[0].expected()),
        EXACT,
        moved,
        flops,
        "copy",
        None,
    )


def _prefill(module: Module, spec: AttentionSpec, tokens: int) -> Case:
    device, width = module.device, -(-tokens // PAGE_TOKENS)
    caches = make_caches(spec, width, device)
    step = make_step(spec, caches, torch.randperm(width, device=device)[None], tokens, tokens)
    call = module.bind(f"attention_{spec.name}", *step.operands(), tokens=tokens)

    def check() -> Judgement:
        return judge(call, step.out, step.expected())

    most = SELECTED if spec.selected else spec.window or tokens
    pairs = sum(min(p + 1, most) for p in range(tokens))
    # What latents stand for is attended to with less arithmetic than latents; preparing it is extra, and in the time.
    flops = 2 * pairs * spec.query_heads * (spec.query_dim + spec.result_dim)
    moved = sum(tensor.nbytes for tensor in (step.query, step.keys, step.values, step.out))
    rival = None
    if not (spec.window or spec.chunk or spec.softcap or spec.sinks or spec.selected):
        rival = _torch_attention((spec if spec.heads is None else spec.expanded), tokens, device)
    aim = None if rival is None else PREFILL_AIM
    return Case(
        describe(spec), f"prefill {tokens}", [call], check, ROUNDED, moved, flops, "torch", aim, rival
    )


def _matrix_bytes(spec: AttentionSpec) -> int:
    """Of the matrices that a decoded token reads: to absorb queries, and to project results."""
    if spec.heads is None:
        return 0
    width = spec.heads.nope_dim + spec.heads.value_dim
    return spec.query_heads * spec.value_dim * width * DTYPE_BYTES[spec.heads.dtype]


def _torch_attention(spec: AttentionSpec, tokens: int, device: torch.device) -> Callable[[], Any]:
    """Torch's causal attention on tensors of the same shape in 16 bits: whichever of its kernels torch picks."""
    dtype = torch.bfloat16 if device.type == "cpu" else getattr(torch, spec.dtype)

    def make(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, dim, device=device, dtype=dtype)

    query, key = make(spec.query_heads, spec.key_dim), make(spec.kv_heads, spec.key_dim)
    value = key[..., : spec.value_dim] if spec.latent else make(spec.kv_heads, spec.value_dim)
    grouped = spec.kv_heads != spec.query_heads
    if grouped and spec.key_dim != spec.value_dim:
        # Kernels for unequal dimensions want as many heads of keys as of queries.
        group = spec.query_heads // spec.kv_heads
        key, value, grouped = key.expand(-1, group, -1, -1), value.expand(-1, group, -1, -1), False

    def run() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=spec.scaling, enable_gqa=grouped
        )

    return run


def describe(spec: AttentionSpec) -> str:
    """Heads and dimensions, and what else is special."""
    extras = [
        name for name in ("window", "chunk", "softcap", "sinks", "latent", "selected") if getattr(spec, name)
    ]
    heads = f"attention {spec.query_heads}/{spec.kv_heads} {spec.key_dim}/{spec.value_dim}"
    if spec.heads is not None:
        heads += f" for {spec.query_dim}/{spec.result_dim}"
    return " ".join([heads, *extras])

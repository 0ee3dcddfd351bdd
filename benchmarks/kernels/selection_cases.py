"""Selecting positions: every index key of a context is read once, or by every token of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels.cases import EXACT, Case, Judgement
from benchmarks.support.torch_clock import side_stream
from moec.artifacts.layout.cache import PAGE_TOKENS, SELECTION_PREFIX
from moec.artifacts.model import DTYPE_BYTES
from moec.artifacts.steps import SelectionStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.kernels.module import Module
    from moec.artifacts.model import SelectionSpec

STEPS = ((1, 1, 8192), (1, 1, 32768), (1, 1, 131072), (8, 1, 8192), (1, 512, 8192), (1, 512, 32768))
"""Sequences, new tokens of each, context of each."""
ROTATED_BYTES = 200 << 20
MOST_CALLS = 64


@dataclass(frozen=True, eq=False)
class Selecting:
    """The operands of one call."""

    spec: SelectionSpec
    query: torch.Tensor
    weight: torch.Tensor
    key: torch.Tensor
    cache: torch.Tensor
    table: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    out: torch.Tensor

    def operands(self) -> list[torch.Tensor]:
        """In the order of the kernel's arguments."""
        places = [self.table, self.sequence, self.position]
        return [self.query, self.weight, self.key, self.cache, *places, self.out]

    def judged(self) -> float:
        """Largest share of a token's selection that float64 would not select, over a few tokens."""
        worst = 0.0
        count = self.query.shape[1]
        for token in sorted({0, count // 2, count - 1}):
            seen = int(self.position[token]) + 1
            keys = self.cache[self.table[self.sequence[token]].long(), 0].reshape(-1, self.spec.dim)[:seen]
            products = self.spec.scaling * (self.query[0, token].double() @ keys.double().T)
            scores = self.weight[0, token].double() @ products.clamp_min(0)
            best = torch.topk(scores, min(self.spec.top_k, seen)).indices
            expected = torch.zeros(seen, dtype=torch.bool, device=scores.device)
            expected[best] = True
            shifts = torch.arange(PAGE_TOKENS, device=scores.device)
            found = ((self.out[token].long()[:, None] >> shifts) & 1).bool().flatten()
            wrong = int((found[:seen] != expected).sum()) + 2 * int(found[seen:].sum())
            worst = max(worst, wrong / 2 / len(best))
        return worst


def selection_cases(
    module: Module,
    steps: tuple[tuple[int, int, int], ...] = STEPS,
    rotated_bytes: int = ROTATED_BYTES,
) -> Iterator[Callable[[], Case]]:
    """What makes each case; the memory is taken when one is made."""
    words = {step.selection: step.output for step in module.model.steps if isinstance(step, SelectionStep)}
    for spec in module.model.selections:
        width = int(module.model.values[words[spec.name]].shape[-1])
        for sequences, new, context in steps:
            if context <= width * PAGE_TOKENS:
                yield partial(_case, module, spec, width, sequences, new, context, rotated_bytes)


def make_selecting(
    spec: SelectionSpec, words: int, pages: torch.Tensor, cache: torch.Tensor, new: int, context: int
) -> Selecting:
    """The last ``new`` tokens of each sequence; ``pages`` ``[B, M]`` says which pages are whose."""
    device, sequences = pages.device, pages.shape[0]
    tokens = sequences * new
    return Selecting(
        spec,
        torch.randn(1, tokens, spec.heads, spec.dim, device=device),
        torch.randn(1, tokens, spec.heads, device=device),
        torch.randn(1, tokens, spec.dim, device=device),
        cache,
        pages.int().contiguous(),
        torch.arange(sequences, device=device).repeat_interleave(new).int(),
        torch.arange(context - new, context, device=device).repeat(sequences).int(),
        torch.empty(tokens, words, dtype=torch.int32, device=device),
    )


def _case(
    module: Module,
    spec: SelectionSpec,
    words: int,
    sequences: int,
    new: int,
    context: int,
    rotated_bytes: int,
) -> Case:
    device, width = module.device, -(-context // PAGE_TOKENS)
    moved = sequences * context * spec.dim * DTYPE_BYTES[spec.dtype]
    count = max(1, min(MOST_CALLS, rotated_bytes // moved)) if new == 1 else 1
    cache = torch.empty(
        count * sequences * width,
        1,
        PAGE_TOKENS,
        spec.dim,
        dtype=getattr(torch, spec.dtype),
        device=device,
    ).normal_()
    pages = torch.randperm(count * sequences * width, device=device).reshape(count, sequences, width)
    steps = [make_selecting(spec, words, own, cache, new, context) for own in pages]
    name = f"{SELECTION_PREFIX}{spec.name}"
    calls = [module.bind(name, *step.operands(), tokens=sequences * new) for step in steps]

    def check() -> Judgement:
        found = []
        for value in (77, 78):
            steps[0].out.fill_(value)
            with side_stream(device):
                calls[0]()
            found.append(steps[0].out.clone())
        return Judgement(steps[0].judged(), torch.equal(found[0], found[1]))

    flops = 2 * sequences * new * context * spec.heads * spec.dim
    kernel = f"selection {spec.heads} x {spec.dim}, {spec.top_k} best"
    return Case(kernel, f"{sequences} x {new} at {context}", calls, check, EXACT, moved, flops, "copy", None)

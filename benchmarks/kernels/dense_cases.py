"""Dense products: of a decode step against the memory, of a prefill against torch; segments against the CPU's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kernels.cases import EXACT, ROUNDED, Case, Judgement, relative_error
from benchmarks.kernels.segments import BoundCall, SegmentRun, product_calls, step_segments
from benchmarks.support.torch_clock import side_stream
from moec.artifacts.program import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.kernels.module import Module
    from moec.artifacts.program import Operand

DECODE_TOKENS = (1, 8)
DECODE_AIM = 0.8
"""For the sum over a step."""
PREFILL_TOKENS = (512, 2048, 4096)
PREFILL_AIM, MANY_ROWS = 0.5, 1024
"""Of torch's rate, from so many rows on."""
PREFILL_COPIES = 2
"""Runs of each segment at a prefill's size."""


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of a step at one T, and how far the worst of them is from the CPU's module."""

    runs: list[SegmentRun]
    judgement: Judgement


def dense_cases(
    module: Module,
    judge: Module,
    decode: tuple[int, ...] = DECODE_TOKENS,
    prefill: tuple[int, ...] = PREFILL_TOKENS,
) -> Iterator[Callable[[], Case]]:
    """What makes each case; ``judge`` is the CPU's module of the same model, held against float64 by its tests."""
    for tokens in decode:
        segments = _segments(module, judge, tokens, step_segments(module.model))
        calls = product_calls(segments.runs)
        yield partial(_decode, segments, calls, tokens, "all products of a step", DECODE_AIM)
        for name in dict.fromkeys(call.call.function for call in calls):
            same = [call for call in calls if call.call.function == name]
            yield partial(_decode, segments, same, tokens, name, None)
        others = [call for run in segments.runs for call in run.calls if not call.products]
        yield partial(_decode, segments, others, tokens, "all else of a step's segments", None)
    names = step_segments(module.model, PREFILL_COPIES, last=False)
    for tokens in prefill:
        segments = _segments(module, judge, tokens, names)
        calls = product_calls(segments.runs)
        for name in dict.fromkeys(call.call.function for call in calls):
            same = [call for call in calls if call.call.function == name]
            yield partial(_prefill, module, segments, same, tokens, name)


def _segments(module: Module, judge: Module, tokens: int, names: list[str]) -> Segments:
    runs = [SegmentRun(module, name, tokens) for name in names]
    found = [_judge(run, SegmentRun(judge, name, tokens, share=run)) for name, run in _distinct(names, runs)]
    same = all(one.same_bits for one in found)
    return Segments(runs, Judgement(max(one.error for one in found), same))


def _distinct(names: list[str], runs: list[SegmentRun]) -> list[tuple[str, SegmentRun]]:
    return list(dict(zip(reversed(names), reversed(runs), strict=True)).items())


def _judge(run: SegmentRun, judge: SegmentRun) -> Judgement:
    """A segment's float outputs against the same segment on the CPU (where two experts tie, their order is free)."""
    judge.run()
    found: list[list[torch.Tensor]] = []
    for _ in range(2):
        run.poison()
        with side_stream(run.outputs[0].device):
            run.run()
        found.append([output.cpu().clone() for output in run.outputs])
    pairs = [
        (out, want) for out, want in zip(found[0], judge.outputs, strict=True) if want.is_floating_point()
    ]
    errors = [relative_error(out, want) for out, want in pairs]
    return Judgement(max(errors), all(map(torch.equal, *found)))


def _decode(segments: Segments, calls: list[BoundCall], tokens: int, name: str, aim: float | None) -> Case:
    """Sums over a step: one call of the case is all of ``calls``."""

    def run() -> None:
        for call in calls:
            call.run()

    moved = sum(call.product_bytes for call in calls)
    size = f"T={tokens}, {len(calls)} calls"
    bound = EXACT if tokens <= 8 else ROUNDED
    return Case(name, size, [run], lambda: segments.judgement, bound, moved, moved * tokens, "copy", aim)


def _prefill(module: Module, segments: Segments, calls: list[BoundCall], tokens: int, name: str) -> Case:
    values = sum(call.product_bytes for call in calls) // 2 // len(calls)
    flops = 2 * values * tokens
    products = [product for call in calls for product in call.products]
    run = [call.run for call in calls]
    rival = _torch_products(products[: len(calls[0].products)], tokens, module.device)
    # A matrix for each head is small for the matrix units, and so is a router: no aim for these.
    wide = all(len(product.shape) == 2 and int(product.shape[0]) >= 512 for product in products)
    aim = PREFILL_AIM if wide and tokens >= MANY_ROWS else None
    size = f"T={tokens}"
    return Case(name, size, run, lambda: segments.judgement, ROUNDED, 2 * values, flops, "torch", aim, rival)


def _torch_products(products: list[Operand], tokens: int, device: torch.device) -> Callable[[], Any]:
    """The same products by torch in 16 bits."""
    pairs = []
    for product in products:
        shape = resolve(product.shape, tokens)
        dtype = getattr(torch, product.dtype)
        weight = torch.empty(shape, dtype=dtype, device=device).normal_(0, 1 / math.sqrt(shape[-1]))
        x = torch.randn(*shape[:-2], tokens, shape[-1], device=device).to(dtype)
        pairs.append((x, weight.mT))

    def run() -> None:
        for x, weight in pairs:
            torch.matmul(x, weight)

    return run

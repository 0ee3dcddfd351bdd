"""Which hand-written kernel does what, for each kind of target."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from moec.artifacts.layout.cache import SELECTION_PREFIX
from moec.artifacts.program import APPEND, HOPPER, Beside, Workspace, cached_beside_name, capacity_name
from moec.artifacts.states import STATE_PREFIX
from moec.artifacts.steps import ExpertsStep, SegmentStep, SelectionStep
from moec.artifacts.words import ahead
from moec.artifacts.words.mailbox import SERVE, collect_name, post_name
from moec.artifacts.words.orders import FEED, ORDER
from moec.artifacts.words.sampling import SAMPLE
from moec.artifacts.words.slots import ASSIGN, CACHED, FETCH

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import tvm

    from moec.artifacts.model import ExpertBody, ExpertsLayer, ModelRecord
    from moec.artifacts.program import SegmentProgram
    from moec.compiler.kernels.cpu.pair_products import PairProducts
    from moec.compiler.kernels.linear_shape import LinearShape
    from moec.compiler.kernels.rows.product import Product
    from moec.compiler.lowering.targets import Target


@dataclass(frozen=True)
class CpuKernels:
    """The kernels of ``compiler/kernels/cpu`` for vectors of ``lanes`` float32 values."""

    lanes: int
    machine: str
    """As ``uname -m`` says it."""
    bfloat16_pairs: bool = False
    """Whether the target has AVX512-BF16."""

    @property
    def pairs(self) -> PairProducts | None:
        """What multiplies bfloat16 in pairs."""
        from moec.compiler.kernels.cpu.pair_products import AVX512_BF16

        return AVX512_BF16 if self.bfloat16_pairs else None

    def linear(self, shape: LinearShape) -> tvm.tirx.PrimFunc:
        """A product with a weight."""
        from moec.compiler.kernels.cpu.linear import linear

        return linear(
            rows=shape.rows,
            columns=shape.columns,
            dtype=shape.dtype,
            batch=shape.batch,
            bias=shape.bias,
            lanes=self.lanes,
            pairs=self.pairs,
        )

    def topk(self, entries: int, count: int, dtype: str) -> tvm.tirx.PrimFunc:
        """The largest entries of each row."""
        from moec.compiler.kernels.cpu.topk import topk

        return topk(entries=entries, count=count, dtype=dtype, lanes=self.lanes)

    def model(self, model: ModelRecord) -> Iterator[tuple[str, tvm.tirx.PrimFunc]]:
        """The kernels that the chain calls by name, under those names."""
        from moec.compiler.kernels.cpu.attention import attention
        from moec.compiler.kernels.cpu.cache_append import append_kernel
        from moec.compiler.kernels.cpu.capacity import capacity
        from moec.compiler.kernels.cpu.experts import experts
        from moec.compiler.kernels.cpu.feed import feed
        from moec.compiler.kernels.cpu.selection import selection
        from moec.compiler.kernels.cpu.serve import serve
        from moec.compiler.kernels.cpu.states import state

        for spec in model.attentions:
            yield f"attention_{spec.name}", attention(spec, lanes=self.lanes)
            if spec.cross:
                yield f"{APPEND}{spec.name}", append_kernel(spec, lanes=self.lanes)
        for chosen in model.selections:
            yield f"{SELECTION_PREFIX}{chosen.name}", selection(chosen, lanes=self.lanes)
        for name, layer in capacity_kernels(model).items():
            yield name, capacity(name, layer)
        for kept in model.states:
            yield f"{STATE_PREFIX}{kept.name}", state(kept, lanes=self.lanes)
        for body in model.bodies:
            yield f"experts_{body.name}", experts(body, lanes=self.lanes, pairs=self.pairs)
        if model.bodies:
            yield SERVE, serve(model.bodies, lanes=self.lanes, machine=self.machine)
            yield FEED, feed(machine=self.machine)

    def workspaces(self, model: ModelRecord) -> Iterator[Workspace]:
        """What kernels need beside their tensors and their threads' own workspaces."""
        from moec.compiler.kernels.cpu.latents import workspace

        for spec in model.attentions:
            fixed, each = workspace(spec)
            if fixed or each:
                yield Workspace(f"attention_{spec.name}", fixed, each)

    def beside(
        self,
        _model: ModelRecord,
        _segments: Iterable[SegmentProgram],
        _products: Mapping[str, Product],
    ) -> Iterator[tuple[Beside, dict[str, tvm.tirx.PrimFunc]]]:
        """Experts that run together with the segment in front of them: none, there is nothing to win."""
        return iter(())


@dataclass(frozen=True)
class CudaKernels:
    """The kernels of ``compiler/kernels/cuda``."""

    hopper: bool = False
    """Whether there are kernels for Hopper GPUs among them, beside those for all."""

    def model(self, model: ModelRecord) -> Iterator[tuple[str, tvm.tirx.PrimFunc]]:
        """The kernels that the chain calls by name, under those names."""
        from moec.compiler.kernels.cuda.ahead.bring import bring
        from moec.compiler.kernels.cuda.ahead.guess import check, guess
        from moec.compiler.kernels.cuda.ahead.scores import score_early, score_votes
        from moec.compiler.kernels.cuda.attention import append_kernel, attention, has_hopper
        from moec.compiler.kernels.cuda.experts.capacity import capacity
        from moec.compiler.kernels.cuda.experts.few import runs_few
        from moec.compiler.kernels.cuda.experts.kernel import experts, experts_cached, fits_hopper
        from moec.compiler.kernels.cuda.experts.step import MOST_CHOSEN
        from moec.compiler.kernels.cuda.mailbox import collect, post
        from moec.compiler.kernels.cuda.sample.kernel import MAX_VOCAB, sample
        from moec.compiler.kernels.cuda.selection import selection
        from moec.compiler.kernels.cuda.slots.assign import assign
        from moec.compiler.kernels.cuda.slots.fetch import fetch
        from moec.compiler.kernels.cuda.slots.order import order
        from moec.compiler.kernels.cuda.states import state

        for spec in model.attentions:
            yield f"attention_{spec.name}", attention(spec)
            if self.hopper and has_hopper(spec):
                yield f"attention_{spec.name}{HOPPER}", attention(spec, hopper=True)
            if spec.cross:
                yield f"{APPEND}{spec.name}", append_kernel(spec)
        for indexer in model.selections:
            yield f"{SELECTION_PREFIX}{indexer.name}", selection(indexer)
        for name, layer in capacity_kernels(model).items():
            yield name, capacity(name, layer)
        for kept in model.states:
            yield f"{STATE_PREFIX}{kept.name}", state(kept)
        for body in model.bodies:
            chosen, _ = _most_chosen(model, body)
            yield f"experts_{body.name}", experts(body, chosen)
            if self.hopper and fits_hopper(body):
                yield f"experts_{body.name}{HOPPER}", experts(body, chosen, hopper=True)
            if runs_few(body) and chosen <= MOST_CHOSEN:
                yield f"{CACHED}{body.name}", experts_cached(body)
            yield post_name(body.name), post(body)
            yield collect_name(body.name), collect(body)
        if model.bodies:
            yield ASSIGN, assign()
            yield FETCH, fetch()
            yield ORDER, order()
            yield ahead.SCORE_EARLY, score_early()
            yield ahead.SCORE_VOTES, score_votes()
            yield ahead.GUESS, guess()
            yield ahead.CHECK, check()
            yield ahead.BRING, bring()
        if model.vocab_size <= MAX_VOCAB:
            yield SAMPLE, sample(model.vocab_size)

    def workspaces(self, model: ModelRecord) -> Iterator[Workspace]:
        """What kernels need beside their tensors."""
        from moec.compiler.kernels.cuda.attention import workspace
        from moec.compiler.kernels.cuda.experts.kernel import workspace_bytes
        from moec.compiler.kernels.cuda.selection import workspace_bytes as selection_bytes

        for spec in model.attentions:
            fixed, each = workspace(spec)
            if fixed or each:
                yield Workspace(f"attention_{spec.name}", fixed, each)
        for name, words in _selection_words(model).items():
            yield Workspace(f"{SELECTION_PREFIX}{name}", selection_bytes(words), 0)
        for body in model.bodies:
            yield Workspace(f"experts_{body.name}", *workspace_bytes(body, *_most_chosen(model, body)))

    def beside(
        self, model: ModelRecord, segments: Iterable[SegmentProgram], products: Mapping[str, Product]
    ) -> Iterator[tuple[Beside, dict[str, tvm.tirx.PrimFunc]]]:
        """Experts that run together with the segment in front of them, a shared expert.

        Each has two functions: one for experts that are there, one for experts that may still be on their way.
        """
        from moec.compiler.kernels.cuda.experts.beside import (
            MOST_PRODUCTS,
            MOST_TOKENS,
            experts_beside,
            fits_beside,
        )

        bodies, programs = {body.name: body for body in model.bodies}, {each.name: each for each in segments}
        for body, segment in side_segments(model):
            found = [products.get(call.function) for call in programs[segment].calls]
            made = tuple(each for each in found if each is not None)
            top_k = _most_chosen(model, bodies[body])[0]
            if len(found) == len(made) <= MOST_PRODUCTS and fits_beside(bodies[body], top_k, made):
                name = f"experts_{body}_{segment}"
                record = Beside(name, body, segment, MOST_TOKENS)
                yield (
                    record,
                    {
                        own: experts_beside(own, bodies[body], made, cached=cached)
                        for own, cached in ((name, False), (cached_beside_name(record), True))
                    },
                )


def capacity_kernels(model: ModelRecord) -> dict[str, ExpertsLayer]:
    """Name of each kernel that drops tokens, and an MoE layer that it is for."""
    limited = [layer for layer in model.experts if layer.capacity or layer.capacity_share]
    return {capacity_name(layer): layer for layer in limited}


def _selection_words(model: ModelRecord) -> dict[str, int]:
    """Words of a token's result, for each selection."""
    steps = [step for step in model.steps if isinstance(step, SelectionStep)]
    return {step.selection: int(model.values[step.output].shape[-1]) for step in steps}


def side_segments(model: ModelRecord) -> Iterator[tuple[str, str]]:
    """Body and segment wherever a side segment is directly in front of routed experts, each pair once."""
    pairs: dict[tuple[str, str], None] = {}
    for step, following in (*pairwise(model.steps), *pairwise(model.encoder)):
        if isinstance(step, SegmentStep) and step.side and isinstance(following, ExpertsStep):
            pairs[model.experts[following.layer].body, step.function] = None
    return iter(pairs)


def _most_chosen(model: ModelRecord, body: ExpertBody) -> tuple[int, int]:
    """The largest top-k and the most experts of the layers that have ``body``."""
    layers = [layer for layer in model.experts if layer.body == body.name]
    return max(layer.top_k for layer in layers), max(layer.experts for layer in layers)


def kernels_for(target: Target) -> CpuKernels | CudaKernels:
    """The kernels of a target."""
    if target.kind == "cuda":
        return CudaKernels(hopper="sm_90" in target.architectures)
    return cpu_kernels(target)


def cpu_kernels(target: Target) -> CpuKernels:
    """The kernels of a CPU target."""
    return CpuKernels(target.lanes, target.machine, "avx512_bf16" in target.cpu_features)

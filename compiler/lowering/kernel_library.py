"""Which hand-written kernel does what, for each kind of target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.program import Workspace
from moec.artifacts.sampling import SAMPLE
from moec.artifacts.slots import ASSIGN, CACHED, FETCH

if TYPE_CHECKING:
    from collections.abc import Iterator

    import tvm

    from moec.artifacts.model import ExpertBody, ModelRecord
    from moec.compiler.lowering.passes.dispatch_linear import LinearShape
    from moec.compiler.lowering.targets import Target


@dataclass(frozen=True)
class CpuKernels:
    """The kernels of ``compiler/kernels/cpu`` for vectors of ``lanes`` float32 values."""

    lanes: int

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
        )

    def topk(self, entries: int, count: int, dtype: str) -> tvm.tirx.PrimFunc:
        """The largest entries of each row."""
        from moec.compiler.kernels.cpu.topk import topk

        return topk(entries=entries, count=count, dtype=dtype, lanes=self.lanes)

    def model(self, model: ModelRecord) -> Iterator[tuple[str, tvm.tirx.PrimFunc]]:
        """The kernels that the chain calls by name, under those names."""
        from moec.compiler.kernels.cpu.attention import attention
        from moec.compiler.kernels.cpu.experts import experts

        for spec in model.attentions:
            yield f"attention_{spec.name}", attention(spec, lanes=self.lanes)
        for body in model.bodies:
            yield f"experts_{body.name}", experts(body, lanes=self.lanes)

    def workspaces(self, _model: ModelRecord) -> Iterator[Workspace]:
        """What kernels need beside their tensors: nothing, threads have workspaces of their own."""
        return iter(())


@dataclass(frozen=True)
class CudaKernels:
    """The kernels of ``compiler/kernels/cuda``."""

    def model(self, model: ModelRecord) -> Iterator[tuple[str, tvm.tirx.PrimFunc]]:
        """The kernels that the chain calls by name, under those names."""
        from moec.compiler.kernels.cuda.attention import attention
        from moec.compiler.kernels.cuda.experts import experts, experts_cached
        from moec.compiler.kernels.cuda.experts_down_few import MOST_CHOSEN
        from moec.compiler.kernels.cuda.experts_few import runs_few
        from moec.compiler.kernels.cuda.sample.kernel import MAX_VOCAB, sample
        from moec.compiler.kernels.cuda.slots.assign import assign
        from moec.compiler.kernels.cuda.slots.fetch import fetch

        for spec in model.attentions:
            yield f"attention_{spec.name}", attention(spec)
        for body in model.bodies:
            yield f"experts_{body.name}", experts(body, _most_chosen(model, body)[0])
        if model.bodies:
            yield ASSIGN, assign()
            yield FETCH, fetch()
        for body in filter(runs_few, model.bodies):
            if _most_chosen(model, body)[0] <= MOST_CHOSEN:
                yield f"{CACHED}{body.name}", experts_cached(body)
        if model.vocab_size <= MAX_VOCAB:
            yield SAMPLE, sample(model.vocab_size)

    def workspaces(self, model: ModelRecord) -> Iterator[Workspace]:
        """What kernels need beside their tensors."""
        from moec.compiler.kernels.cuda.attention import workspace
        from moec.compiler.kernels.cuda.experts import workspace_bytes

        for spec in model.attentions:
            fixed, each = workspace(spec)
            if fixed or each:
                yield Workspace(f"attention_{spec.name}", fixed, each)
        for body in model.bodies:
            yield Workspace(f"experts_{body.name}", *workspace_bytes(body, *_most_chosen(model, body)))


def _most_chosen(model: ModelRecord, body: ExpertBody) -> tuple[int, int]:
    """The largest top-k and the most experts of the layers that have ``body``."""
    layers = [layer for layer in model.experts if layer.body == body.name]
    return max(layer.top_k for layer in layers), max(layer.experts for layer in layers)


def kernels_for(target: Target) -> CpuKernels | CudaKernels:
    """The kernels of a target."""
    return CudaKernels() if target.kind == "cuda" else CpuKernels(target.lanes)

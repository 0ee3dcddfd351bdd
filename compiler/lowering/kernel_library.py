"""Which hand-written kernel does what, for each kind of target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.program import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

    import tvm

    from moec.artifacts.model import ModelRecord
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

    def linear(self, shape: LinearShape) -> tvm.tirx.PrimFunc:
        """A product with a weight."""
        from moec.compiler.kernels.cuda.linear import linear

        return linear(
            rows=shape.rows, columns=shape.columns, dtype=shape.dtype, batch=shape.batch, bias=shape.bias
        )

    def topk(self, entries: int, count: int, dtype: str) -> tvm.tirx.PrimFunc:
        """The largest entries of each row."""
        from moec.compiler.kernels.cuda.topk import topk

        return topk(entries=entries, count=count, dtype=dtype)

    def model(self, model: ModelRecord) -> Iterator[tuple[str, tvm.tirx.PrimFunc]]:
        """The kernels that the chain calls by name, under those names."""
        from moec.compiler.kernels.cuda.attention import attention
        from moec.compiler.kernels.cuda.experts import experts

        for spec in model.attentions:
            yield f"attention_{spec.name}", attention(spec)
        for body in model.bodies:
            yield f"experts_{body.name}", experts(body)

    def workspaces(self, model: ModelRecord) -> Iterator[Workspace]:
        """What kernels need beside their tensors."""
        from moec.compiler.kernels.cuda.experts import workspace_bytes

        for body in model.bodies:
            chosen = max(layer.top_k for layer in model.experts if layer.body == body.name)
            yield Workspace(f"experts_{body.name}", *workspace_bytes(body, chosen))


def kernels_for(target: Target) -> CpuKernels | CudaKernels:
    """The kernels of a target."""
    return CudaKernels() if target.kind == "cuda" else CpuKernels(target.lanes)

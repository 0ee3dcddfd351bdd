"""A segment's graph run by torch, with every product of a weight noted down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx

from moec.compiler.calibration.probes import NONE, mapped
from moec.compiler.calibration.routing import gaps
from moec.compiler.partition.storage import EMBEDDING
from moec.compiler.tracing.markers import LINEAR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moec.artifacts.ids import LayerId, TensorName
    from moec.artifacts.model import ExpertsLayer
    from moec.artifacts.steps import SegmentStep
    from moec.compiler.calibration.probes import Gradients
    from moec.compiler.partition.records import SegmentGraph


TOP_K = "aten.topk.default"


@dataclass(frozen=True)
class ExpertMatrix:
    """Names a matrix of a routed expert."""

    layer: LayerId
    expert: int
    part: str
    """``gate``, ``up`` or ``down``."""


@dataclass(frozen=True, eq=False)
class Product:
    """A weight ``[N, K]`` and what it met: n rows of activations, or of a table the ids that were looked up."""

    name: TensorName | ExpertMatrix
    weight: torch.Tensor
    x: torch.Tensor
    """``[n, K]`` float32, or int64 ``[n]`` where the weight is a table (then a result has K entries)."""
    gradient: torch.Tensor | None
    """``[n, N]``, of a table ``[n, K]``: of the likelihood with respect to the result; None where only what flows is
    looked at."""
    routing: torch.Tensor | None = None
    """The same of routers' gaps (see `moec.compiler.calibration.routing`); None where no router comes after it."""


class Observer(Protocol):
    """Looks at every product of the chain, in whatever order; those of a weight that several steps read are several."""

    def __call__(self, product: Product) -> None:
        """Look at a product. Its tensors belong to the caller."""
        ...


@dataclass(frozen=True, eq=False)
class Noted:
    """A product whose gradient is not known yet."""

    name: TensorName
    weight: torch.Tensor
    x: torch.Tensor
    result: torch.Tensor

    def product(self, gradients: Gradients = NONE) -> Product:
        """With the gradients of its result."""
        x = self.x.detach()
        rows = x.reshape(-1) if x.dtype == torch.int64 else x.reshape(-1, x.shape[-1])
        own = mapped(lambda found: found.reshape(-1, found.shape[-1]), gradients)
        return Product(self.name, self.weight, rows, *own)


class SegmentRun(fx.Interpreter):
    """Runs a segment's graph in float32 and keeps its products with whole matrices, and its lookups, in ``noted``.

    ``gaps`` are those of a router with so many experts and choices, where the segment has one.
    """

    def __init__(self, segment: SegmentGraph, step: SegmentStep, router: ExpertsLayer | None = None) -> None:
        super().__init__(segment.graph_module)
        placeholders = [node for node in segment.graph_module.graph.nodes if node.op == "placeholder"]
        weights = placeholders[len(step.inputs) :]
        self._names: dict[fx.Node, TensorName] = dict(zip(weights, step.weights, strict=True))
        self._router = router
        self.noted: list[Noted] = []
        self.gaps: torch.Tensor | None = None

    def outputs(
        self,
        step: SegmentStep,
        values: Mapping[Any, torch.Tensor],
        weights: Mapping[TensorName, torch.Tensor],
    ) -> Sequence[torch.Tensor]:
        """The step's outputs, in order."""
        found: Sequence[torch.Tensor] = self.run(
            *(values[name].contiguous() for name in step.inputs), *(weights[name] for name in step.weights)
        )
        return found

    def run_node(self, n: fx.Node) -> Any:
        """Products with weights and lookups by formulas that have gradients, all else as it is."""
        target = str(n.target)
        if target == LINEAR:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            return self._linear(n, *arguments)
        if target == EMBEDDING and n.args[0] in self._names:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            return self._embedding(n, *arguments)
        if target == TOP_K and self._router is not None:
            (scores, count, *_), _ = self.fetch_args_kwargs_from_env(n)
            if (scores.shape[-1], count) == (self._router.experts, self._router.top_k):
                self.gaps = gaps(scores, count)
        return super().run_node(n)

    def _linear(
        self, node: fx.Node, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        result = torch.matmul(x, weight.float().transpose(-1, -2))
        self._note(node.args[1], weight, x, result)
        return result if bias is None else result + bias

    def _embedding(self, node: fx.Node, table: torch.Tensor, ids: torch.Tensor, *_: Any) -> torch.Tensor:
        result = table[ids].float()
        if torch.is_grad_enabled():
            result.requires_grad_()
        self._note(node.args[0], table, ids, result)
        return result

    def _note(self, node: Any, weight: torch.Tensor, x: torch.Tensor, result: torch.Tensor) -> None:
        if node in self._names and weight.ndim == 2:
            self.noted.append(Noted(self._names[node], weight, x, result))

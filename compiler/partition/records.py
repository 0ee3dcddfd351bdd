"""What ``partition`` gives to ``lower`` and ``pack``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import fx

    from moec.artifacts.model import ModelRecord
    from moec.artifacts.packing import PackingRecord


@dataclass(frozen=True)
class SegmentGraph:
    """One distinct dense segment."""

    name: str
    graph_module: fx.GraphModule
    """Placeholders are inputs, then weights, in the order of its ``FunctionSpec``; it returns a tuple.

    Every node has ``meta["val"]``, a fake tensor. The only symbol in shapes is ``symbol``, read by
    ``sym_size.int`` from an input.
    """
    symbol: str
    """T's name in the shapes."""


@dataclass(frozen=True)
class PartitionedModel:
    """A model as a chain of steps over distinct segments."""

    model: ModelRecord
    functions: dict[str, SegmentGraph]
    packing: PackingRecord
    constants: dict[str, torch.Tensor]
    """Values behind the sources ``constant:<name>`` of ``packing.dense``, on the CPU."""

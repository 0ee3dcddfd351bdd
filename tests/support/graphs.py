"""Graphs of small functions, and traces and chains of tiny models that several tests look at."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moec.artifacts.model import DType, GenerationDefaults
from moec.compiler.partition import PartitionedModel, partition
from moec.compiler.trace import TracedModel, trace
from tests.support.tiny_models import TINY

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

H = 8
MAX_CONTEXT = 128
GENERATION = GenerationDefaults(None, (), None, False, 1.0, 0, 1.0, 1.0)


@cache
def traced(name: str, dtype: DType = "float32") -> TracedModel:
    """The trace of a tiny model, made once; nobody changes it."""
    return trace(TINY[name]().to_dict(), dtype=dtype, max_context=MAX_CONTEXT)


@cache
def parts(name: str, dtype: DType = "float32") -> PartitionedModel:
    """The chain of a tiny model, made once; nobody changes it."""
    return partition(traced(name, dtype), generation=GENERATION, config_sha256="0" * 64)


def record(function: Callable[..., Any], *weights: tuple[int, ...]) -> tuple[fx.Graph, str, list[fx.Node]]:
    """The graph of ``function(weights..., x [1, T, H])``, T's name, and the weights' placeholders."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context: Any = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DUCK, DimDynamic.STATIC]
    )
    with mode:
        fakes = [torch.empty(shape) for shape in weights]
    x = mode.from_tensor(torch.zeros(1, 37, H), symbolic_context=context)
    with mode:
        graph = make_fx(function)(*fakes, x).graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return graph, str(x.shape[1]), inputs[:-1]

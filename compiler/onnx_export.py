"""Every distinct dense segment and expert as an ONNX file: a window on the graphs, e.g. with Netron.

Weights are inputs of the graphs, after the activations, so that the files are small. The step's tokens are the
dynamic dimension ``T``.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from moec.artifacts.layout.experts import layout
from moec.artifacts.model import ExpertBody, FunctionSpec, TensorSpec
from moec.compiler.activation import activate
from moec.compiler.tracing.markers import LINEAR
from moec.errors import MissingDependencyError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from moec.compiler.partition import PartitionedModel

EXAMPLE_TOKENS = 7
"""Tokens of the example step; any count that is no other extent of a graph."""


def export_onnx(partitioned: PartitionedModel, directory: Path) -> tuple[Path, ...]:
    """Write ``segment_<i>.onnx`` and ``expert_<body>.onnx`` files.

    Args:
        partitioned: the segments, and the record that says what their inputs and the experts are.
        directory: made where it does not exist.

    Returns:
        The files, segments first.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
        OutputError: the folder cannot be written.
    """
    _require_packages()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        segments = [
            _export(
                _plain(partitioned.functions[spec.name].graph_module),
                _segment_inputs(spec),
                directory / f"{spec.name}.onnx",
            )
            for spec in partitioned.model.functions
        ]
        experts = [
            _export(ExpertModule(body), expert_inputs(body), directory / f"expert_{body.name}.onnx")
            for body in partitioned.model.bodies
        ]
    except OSError as error:
        raise OutputError(
            f"Cannot write ONNX files to {directory}.",
            f"{error}.",
            "Give --onnx a folder that can be written.",
        ) from error
    return (*segments, *experts)


class ExpertModule(torch.nn.Module):
    """One expert of ``body`` as torch operations: ``forward(x [T, H], *parts) -> [T, H]``.

    The parts come in the order of ``artifacts.layout.experts``.
    """

    def __init__(self, body: ExpertBody) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        """All in float32, as the kernels do it: parts of a narrower type are cast first."""
        names = [part.name for part in layout(self.body).parts]
        given = {name: part.float() for name, part in zip(names, parts, strict=True)}
        middle: dict[str, torch.Tensor] = {
            name: torch.nn.functional.linear(x, given[name], given.get(f"{name}_bias"))
            for name in ("gate", "up")
            if name in given
        }
        return torch.nn.functional.linear(
            activate(self.body.activation, middle), given["down"], given.get("down_bias")
        )


def expert_inputs(body: ExpertBody) -> list[tuple[str, TensorSpec]]:
    """Names and shapes of an expert graph's inputs."""
    parts = [(part.name, TensorSpec(body.dtype, part.shape)) for part in layout(body).parts]
    return [("x", TensorSpec("float32", ("T", body.hidden))), *parts]


def _segment_inputs(spec: FunctionSpec) -> list[tuple[str, TensorSpec]]:
    named = [(f"x{i}", value) for i, value in enumerate(spec.inputs)]
    return [*named, *((f"w{i}", value) for i, value in enumerate(spec.weights))]


def _plain(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which weight products are ordinary operators, which an ONNX reader knows."""
    copy = fx.GraphModule(graph_module, fx.Graph())
    values: dict[fx.Node, Any] = {}
    for node in graph_module.graph.nodes:
        if str(node.target) == LINEAR:
            x, weight, bias = [*node.args, None][:3]
            values[node] = copy.graph.call_function(_linear, (values[x], values[weight], values.get(bias)))
        else:
            values[node] = copy.graph.node_copy(node, values.__getitem__)
    copy.recompile()
    return copy


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = torch.matmul(x, weight.float().transpose(-1, -2))
    return product if bias is None else product + bias


def _export(module: torch.nn.Module, inputs: Sequence[tuple[str, TensorSpec]], path: Path) -> Path:
    tokens = Dim("T", min=1)
    dynamic = tuple(
        {axis: tokens for axis, extent in enumerate(spec.shape) if extent == "T"} or None
        for _, spec in inputs
    )
    if isinstance(module, ExpertModule):
        dynamic = (dynamic[0], dynamic[1:])  # type: ignore[assignment]
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        arguments = tuple(_example(spec) for _, spec in inputs)
        program = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
        names = [name for name, _ in inputs]
        exported = torch.onnx.export(program, dynamo=True, input_names=names, verbose=False)
    assert exported is not None
    graph = exported.model.graph
    for value, (_, spec) in zip(graph.inputs, inputs, strict=True):
        value.shape = _onnx_shape(spec)
    for number, value in enumerate(graph.outputs):
        value.name = f"y{number}"
    exported.save(str(path))
    return path


def _onnx_shape(spec: TensorSpec) -> Any:
    """``spec``'s shape with the name ``T`` where torch has a generated one."""
    import onnx_ir

    return onnx_ir.Shape(spec.shape)


def _example(spec: TensorSpec) -> torch.Tensor:
    shape = [EXAMPLE_TOKENS if extent == "T" else int(extent) for extent in spec.shape]
    assert prod(shape) >= 0
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter narrates; its errors are raised all the same."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "Writing ONNX files needs the packages onnx and onnxscript.",
            str(error),
            "pip install 'moec[compile]'",
        ) from error

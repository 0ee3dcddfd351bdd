"""fx segment to Relax function: TVM's importer, with our converters where it is wrong or lacks an operator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import tvm
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from moec.compiler.lowering.converters import CONVERTERS
from moec.errors import CompileError

if TYPE_CHECKING:
    import torch.fx

STEP_TOKENS = "T"
"""Name of the one symbolic dimension of a segment."""

IGNORED_OPERATORS = ("aten._assert_tensor_metadata.default", "aten._assert_scalar.default")
"""Operators that only check what tracing has already fixed."""


def import_segment(name: str, graph_module: torch.fx.GraphModule, class_name: str) -> relax.Function:
    """Import one segment; its parameters are the placeholders, its result always a tuple.

    Args:
        name: the segment's name in the module, e.g. ``segment_3``.
        graph_module: core ATen operators and ``moec.linear``; at most one symbolic dimension.
        class_name: the model's class in transformers, for the error message.

    Raises:
        CompileError: an operator has no converter; the message names model, segment and operator.
    """
    graph = _without_ignored(graph_module.graph)
    try:
        module = from_exported_program(
            _as_exported_program(graph_module, graph),
            run_ep_decomposition=False,
            custom_convert_map=dict(CONVERTERS),
            no_bind_return_tuple=False,
        )
    except (AssertionError, NotImplementedError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CompileError(
            f"lower failed on {name} of {class_name} (after trace and partition)",
            str(error),
            "Report it with the model's name: this operator needs a converter in compiler/lowering/converters.py.",
        ) from error
    return _with_step_tokens(module["main"]).with_attr("global_symbol", name)


def _without_ignored(graph: torch.fx.Graph) -> torch.fx.Graph:
    copy = type(graph)()
    mapping: dict[Any, Any] = {}
    ignored = [node for node in graph.nodes if str(node.target) in IGNORED_OPERATORS]
    for node in graph.nodes:
        if node not in ignored:
            mapping[node] = copy.node_copy(node, lambda used: mapping[used])
    return copy


def _as_exported_program(graph_module: torch.fx.GraphModule, graph: torch.fx.Graph) -> Any:
    """What the importer reads of an ExportedProgram: every placeholder is a user input, nothing is bound."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in graph.nodes if node.op == "output")
    signature = SimpleNamespace(
        input_specs=[
            InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), node.target) for node in placeholders
        ],
        output_specs=[
            OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(value.name), None) for value in output.args[0]
        ],
    )
    return SimpleNamespace(
        graph=graph,
        graph_module=graph_module,
        graph_signature=signature,
        state_dict={},
        constants={},
        tensor_constants={},
        named_buffers=list,
        named_parameters=list,
    )


def _with_step_tokens(function: relax.Function) -> relax.Function:
    """Rename the tracer's symbol to ``T``, so that the text of a segment does not depend on tracing order."""
    symbols = {
        dimension.name
        for parameter in function.params
        for dimension in parameter.ty.shape
        if isinstance(dimension, tvm.tirx.Var)
    }
    assert len(symbols) <= 1, f"a segment has one symbolic dimension, not {sorted(symbols)}"
    tokens = tvm.tirx.Var(STEP_TOKENS, "int64")
    return function.bind_symbolic_vars(dict.fromkeys(symbols, tokens)) if symbols else function

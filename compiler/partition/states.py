"""What the markers of states say: their specs and their operands."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from moec.artifacts.states import ConvolutionSpec, Decay, RecurrenceSpec, StateSpec
from moec.compiler.partition.nodes import marker_arguments
from moec.compiler.tracing.state_markers import CONVOLUTION

if TYPE_CHECKING:
    from torch import fx

INPUTS = ("x", "query", "key", "value", "decay", "beta")
"""Arguments of either marker that a step reads, in the order of its kernel's."""
WEIGHTS = ("weight", "bias", "rates")


def state_spec(node: fx.Node) -> StateSpec:
    """The state that a marker advances, without a name."""
    given = marker_arguments(node)
    if str(node.target) == CONVOLUTION:
        width, channels = (int(size) for size in given["weight"].meta["val"].shape)
        return ConvolutionSpec("convolution", "", channels, width, given["bias"] is not None)
    key_heads, key_dim = (int(size) for size in given["key"].meta["val"].shape[2:])
    value_heads, value_dim = (int(size) for size in given["value"].meta["val"].shape[2:])
    return RecurrenceSpec(
        kind="recurrence",
        name="",
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        decay=cast("Decay", given["kind"]),
        delta=given["beta"] is not None,
    )


def state_operands(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The inputs and the weights of a marker, in the order of its kernel's arguments."""
    given = marker_arguments(node)
    inputs, weights = ([given.get(name) for name in names] for names in (INPUTS, WEIGHTS))
    return [item for item in inputs if item is not None], [item for item in weights if item is not None]

"""Last pass: the steps of the chain, and the records that say what flows between them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moec.artifacts.ids import LayerId, TensorName, ValueId
from moec.artifacts.model import AttentionSpec, DType, ExpertBody, ExpertsLayer, SelectionSpec, TensorSpec
from moec.artifacts.steps import (
    AppendStep,
    AttentionStep,
    CapacityStep,
    ExpertsStep,
    LatentWeights,
    SegmentStep,
    SelectionStep,
    StateStep,
    Step,
)
from moec.compiler.partition.attentions import attention_spec, selection_spec
from moec.compiler.partition.experts import expert_body, expert_source
from moec.compiler.partition.nodes import marker_arguments, tensor_spec
from moec.compiler.partition.segments import Functions, build_segment
from moec.compiler.partition.stages import Group, Staging, stage_users
from moec.compiler.partition.states import state_operands, state_spec
from moec.compiler.tracing.markers import ATTENTION, CAPACITY, MATRICES, SELECTION
from moec.compiler.tracing.state_markers import STATES
from moec.errors import CompileError

if TYPE_CHECKING:
    from torch import fx

    from moec.artifacts.packing import DenseTensor, ExpertSource
    from moec.artifacts.states import StateSpec
    from moec.compiler.tracing.experts import ExpertsFacts


@dataclass(frozen=True)
class ChainInputs:
    """The placeholders that a chain begins with, ``[1, T]`` each."""

    tokens: fx.Node
    positions: fx.Node
    symbol: str
    """T's name in the graph."""


@dataclass(frozen=True)
class LaidOut:
    """The steps of one chain; none from ``last_step`` on is a marker's."""

    steps: tuple[Step, ...]
    last_step: int


@dataclass
class Chain:
    """Chains in the making, and the records that they share."""

    dtype: DType
    """Of cached keys and values."""
    dense: dict[fx.Node, DenseTensor]
    loose: set[fx.Node]
    facts: dict[str, ExpertsFacts]
    caches: dict[fx.Node, LayerId]
    """The attention layer of each attention marker."""
    functions: Functions
    values: dict[ValueId, TensorSpec] = field(default_factory=dict)
    attentions: dict[AttentionSpec, AttentionSpec] = field(default_factory=dict)
    selections: dict[SelectionSpec, SelectionSpec] = field(default_factory=dict)
    states: dict[StateSpec, StateSpec] = field(default_factory=dict)
    bodies: dict[ExpertBody, ExpertBody] = field(default_factory=dict)
    experts: list[ExpertsLayer] = field(default_factory=list)
    sources: list[ExpertSource] = field(default_factory=list)
    weights: dict[TensorName, DenseTensor] = field(default_factory=dict)
    """Those that a step uses, in the order of first use."""
    _steps: list[Step] = field(default_factory=list)
    _symbol: str = ""
    _ids: dict[fx.Node, ValueId] = field(default_factory=dict)
    _selection_layers: int = 0
    _state_layers: int = 0
    _capacities: dict[LayerId, tuple[int, float]] = field(default_factory=dict)
    """Of MoE layers that drop tokens: tokens of a call, or a share of them."""

    def build(self, staging: Staging, inputs: ChainInputs, logits: fx.Node | None) -> LaidOut:
        """Lay out every stage: its main segment, its side segment, its markers.

        Args:
            staging: of the nodes that this chain computes.
            inputs: its tokens.
            logits: what it is for; ``None``: an encoder, whose last markers are cross-attentions to append for.
        """
        self._steps, self._symbol, self._ids = [], inputs.symbol, {}
        self._name(inputs.tokens, "tokens")
        self._name(inputs.positions, "positions")
        wanted = self._wanted(staging, logits)
        groups = iter(staging.groups)
        group = next(groups, None)
        last_step = 0
        for stage in range(max(g.stage for g in staging.groups) + 1):
            while group is not None and group.stage == stage:
                self._segment(group, wanted, logits)
                group = next(groups, None)
            for marker in staging.markers.get(stage, ()):
                self._marker(marker, encoding=logits is None)
                last_step = len(self._steps)
        if logits is not None and logits not in self._ids:
            raise CompileError(
                "The logits come straight from a marker or an input, and no segment makes them."
            )
        return LaidOut(tuple(self._steps), last_step)

    def _wanted(self, staging: Staging, logits: fx.Node | None) -> set[fx.Node]:
        """Nodes that something outside of their own group uses."""
        users = stage_users(staging)
        wanted = {node for node, groups in users.items() if len(groups) > 1}
        for markers in staging.markers.values():
            wanted |= {item for marker in markers for item in marker.all_input_nodes}
        return wanted if logits is None else wanted | {logits}

    def _segment(self, group: Group, wanted: set[fx.Node], logits: fx.Node | None) -> None:
        outputs = tuple(node for node in group.nodes if node in wanted)
        segment = build_segment(group.nodes, outputs, self._is_weight, self.loose, self._symbol)
        name = self.functions.add(segment, self._symbol)
        step = SegmentStep(
            kind="segment",
            function=name,
            inputs=tuple(self._value(node) for node in segment.inputs),
            weights=tuple(self._weight(node) for node in segment.weights),
            outputs=tuple(self._name(node, "logits" if node is logits else None) for node in outputs),
            side=group.side,
        )
        self._steps.append(step)

    def _marker(self, node: fx.Node, *, encoding: bool) -> None:
        target = str(node.target)
        if target == SELECTION:
            self._selection(node)
        elif target in STATES:
            self._state(node)
        elif target == CAPACITY:
            self._capacity(node)
        elif target != ATTENTION:
            self._experts(node)
        elif encoding and marker_arguments(node)["cross"]:
            self._append(node)
        else:
            self._attention(node)

    def _spec(self, node: fx.Node) -> AttentionSpec:
        unnamed = attention_spec(node, self.dtype)
        return self.attentions.setdefault(unnamed, replace(unnamed, name=f"attention_{len(self.attentions)}"))

    def _attention(self, node: fx.Node) -> None:
        given = marker_arguments(node)
        spec = self._spec(node)
        key, value = (None, None) if spec.cross else (given["key"], given["value"])
        self._steps.append(
            AttentionStep(
                kind="attention",
                attention=spec.name,
                layer=self.caches[node],
                query=self._value(given["query"]),
                key=None if key is None else self._value(key),
                value=None if value is None else self._value(value),
                sinks=self._optional_weight(given["sinks"]),
                weights=self._latent_weights(given),
                output=self._name(node),
                selection=None if given["selection"] is None else self._value(given["selection"]),
                bias=self._optional_weight(given["bias"]),
            )
        )

    def _append(self, node: fx.Node) -> None:
        given = marker_arguments(node)
        self._steps.append(
            AppendStep(
                kind="append",
                attention=self._spec(node).name,
                layer=self.caches[node],
                key=self._value(given["key"]),
                value=self._value(given["value"]),
            )
        )

    def _capacity(self, node: fx.Node) -> None:
        index, weight, tokens, share = marker_arguments(node).values()
        layer = LayerId(len(self.experts))
        self._capacities[layer] = int(tokens), float(share)
        self._steps.append(
            CapacityStep(
                kind="capacity",
                layer=layer,
                index=self._value(index),
                weight=self._value(weight),
                output=self._name(node),
            )
        )

    def _optional_weight(self, node: fx.Node | None) -> TensorName | None:
        return None if node is None else self._weight(node)

    def _selection(self, node: fx.Node) -> None:
        given = marker_arguments(node)
        unnamed = selection_spec(node, self.dtype)
        named = replace(unnamed, name=f"selection_{len(self.selections)}")
        spec = self.selections.setdefault(unnamed, named)
        self._steps.append(
            SelectionStep(
                kind="selection",
                selection=spec.name,
                layer=LayerId(self._selection_layers),
                query=self._value(given["query"]),
                weight=self._value(given["weight"]),
                key=self._value(given["key"]),
                output=self._name(node),
            )
        )
        self._selection_layers += 1

    def _state(self, node: fx.Node) -> None:
        unnamed = state_spec(node)
        named = replace(unnamed, name=f"{unnamed.kind}_{len(self.states)}")
        spec = self.states.setdefault(unnamed, named)
        inputs, weights = state_operands(node)
        self._steps.append(
            StateStep(
                kind="state",
                state=spec.name,
                layer=LayerId(self._state_layers),
                inputs=tuple(map(self._value, inputs)),
                weights=tuple(map(self._weight, weights)),
                output=self._name(node),
            )
        )
        self._state_layers += 1

    def _latent_weights(self, given: dict[str, Any]) -> LatentWeights | None:
        matrices = [given[name] for name in MATRICES]
        return None if matrices[0] is None else LatentWeights(*map(self._weight, matrices))

    def _experts(self, node: fx.Node) -> None:
        hidden, index, weight, module = marker_arguments(node).values()
        facts = self.facts[module]
        layer = LayerId(len(self.experts))
        body = self._body(facts)
        top_k = int(index.meta["val"].shape[1])
        capacity = self._capacities.get(layer, (0, 0.0))
        self.experts.append(ExpertsLayer(layer, module, body.name, facts.experts, top_k, *capacity))
        self.sources.append(expert_source(layer, facts))
        self._steps.append(
            ExpertsStep(
                kind="experts",
                layer=layer,
                hidden=self._value(hidden),
                index=self._value(index),
                weight=self._value(weight),
                output=self._name(node),
            )
        )

    def _body(self, facts: ExpertsFacts) -> ExpertBody:
        unnamed = expert_body(facts)
        return self.bodies.setdefault(unnamed, replace(unnamed, name=f"body_{len(self.bodies)}"))

    def _is_weight(self, node: fx.Node) -> bool:
        return node in self.dense

    def _weight(self, node: fx.Node) -> TensorName:
        if node not in self.dense:
            raise CompileError(f"{node.name} is passed as a weight, but it depends on activations.")
        dense = self.dense[node]
        self.weights.setdefault(dense.name, dense)
        return dense.name

    def _value(self, node: fx.Node) -> ValueId:
        if node not in self._ids:
            raise CompileError(f"{node.name} ({node.target}) is used before any step makes it.")
        return self._ids[node]

    def _name(self, node: fx.Node, name: str | None = None) -> ValueId:
        value = ValueId(name or f"v{len(self.values)}")
        self._ids[node] = value
        self.values[value] = tensor_spec(node, self._symbol)
        return value

"""The chain on calibration tokens: forward, then back, holding the weights of one step at a time.

All sequences lie one after the other along T, as in any step of the runtime. What flows between steps is kept in files;
a step is computed once forward, and once more on the way back. Memory is that of the largest step's weights (of one
expert, where it is experts), its values, and a chunk of logits.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from moec.artifacts.layout.chain import CHAIN_INPUTS, CHAIN_OUTPUT, step_values
from moec.artifacts.steps import (
    AttentionStep,
    CapacityStep,
    ExpertsStep,
    SegmentStep,
    SelectionStep,
    StateStep,
)
from moec.compiler.calibration.attention import attend, expand_latents, select_positions
from moec.compiler.calibration.experts import run_experts, run_experts_back
from moec.compiler.calibration.probes import NONE, back, plus
from moec.compiler.calibration.products import SegmentRun
from moec.compiler.calibration.routing import gap_seeds, swap_cost
from moec.compiler.calibration.states import advance_all
from moec.compiler.kernels.reference import keep_within_capacity

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from moec.artifacts.ids import TensorName, ValueId
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.steps import Step
    from moec.compiler.calibration.probes import Gradients
    from moec.compiler.calibration.products import Noted, Observer
    from moec.compiler.calibration.values import ValueFiles
    from moec.compiler.calibration.weights import CheckpointWeights
    from moec.compiler.partition import PartitionedModel

LOGITS_BYTES = 256 << 20
"""Most bytes of logits at once."""
SEED = 0


def why_not(model: ModelRecord) -> str | None:
    """What of a model `CalibrationRun` cannot run; None where it runs all of it."""
    if model.encoder:
        return "it has an encoder"
    if any(attention.bias_reach or not attention.causal for attention in model.attentions):
        return "its attention is not only causal"
    last = (step for step in model.steps[model.last_step :] if not isinstance(step, SegmentStep))
    other = next(last, None)
    return None if other is None else f"it ends in a step of the kind {other.kind}"


class CalibrationRun:
    """One pass forward over some sequences, and one back.

    Args:
        parts: the model, unquantized; `why_not` has nothing to say.
        weights: its weights.
        sequences: token ids, each at least two.
        values: where what flows is kept.
    """

    def __init__(
        self,
        parts: PartitionedModel,
        weights: CheckpointWeights,
        sequences: Sequence[Sequence[int]],
        values: ValueFiles,
    ) -> None:
        self._parts, self._weights, self._values = parts, weights, values
        self._model = parts.model
        self._attentions = {spec.name: spec for spec in self._model.attentions}
        self._selections = {spec.name: spec for spec in self._model.selections}
        self._states = {spec.name: spec for spec in self._model.states}
        self._bodies = {body.name: body for body in self._model.bodies}
        self._routers = {
            step.index: self._model.experts[step.layer]
            for step in self._model.steps
            if isinstance(step, ExpertsStep)
        }
        self._swap_costs: dict[ValueId, float] = {}
        starts = [0]
        for ids in sequences:
            starts.append(starts[-1] + len(ids))
        self._spans = tuple(pairwise(starts))
        self.tokens = starts[-1]
        values[CHAIN_INPUTS[0]] = torch.tensor([[token for ids in sequences for token in ids]])
        values[CHAIN_INPUTS[1]] = torch.tensor(
            [[position for ids in sequences for position in range(len(ids))]]
        )

    @torch.no_grad()
    def forward(self, observe: Observer | None = None, keep: Collection[ValueId] | None = None) -> None:
        """Run all steps but the last ones, which make logits.

        Args:
            observe: sees products without gradients.
            keep: what shall be there afterwards; all else is dropped when no step is left that reads it. None: all
                is kept, which ``backward`` needs.
        """
        steps = self._model.steps[: self._model.last_step]
        readers = Counter(name for step in steps for name in step_values(step)[0])
        for step in steps:
            inputs = {name: self._values[name] for name in step_values(step)[0]}
            outputs = self._outputs(step, inputs, observe)
            for name, value in outputs.items():
                self._values[name] = value
            readers.subtract(inputs.keys())
            if keep is not None:
                for name in (*inputs, *outputs):
                    if not readers[name] and name not in keep:
                        del self._values[name]

    def chosen(self) -> tuple[torch.Tensor, ...]:
        """After ``forward``: the experts that each token chose, ``[T, K]`` for each MoE layer."""
        steps = [step for step in self._model.steps if isinstance(step, ExpertsStep)]
        return tuple(self._values[step.index] for step in sorted(steps, key=lambda step: step.layer))

    def backward(self, observe: Observer) -> None:
        """Show ``observe`` every product with the gradients of a drawn continuation's log-likelihood, and of routing.

        After each token one is drawn from what the model itself says comes next. The mean of the gradients' outer
        products over such draws is the Fisher information, the second derivative of the divergence from the model. That
        a router chooses another expert is not in it: `moec.compiler.calibration.routing` has what goes back for that.
        """
        gradients = self._last_steps(observe)
        for step in reversed(self._model.steps[: self._model.last_step]):
            outputs = {name: gradients.pop(name, NONE) for name in step_values(step)[1]}
            if isinstance(step, ExpertsStep):
                inputs = self._experts_back(step, outputs, observe)
            else:
                inputs = self._step_back(step, outputs, observe)
            for name, found in inputs.items():
                gradients[name] = plus(gradients.get(name, NONE), found)

    def _last_steps(self, observe: Observer) -> dict[ValueId, Gradients]:
        """Logits, draws, and the way back to what the last steps read, a chunk of rows after the other."""
        steps = [step for step in self._model.steps[self._model.last_step :] if isinstance(step, SegmentStep)]
        loaded = {name: self._weights.dense(name) for step in steps for name in step.weights}
        names = [name for step in steps for name in step.inputs if name in self._values]
        whole = {
            name: torch.zeros(self._values[name].shape)
            for name in names
            if self._values[name].is_floating_point()
        }
        draw = torch.Generator().manual_seed(SEED)
        rows = max(1, LOGITS_BYTES // (4 * self._model.vocab_size))
        for begin in range(0, self.tokens, rows):
            chosen = slice(begin, min(begin + rows, self.tokens))
            values = {name: self._rows(name, self._values[name], chosen).clone() for name in names}
            leaves = {name: values[name].requires_grad_() for name in whole}
            with torch.enable_grad():
                noted: list[Noted] = []
                for step in steps:
                    run = SegmentRun(self._parts.functions[step.function], step)
                    values.update(zip(step.outputs, run.outputs(step, values, loaded), strict=True))
                    noted += run.noted
                likelihood = torch.log_softmax(values[CHAIN_OUTPUT][0], -1)
                drawn = torch.multinomial(likelihood.detach().exp(), 1, generator=draw)
                asked = likelihood.gather(1, drawn).sum()
            found = _observed([(asked, (torch.ones(()), None))], list(leaves.values()), noted, observe)
            for name, gradients in zip(leaves, found, strict=True):
                if gradients[0] is not None:
                    self._rows(name, whole[name], chosen).copy_(gradients[0])
        return {name: (gradient, None) for name, gradient in whole.items()}

    def _rows(self, name: ValueId, value: torch.Tensor, rows: slice) -> torch.Tensor:
        axis = self._model.values[name].shape.index("T")
        return value.narrow(axis, rows.start, rows.stop - rows.start)

    def _experts_back(
        self, step: ExpertsStep, outputs: Mapping[ValueId, Gradients], observe: Observer
    ) -> dict[ValueId, Gradients]:
        """Gradients of what a step of experts reads, from those of what it makes."""
        hidden, index, weight = (self._values[name] for name in (step.hidden, step.index, step.weight))
        body = self._bodies[self._model.experts[step.layer].body]
        of_x, of_weight = run_experts_back(
            self._weights, step.layer, body, hidden, index, weight, outputs[step.output], observe
        )
        if of_weight[0] is not None:
            self._swap_costs[step.index] = swap_cost(weight, of_weight[0])
        return {step.hidden: of_x, step.weight: of_weight}

    def _step_back(
        self, step: Step, outputs: Mapping[ValueId, Gradients], observe: Observer
    ) -> dict[ValueId, Gradients]:
        """The same of any other step."""
        values = {name: self._values[name].detach().clone() for name in step_values(step)[0]}
        leaves = {name: value.requires_grad_() for name, value in values.items() if value.is_floating_point()}
        runs: list[SegmentRun] = []
        with torch.enable_grad():
            made = [(value, outputs[name]) for name, value in self._outputs(step, values, None, runs).items()]
        for run in runs:
            for name in outputs:
                if run.gaps is not None and name in self._swap_costs:
                    seeds = gap_seeds(run.gaps, self._swap_costs[name], SEED + len(self._swap_costs))
                    made.append((run.gaps, (None, seeds)))
        noted = [each for run in runs for each in run.noted]
        found = _observed(made, list(leaves.values()), noted, observe)
        return dict(zip(leaves, found, strict=True))

    def _outputs(
        self,
        step: Step,
        values: dict[ValueId, torch.Tensor],
        observe: Observer | None,
        noted: list[SegmentRun] | None = None,
    ) -> dict[ValueId, torch.Tensor]:
        """What a step makes; runs of segments are put into ``noted``, with their routers' gaps."""
        if isinstance(step, SegmentStep):
            routers = (self._routers[name] for name in step.outputs if name in self._routers)
            router = None if noted is None else next(routers, None)
            run = SegmentRun(self._parts.functions[step.function], step, router)
            outputs = run.outputs(step, values, self._loaded(step.weights))
            if noted is not None:
                noted.append(run)
            if observe is not None:
                for each in run.noted:
                    observe(each.product())
            return dict(zip(step.outputs, outputs, strict=True))
        if isinstance(step, AttentionStep):
            return {step.output: self._attention(step, values)}
        if isinstance(step, StateStep):
            weights = [self._weights.dense(name).float() for name in step.weights]
            inputs = [values[name][0] for name in step.inputs]
            spec = self._states[step.state]
            found = [advance_all(spec, [each[a:b] for each in inputs], weights) for a, b in self._spans]
            return {step.output: torch.cat(found)[None]}
        if isinstance(step, SelectionStep):
            return {step.output: self._selection(step, values)}
        if isinstance(step, CapacityStep):
            return {step.output: values[step.weight] * self._kept(step, values)}
        assert isinstance(step, ExpertsStep)
        body = self._bodies[self._model.experts[step.layer].body]
        hidden, index, weight = (values[name] for name in (step.hidden, step.index, step.weight))
        return {step.output: run_experts(self._weights, step.layer, body, hidden, index, weight, observe)}

    def _loaded(self, names: Sequence[TensorName]) -> dict[TensorName, torch.Tensor]:
        return {name: self._weights.dense(name) for name in names}

    def _attention(self, step: AttentionStep, values: dict[ValueId, torch.Tensor]) -> torch.Tensor:
        spec = self._attentions[step.attention]
        assert step.key is not None
        query, key = values[step.query][0], values[step.key][0]
        value = key[..., : spec.value_dim] if step.value is None else values[step.value][0]
        sinks = None if step.sinks is None else self._weights.dense(step.sinks).float()
        if step.weights is not None:
            expand, project = (
                self._weights.dense(name) for name in (step.weights.expand, step.weights.value)
            )
            spec, key, value = expand_latents(spec, key, expand, project)
        results = []
        for begin, end in self._spans:
            chosen = None if step.selection is None else values[step.selection][begin:end]
            results.append(attend(spec, query[begin:end], key[begin:end], value[begin:end], sinks, chosen))
        return torch.cat(results)[None]

    def _selection(self, step: SelectionStep, values: dict[ValueId, torch.Tensor]) -> torch.Tensor:
        """Booleans ``[T, longest]``; the kernels' has them as bits."""
        spec = self._selections[step.selection]
        operands = [values[name][0].detach() for name in (step.query, step.weight, step.key)]
        longest = max(end - begin for begin, end in self._spans)
        result = torch.zeros(self.tokens, longest, dtype=torch.bool)
        for begin, end in self._spans:
            result[begin:end, : end - begin] = select_positions(spec, *(each[begin:end] for each in operands))
        return result

    def _kept(self, step: CapacityStep, values: dict[ValueId, torch.Tensor]) -> torch.Tensor:
        """1 for tokens that keep their weight, each sequence being one call."""
        calls = [begin for begin, end in self._spans for _ in range(begin, end)]
        ones = torch.ones(values[step.weight].shape, dtype=torch.float64).numpy()
        kept = keep_within_capacity(self._model.experts[step.layer], values[step.index].numpy(), ones, calls)
        return torch.from_numpy(kept).float()


def _observed(
    made: Sequence[tuple[torch.Tensor, Gradients]],
    wanted: Sequence[torch.Tensor],
    noted: Sequence[Noted],
    observe: Observer,
) -> list[Gradients]:
    """Gradients of ``wanted``, after ``observe`` has seen the products with theirs."""
    reached = [each for each in noted if each.result.requires_grad]
    found = back(made, [*wanted, *(each.result for each in reached)])
    for each, gradients in zip(reached, found[len(wanted) :], strict=True):
        if gradients[0] is not None:
            observe(each.product(gradients))
    return found[: len(wanted)]

"""A checkpoint in transformers whose units of a fit are rounded to some formats, and its held-out loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from benchmarks.support.calibrated_experts import rounded_by
from moec.artifacts.quantization import PLAIN
from moec.compiler.calibration.weights import CheckpointWeights
from moec.compiler.quantization.policies import METHOD
from moec.compiler.reference import compare
from moec.formats import FORMATS, METHODS, dequantize
from moec.formats.feedback import takes_feedback

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from moec.artifacts.accuracy import Agreement
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.fitting.units import Unit
    from moec.compiler.packing.calibrated import CalibratedRounding
    from moec.compiler.partition import PartitionedModel


class RoundedCheckpoint:
    """Rounds weights in transformers' own modules as bundles have them, and runs them on windows of text.

    Args:
        checkpoint: a model of few tensors: all of it is held, in float32, several times.
        parts: its chain, unquantized.
        windows: token ids.
        calibrated: rounds routed experts where that is asked for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: PartitionedModel,
        windows: Sequence[list[int]],
        calibrated: CalibratedRounding,
    ) -> None:
        self._windows = windows
        self._model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=torch.float32, experts_implementation="grouped_mm"
        ).eval()
        self._own = {name: tensor.detach().clone() for name, tensor in self._model.named_parameters()}
        self._layers = parts.model.experts
        self._sources = {source.layer: source for source in parts.packing.experts}
        self._weights = CheckpointWeights(checkpoint, parts)
        self._calibrated = calibrated
        self._known: dict[tuple[str, str, str], dict[str, torch.Tensor]] = {}
        self._expected = list(self._logits())

    def loss(self, formats: Mapping[str, str], units: Sequence[Unit], method: str) -> Agreement:
        """Against the model as it is; ``formats`` are by the unit's name, ``method`` in ``moec.formats.METHODS``."""
        parameters = dict(self._model.named_parameters())
        for name, values in self._own.items():
            parameters[name].data.copy_(values)
        for unit in units:
            if formats[unit.name] != PLAIN:
                for name, values in self._rounded(unit, formats[unit.name], method).items():
                    parameters[name].data.copy_(values)
        return compare(self._windows, iter(self._expected), self._logits())

    def _rounded(self, unit: Unit, kind: str, method: str) -> dict[str, torch.Tensor]:
        """By the parameter's name; kept, since many choices have a unit in the same format."""
        if unit.layer is None or not takes_feedback(FORMATS[kind]):
            method = METHOD
        key = (unit.name, kind, method)
        if key not in self._known:
            self._known[key] = (
                self._by_themselves(unit, kind) if method == METHOD else self._by_what_enters(unit, kind)
            )
        return self._known[key]

    def _by_themselves(self, unit: Unit, kind: str) -> dict[str, torch.Tensor]:
        names = unit.parameters
        if unit.layer is not None:
            source = self._sources[unit.layer]
            names = (source.up, source.down)
        found = {}
        for name in names:
            values = self._own[name]
            rows = values.reshape(-1, values.shape[-1]).numpy()
            rounded = dequantize(FORMATS[kind], METHODS[METHOD](FORMATS[kind], rows))
            found[name] = torch.from_numpy(rounded).reshape(values.shape)
        return found

    def _by_what_enters(self, unit: Unit, kind: str) -> dict[str, torch.Tensor]:
        """Experts of a layer, of which transformers has gate and up in one tensor ``[E, 2I, H]``."""
        assert unit.layer is not None
        source = self._sources[unit.layer]
        layer = self._layers[unit.layer]
        experts = (self._weights.expert(unit.layer, expert) for expert in range(layer.experts))
        both, downs = rounded_by(self._calibrated.layer(unit.layer), FORMATS[kind], experts)
        return {source.up: both, source.down: downs}

    def _logits(self) -> Iterator[NDArray[np.float32]]:
        with torch.inference_mode():
            for window in self._windows:
                yield self._model(torch.tensor([window])).logits[0].numpy()

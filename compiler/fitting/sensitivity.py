"""How much each unit suffers from each format: measured on calibration tokens, or read off the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.quantization import PLAIN
from moec.artifacts.traces import Traces, layer_trace
from moec.compiler.calibration.chain import CalibrationRun
from moec.compiler.calibration.products import ExpertMatrix
from moec.compiler.fitting.rounding import product_losses, relative_error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor

    from moec.artifacts.fit import Measured
    from moec.artifacts.model import ModelRecord
    from moec.compiler.calibration.products import Product
    from moec.compiler.calibration.values import ValueFiles
    from moec.compiler.calibration.weights import CheckpointWeights
    from moec.compiler.fitting.units import Unit
    from moec.compiler.partition import PartitionedModel

    Losses = dict[str, dict[str, float]]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Losses, and what was seen on the way."""

    measured: Measured
    losses: Losses
    """By the unit's name, by format."""
    swaps: Losses
    """Squared noise of routers' gaps, each as a share of where it would cost a nat; likewise."""
    tokens: int
    traces: Traces | None
    """Of the routing of the calibration tokens."""


def measure_divergence(
    parts: PartitionedModel,
    weights: CheckpointWeights,
    units: Sequence[Unit],
    sequences: Sequence[Sequence[int]],
    values: ValueFiles,
    method: str,
    threads: Executor,
) -> Sensitivity:
    """The predicted divergence for each token, by one pass forward and one back; see `rounding.product_losses`.

    Args:
        parts: the model, which `moec.compiler.calibration.chain.why_not` takes.
        weights: of the checkpoint.
        units: whose losses are wanted.
        sequences: calibration tokens.
        values: where what flows is kept.
        method: in ``moec.formats.METHODS``.
        threads: formats are rounded to side by side.
    """
    run = CalibrationRun(parts, weights, sequences, values)
    by_tensor = {name: unit for unit in units for name in unit.tensors}
    by_layer = {unit.layer: unit for unit in units if unit.layer is not None}
    losses, swaps = _zeros(units), _zeros(units)

    def observe(product: Product) -> None:
        name = product.name
        unit = by_layer[name.layer] if isinstance(name, ExpertMatrix) else by_tensor.get(name)
        if unit is None or product.gradient is None:
            return
        kinds = _rounded(unit)
        found = threads.map(lambda kind: product_losses(product, kind, method), kinds)
        for kind, (smooth, swapped) in zip(kinds, found, strict=True):
            losses[unit.name][kind] += smooth / run.tokens
            swaps[unit.name][kind] += swapped / run.tokens

    run.forward()
    run.backward(observe)
    starts = np.cumsum([0, *map(len, sequences)])[:-1].astype(np.int64)
    layers = zip(parts.model.experts, run.chosen(), strict=True)
    traces = Traces(
        tuple(layer_trace(layer.experts, chosen.numpy()) for layer, chosen in layers),
        starts,
        np.ones(run.tokens, np.bool_),
    )
    return Sensitivity("divergence", losses, swaps, run.tokens, traces)


def weigh_errors(
    model: ModelRecord, weights: CheckpointWeights, units: Sequence[Unit], method: str, threads: Executor
) -> Sensitivity:
    """Where the model cannot be run: the squared errors' share of each matrix, of experts that of a mean one."""
    losses = _zeros(units)
    for unit in units:
        if unit.layer is None:
            matrices = [(weights.dense(name), 1.0) for name in unit.tensors]
        else:
            experts = model.experts[unit.layer].experts
            matrices = [
                (matrix, 1.0 / experts)
                for expert in range(experts)
                for matrix in weights.expert(unit.layer, expert).values()
                if matrix.ndim == 2
            ]
        for matrix, share in matrices:
            kinds = _rounded(unit)
            found = threads.map(lambda kind, matrix=matrix: relative_error(matrix, kind, method), kinds)
            for kind, loss in zip(kinds, found, strict=True):
                losses[unit.name][kind] += share * loss
    return Sensitivity("weights", losses, _zeros(units), 0, None)


def _zeros(units: Sequence[Unit]) -> Losses:
    return {unit.name: dict.fromkeys(unit.formats, 0.0) for unit in units}


def _rounded(unit: Unit) -> list[str]:
    """The formats that lose anything."""
    return [kind for kind in unit.formats if kind not in (PLAIN, unit.kept)]

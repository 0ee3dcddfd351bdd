"""From a target to a policy: measure what each format costs, choose, and say what was chosen."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from moec.artifacts.fit import FitRecord, FittedUnit
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.quantization import FormatRule, Quantization
from moec.artifacts.schedule import Budgets
from moec.compiler.calibration.chain import why_not
from moec.compiler.calibration.tokens import calibration_tokens
from moec.compiler.calibration.values import ValueFiles
from moec.compiler.calibration.weights import CheckpointWeights
from moec.compiler.fitting.calibrated import check_calibration
from moec.compiler.fitting.sensitivity import measure_divergence, weigh_errors
from moec.compiler.fitting.units import fit_units, with_losses
from moec.compiler.quantization.policies import METHOD
from moec.planning.fitting.fit import fit_bytes, fit_time
from moec.planning.fitting.losses import predicted_losses
from moec.planning.machines import CONTEXT_TOKENS, STEP_TOKENS, budgets_for
from moec.planning.routing.analysis import analyse

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from moec.artifacts.model import ModelRecord
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.fitting.sensitivity import Sensitivity
    from moec.compiler.fitting.units import Unit
    from moec.compiler.partition import PartitionedModel
    from moec.compiler.request import Calibration, FitRequest, Log
    from moec.planning.fitting.fit import Fit
    from moec.planning.fitting.units import FitUnit


def fit(
    parts: PartitionedModel,
    checkpoint: Checkpoint,
    kept: Mapping[str, str],
    request: FitRequest,
    calibration: Calibration,
    kinds: Collection[str],
    log: Log,
) -> tuple[Quantization, FitRecord]:
    """The policy that meets a target at the least predicted loss, and the record of the choice.

    Args:
        parts: the model, before any policy is applied.
        checkpoint: with its weights on this machine.
        kept: the formats that `moec.compiler.quantization.kept_formats` found.
        request: the target.
        calibration: prompts to measure with.
        kinds: of the targets, ``cpu`` and ``cuda``.
        log: hears what was used.

    Raises:
        CompileError: there is no calibration to measure with.
        BudgetError: no choice meets the target; the message has the least that one does.
    """
    check_calibration(calibration)
    units = fit_units(parts, kept)
    found = measure(parts, checkpoint, units, calibration, log)
    options = [with_losses(parts, unit, found.losses[unit.name], found.swaps[unit.name]) for unit in units]
    chosen = choose_options(parts.model, options, request, found, on_device="cuda" in kinds)
    return _policy(request, units, options, chosen), _record(request, units, options, chosen, found)


def measure(
    parts: PartitionedModel,
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    calibration: Calibration,
    log: Log,
) -> Sensitivity:
    """What each format costs each unit, on calibration tokens where the model can be run."""
    weights = CheckpointWeights(checkpoint, parts)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "moec-fit") as threads:
        reason = why_not(parts.model)
        if reason is not None:
            log.note(f"formats are chosen by the errors of weights alone: {reason}, so it cannot be measured")
            return weigh_errors(parts.model, weights, units, METHOD, threads)
        sequences = calibration_tokens(checkpoint, parts.model, calibration.prompts)
        with tempfile.TemporaryDirectory(prefix="moec-fit-") as folder:
            values = ValueFiles(Path(folder))
            return measure_divergence(parts, weights, units, sequences, values, METHOD, threads)


def choose_options(
    model: ModelRecord,
    units: Sequence[FitUnit],
    request: FitRequest,
    found: Sensitivity,
    *,
    on_device: bool,
) -> Fit:
    """The choice that meets the target; raises `BudgetError` where none does."""
    facts = footprint(model)
    if request.limit_bytes is not None:
        budgets = Budgets(0, 0, min(model.max_context, CONTEXT_TOKENS), STEP_TOKENS)
        return fit_bytes(facts, units, budgets, request.limit_bytes, on_device=on_device)
    assert request.milliseconds is not None
    assert request.machine is not None
    budgets = budgets_for(request.machine, model, None if on_device else 0)
    analysis = analyse(found.traces, model)
    return fit_time(facts, units, budgets, request.machine, analysis, request.milliseconds)


def _policy(
    request: FitRequest, units: Sequence[Unit], options: Sequence[FitUnit], chosen: Fit
) -> Quantization:
    """A rule for each parameter, by its whole name."""
    rules = tuple(
        FormatRule(parameter, option.options[number].format)
        for unit, option, number in zip(units, options, chosen.chosen, strict=True)
        for parameter in unit.parameters
    )
    return Quantization(f"fit-{request.text}", METHOD, {}, rules)


def _record(
    request: FitRequest,
    units: Sequence[Unit],
    options: Sequence[FitUnit],
    chosen: Fit,
    found: Sensitivity,
) -> FitRecord:
    picked = [unit.options[number] for unit, number in zip(options, chosen.chosen, strict=True)]
    losses = predicted_losses(options, chosen.chosen)
    return FitRecord(
        target=request.text,
        machine=None if request.machine is None else request.machine.name,
        measured=found.measured,
        tokens=found.tokens,
        loss=sum(losses),
        resident_bytes=chosen.resident_bytes,
        milliseconds_per_token=chosen.milliseconds,
        units=tuple(
            FittedUnit(unit.name, unit.role, unit.parameters, option.format, option.size_bytes, loss)
            for unit, option, loss in zip(units, picked, losses, strict=True)
        ),
    )

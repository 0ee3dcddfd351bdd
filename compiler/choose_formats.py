"""Which weights get which formats (asked for, kept from the checkpoint, or fitted to a target), and who rounds them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from moec.artifacts.quantization import KEEP
from moec.compiler.lowering.formats import check_formats, takes_formats
from moec.compiler.quantization import Kept, has_formats, kept_formats, policy_named, quantize
from moec.compiler.quantization.policies import METHOD
from moec.compiler.stages import stage
from moec.errors import CheckpointError, NetworkError, UsageError
from moec.formats import CALIBRATED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from moec.artifacts.fit import FitRecord
    from moec.artifacts.quantization import Quantization
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.packing.calibrated import CalibratedRounding
    from moec.compiler.partition import PartitionedModel
    from moec.compiler.request import Calibration, CompileRequest, FitRequest, Log


def choose_formats(
    parts: PartitionedModel,
    checkpoint: Checkpoint,
    request: CompileRequest,
    targets: Sequence[str],
    log: Log,
) -> PartitionedModel:
    """The model with the formats of the policy that was asked for, or that a fit found; plain where it has none.

    Raises:
        UsageError: the method needs more than this compilation will have, or has nothing to round where the person
            named formats.
        CompileError: the kernels of a target do not take a format, or the model cannot be run for the method.
        MoecError: as `moec.compiler.fitting.fit`.
    """
    policy, chosen = request.quantization, None
    method = request.method or (policy.method if policy is not None else None)
    if method in CALIBRATED:
        from moec.compiler.calibration.rounding import check_calibrated

        check_calibrated(method, parts.model, request.calibration, modules_only=request.modules_only)
    if request.fit is not None:
        with stage("fit", log):
            policy, chosen = _fitted(parts, checkpoint, request.fit, request.calibration, targets, log)
    if policy is not None and method is not None:
        policy = replace(policy, method=method)
    with stage("quantize", log):
        parts = with_formats(parts, checkpoint, policy, targets, log)
        if method in CALIBRATED:
            parts = _with_something_to_round(parts, method, request, log)
    return replace(parts, packing=replace(parts.packing, fit=chosen))


def _with_something_to_round(
    parts: PartitionedModel, method: str, request: CompileRequest, log: Log
) -> PartitionedModel:
    """Without a method that no experts want: where formats were fitted that is said, where they were named refused."""
    from moec.compiler.calibration.rounding import rounds_any

    if rounds_any(parts.model):
        return parts
    if request.fit is None:
        raise UsageError(
            f"The method {method} cannot be used.",
            "It rounds routed experts to whole numbers (int4, int8), and here none get such a format.",
            "Choose another format for experts, or use the method nearest.",
        )
    log.note(f"the method {method} has nothing to do: no experts are rounded to whole numbers")
    policy = parts.packing.quantization
    chosen = None if policy is None else replace(policy, method=METHOD)
    return replace(parts, packing=replace(parts.packing, quantization=chosen))


def rounding_for(
    parts: PartitionedModel,
    plain: PartitionedModel,
    checkpoint: Checkpoint,
    request: CompileRequest,
    log: Log,
) -> AbstractContextManager[CalibratedRounding | None]:
    """What rounds experts by calibration tokens, where the policy of ``parts`` wants that."""
    policy = parts.packing.quantization
    if policy is None or policy.method not in CALIBRATED:
        return nullcontext()
    from moec.compiler.calibration.rounding import feedback_rounding

    return feedback_rounding(plain, checkpoint, request.calibration, log)


def with_formats(
    parts: PartitionedModel,
    checkpoint: Checkpoint,
    asked: Quantization | None,
    targets: Sequence[str],
    log: Log,
) -> PartitionedModel:
    """Give weights the formats of a policy.

    Where none is asked for, what the checkpoint has is kept if it is known (modules are made without weights as well)
    and the kernels of all targets take it.
    """
    from moec.compiler.lowering.targets import parse_target

    policy, kept = asked or policy_named(KEEP), Kept()
    try:
        if policy.keeps:
            kept = kept_formats(checkpoint, parts)
    except (CheckpointError, NetworkError) as error:
        if asked is not None:
            raise
        log.note(f"what the checkpoint has quantized is not known, and will be dequantized: {error.what}")
    for name, count in kept.rounded.items():
        log.note(
            f"{count} quantized weights of the checkpoint are rounded to {name}, which is nearest to theirs"
        )
    for obstacle, count in kept.obstacles.items():
        log.note(f"{count} quantized weights of the checkpoint are dequantized: {obstacle}")
    chosen = quantize(parts, policy, kept.formats)
    if not has_formats(chosen):
        return parts
    kinds = {parse_target(name).kind for name in targets}
    if asked is None and not all(takes_formats(chosen.model, kind) for kind in kinds):
        log.note("the checkpoint's codes are dequantized: a target has no kernels for them")
        return parts
    for kind in kinds:
        check_formats(chosen.model, kind)
    return chosen


def _fitted(
    parts: PartitionedModel,
    checkpoint: Checkpoint,
    target: FitRequest,
    calibration: Calibration,
    targets: Sequence[str],
    log: Log,
) -> tuple[Quantization, FitRecord]:
    """The policy that meets ``target`` at the least predicted loss; raises as `moec.compiler.fitting.fit`."""
    from moec.compiler.fitting import fit
    from moec.compiler.lowering.targets import parse_target

    kinds = {parse_target(name).kind for name in targets}
    kept = kept_formats(checkpoint, parts).formats
    return fit(parts, checkpoint, kept, target, calibration, kinds, log)

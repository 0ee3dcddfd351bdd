"""Routed experts rounded by what enters their products on calibration tokens (the method ``feedback``).

A layer's hidden states and choices are in files since the pass forward. What of them enters an expert gives the second
moments that it is rounded by; nothing else is kept.
"""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moec.artifacts.steps import ExpertsStep
from moec.compiler.calibration.chain import CalibrationRun, why_not
from moec.compiler.calibration.experts import inner_of
from moec.compiler.calibration.tokens import calibration_tokens
from moec.compiler.calibration.values import ValueFiles
from moec.compiler.calibration.weights import CheckpointWeights
from moec.compiler.stages import stage
from moec.errors import CompileError, UsageError
from moec.formats import format_of, pack_rows
from moec.formats.feedback import (
    Feedback,
    column_scales,
    feedback,
    round_with_feedback,
    shrunk,
    takes_feedback,
)
from moec.formats.nearest import round_to_nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from moec.artifacts.activation import Expression
    from moec.artifacts.ids import LayerId
    from moec.artifacts.model import ExpertBody, ModelRecord
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.partition import PartitionedModel
    from moec.compiler.request import Calibration, Log
    from moec.formats import Format

FEW_TOKENS = 4096
"""With fewer, the method gains little."""
SCALING_TOKENS = 1024
"""Of an expert: fewer say too little of its columns to scale them."""
TOKENS_AT_ONCE = 1024
"""Rows of which second moments are summed at once."""


@dataclass(frozen=True, eq=False)
class LayerFeedback:
    """Rounds the experts of one layer; see `moec.compiler.packing.calibrated.LayerRounding`."""

    body: ExpertBody
    x: torch.Tensor
    """What enters the layer's experts, ``[T, H]``."""
    index: torch.Tensor
    """``[T, K]``."""
    moments: NDArray[np.float32]
    """Of ``x``, ``[H, H]``: what an expert's own are drawn towards."""

    def rows(
        self, expert: int, kind: Format, parts: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        """Packed rows of gate, up and down."""
        x = self.x[torch.where(self.index == expert)[0]].float()
        found, factors = self._down(kind, parts, inner_of(self.body, parts, x))
        outer = _factor(shrunk(moments_of(x), len(x), self.moments))
        found["up"] = _rounded(
            kind, parts["up"] if factors is None else parts["up"] / factors[:, None], outer
        )
        if self.body.gated:
            found["gate"] = _rounded(kind, parts["gate"], outer)
        return found

    def _down(
        self, kind: Format, parts: Mapping[str, torch.Tensor], inner: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Its packed rows, and what its columns were multiplied with, ``[I]``, where they were."""
        moments, down = shrunk(moments_of(inner), len(inner)), parts["down"]
        if len(inner) < SCALING_TOKENS or not is_linear_in_up(self.body):
            return {"down": _rounded(kind, down, _factor(moments))}, None
        scales = column_scales(kind, down.numpy(), moments)
        moments /= scales
        moments /= scales[:, None]
        factors = torch.from_numpy(scales)
        return {"down": _rounded(kind, down * factors, _factor(moments))}, factors


def is_linear_in_up(body: ExpertBody) -> bool:
    """Whether what enters down is a product with up's result, so that rows of up and columns of down can be scaled."""
    match body.activation:
        case ("mul", "up", other) | ("mul", other, "up"):
            return not body.up_bias and "up" not in _names(other)
    return False


def _names(expression: Expression) -> set[str]:
    """Every name in an expression."""
    if isinstance(expression, (list, tuple)):
        return set().union(*map(_names, expression))
    return {expression} if isinstance(expression, str) else set()


class FeedbackRounding:
    """Rounds all experts; see `moec.compiler.packing.calibrated.CalibratedRounding`.

    Args:
        model: whose experts they are, unquantized.
        values: what flowed through its chain.
        sequences: the calibration tokens that did.
    """

    def __init__(self, model: ModelRecord, values: ValueFiles, sequences: Sequence[Sequence[int]]) -> None:
        self._values = values
        self._steps = {step.layer: step for step in model.steps if isinstance(step, ExpertsStep)}
        bodies = {body.name: body for body in model.bodies}
        self._bodies = {layer: bodies[model.experts[layer].body] for layer in self._steps}
        self.identity = hashlib.sha256(repr([list(ids) for ids in sequences]).encode()).hexdigest()

    @property
    def thread_bytes(self) -> int:
        """Five square matrices in float32, for the widest input, and an expert twice."""
        return max(
            20 * max(body.hidden, body.intermediate) ** 2 + 24 * body.hidden * body.intermediate
            for body in self._bodies.values()
        )

    def layer(self, layer: LayerId) -> LayerFeedback:
        """For the experts of one layer."""
        step = self._steps[layer]
        x, index = self._values[step.hidden], self._values[step.index]
        return LayerFeedback(self._bodies[layer], x, index, shrunk(moments_of(x), len(x)))


def check_calibrated(
    method: str, model: ModelRecord, calibration: Calibration, *, modules_only: bool
) -> None:
    """Refuse a method that rounds by calibration tokens where there will be none; the model's formats do not matter.

    Raises:
        UsageError: there are to be no prompts, or no weights.
        CompileError: the model cannot be run here.
    """
    what = f"The method {method} cannot be used."
    reason = why_not(model)
    if modules_only:
        why = "It rounds weights by what enters them, and --modules-only stops before there are weights."
        raise UsageError(what, why, "Compile the whole bundle, or use the method nearest.")
    if not calibration.enabled:
        why = "It rounds weights by what calibration prompts bring, and --calibration none says that there are none."
        raise UsageError(what, why, "Leave --calibration out, or give it a file of prompts.")
    if reason is not None:
        why = f"It runs the model on calibration prompts before it is packed, which this one is not fit for: {reason}."
        raise CompileError(what, why, "Use the method nearest.")


def rounds_any(model: ModelRecord) -> bool:
    """Whether such a method has any experts to round: some that get whole numbers."""
    kinds = [format_of(body.format) for body in model.bodies]
    return any(kind is not None and takes_feedback(kind) for kind in kinds)


@contextmanager
def feedback_rounding(
    parts: PartitionedModel, checkpoint: Checkpoint, calibration: Calibration, log: Log
) -> Iterator[FeedbackRounding]:
    """Run the model on the calibration prompts; what flowed stays in files until the block ends.

    Args:
        parts: the model, before any policy is applied.
        checkpoint: with its weights on this machine.
        calibration: the prompts.
        log: hears how many tokens there are.

    Raises:
        CheckpointError: as `calibration_tokens`.
    """
    sequences = calibration_tokens(checkpoint, parts.model, calibration.prompts)
    with tempfile.TemporaryDirectory(prefix="moec-calibration-") as folder:
        values = ValueFiles(Path(folder))
        with stage("calibrate", log):
            run = CalibrationRun(parts, CheckpointWeights(checkpoint, parts), sequences, values)
            steps = [step for step in parts.model.steps if isinstance(step, ExpertsStep)]
            run.forward(keep={name for step in steps for name in (step.hidden, step.index)})
        few = f", which is few: {FEW_TOKENS} and more of the model's own kind of text are worth it"
        log.note(f"{run.tokens} calibration tokens{few if run.tokens < FEW_TOKENS else ''}")
        yield FeedbackRounding(parts.model, values, sequences)


def moments_of(x: torch.Tensor) -> NDArray[np.float32]:
    """The mean of ``x.T @ x`` over rows ``[n, K]``."""
    moments = np.zeros((x.shape[1], x.shape[1]), np.float32)
    for begin in range(0, len(x), TOKENS_AT_ONCE):
        rows = x[begin : begin + TOKENS_AT_ONCE].float().numpy()
        moments += rows.T @ rows
    moments /= max(len(x), 1)
    return moments


def _factor(moments: NDArray[np.float32]) -> Feedback | None:
    """None where nothing ever entered."""
    return feedback(moments) if moments.any() else None


def _rounded(kind: Format, matrix: torch.Tensor, factor: Feedback | None) -> torch.Tensor:
    values = matrix.numpy()
    quantized = (
        round_to_nearest(kind, values) if factor is None else round_with_feedback(kind, values, factor)
    )
    return torch.from_numpy(pack_rows(kind, quantized))

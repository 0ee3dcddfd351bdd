"""Writing the files of ``weights/``, each front to back in one thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from moec.compiler.packing.calibrated import is_rounded, rounded_pieces
from moec.compiler.packing.dense import DENSE_FILE
from moec.compiler.packing.dense_reader import DenseReader
from moec.compiler.packing.experts import ExpertReader
from moec.compiler.packing.finite import nonfinite_values
from moec.compiler.packing.output import OutputFile, PackedFile, Progress
from moec.compiler.packing.tensors.reading import TensorReader
from moec.errors import MoecError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from moec.compiler.packing.calibrated import CalibratedRounding
    from moec.compiler.packing.experts import ExpertsFile
    from moec.compiler.packing.journal import Journal
    from moec.compiler.packing.plan import PackPlan
    from moec.compiler.packing.tensors.reading import ByteSource


class StoppedError(MoecError):
    """Another thread failed; this one gave up."""


@dataclass(frozen=True)
class Work:
    """What every thread needs."""

    plan: PackPlan
    constants: Mapping[str, torch.Tensor]
    model: PreTrainedModel
    source: ByteSource
    weights: Path
    journal: Journal
    progress: Progress
    hold: Callable[[int], None]
    warn: Callable[[str, int], None]
    """Called once for a tensor with NaN or infinity, with their number."""
    calibrated: CalibratedRounding | None = None
    """What rounds experts by what enters them; None: each matrix is rounded by itself."""
    stop: threading.Event = field(default_factory=threading.Event)

    def reader(self) -> TensorReader:
        """A reader for one thread."""
        return TensorReader(self.source, quantizing=bool(self.plan.quantizers))

    def open(self, name: str, items: int) -> OutputFile:
        """An output file of ``items`` items, resumed if possible."""
        return OutputFile(self.weights, name, items, self.journal, self.progress)


def write_dense(work: Work) -> tuple[PackedFile, dict[str, int]]:
    """Write ``dense.safetensors``; what it holds that is not finite comes beside it."""
    plan = work.plan
    source = work.reader()
    reader = DenseReader(
        plan.parameters, plan.dtypes, plan.quantizers, work.constants, source, work.model, work.hold
    )
    with work.open(DENSE_FILE, 1 + len(plan.dense.groups)) as file:
        if file.items_done == 0:
            file.write(plan.dense.header)
            file.item_done()
        for group in plan.dense.groups[file.items_done - 1 :]:
            found = dict[str, int]()
            for placed, values, quantizer in reader.pieces(group):
                file.pad_to(placed.begin)
                checked = bool(placed.tensor.sources) and not placed.tensor.sources[0].startswith("constant:")
                stored = values if quantizer is None else quantizer.rows(values, placed.tensor.name)
                _write(work, file, stored, placed.tensor.name if checked else None, found)
            assert file.size_bytes == group[-1].end
            _finish_item(work, file, found)
    return file.result(work.weights.parent), file.nonfinite


def write_experts(work: Work, layer: ExpertsFile) -> tuple[PackedFile, dict[str, int]]:
    """Write the experts of one layer; what they hold that is not finite comes beside it."""
    reader = ExpertReader(layer, work.reader(), work.model, work.hold)
    rounding = work.calibrated.layer(layer.layer.layer) if work.calibrated and is_rounded(layer) else None
    stride = layer.layout.stride_bytes
    with work.open(layer.name, layer.layer.experts) as file:
        for expert in range(file.items_done, layer.layer.experts):
            found = dict[str, int]()
            part = None
            pieces = rounded_pieces(reader, rounding, expert) if rounding else reader.pieces(expert)
            for piece in pieces:
                if piece.part is not part:
                    part = piece.part
                    file.pad_to(expert * stride + part.offset_bytes)
                name, quantizer = f"{piece.parameter}[{expert}]", piece.quantizer
                stored = piece.values if quantizer is None else quantizer.rows(piece.values, name)
                _write(work, file, stored, name, found)
            file.pad_to((expert + 1) * stride)
            _finish_item(work, file, found)
    return file.result(work.weights.parent), file.nonfinite


def _write(
    work: Work, file: OutputFile, values: torch.Tensor, name: str | None, found: dict[str, int]
) -> None:
    if work.stop.is_set():
        raise StoppedError("Stopped.")
    if name is not None:
        count = nonfinite_values(values)
        if count:
            found[name] = found.get(name, 0) + count
    file.write(values.reshape(-1).view(torch.uint8).numpy().data)


def _finish_item(work: Work, file: OutputFile, found: dict[str, int]) -> None:
    for name, count in found.items():
        work.warn(name, count)
    file.nonfinite.update(found)
    work.hold(0)
    file.item_done()

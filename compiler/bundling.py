"""From modules to a bundle: pack the weights, profile the routing, plan, commit."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections import Counter
from typing import TYPE_CHECKING

from moec import __version__
from moec.artifacts.files.manifest import (
    FORMAT_VERSION,
    NO_SHA256,
    FileRecord,
    Manifest,
    TokenizerRecord,
    model_fingerprint,
)
from moec.artifacts.files.records import read_record, write_record
from moec.artifacts.files.traces import TRACES_NAME, save_traces
from moec.artifacts.layout.footprint import format_bytes
from moec.artifacts.model import ModelRecord
from moec.artifacts.packing import PackingRecord
from moec.artifacts.paths import CONSTANTS_NAME
from moec.compiler.modules import TOKENIZER_FOLDER
from moec.compiler.stages import stage
from moec.planning.machines import budgets_for
from moec.planning.planner import plan_many

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from moec.artifacts.files.manifest import Contents, TargetRecord
    from moec.artifacts.files.writer import BundleWriter
    from moec.artifacts.traces import Traces
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.packing.calibrated import CalibratedRounding
    from moec.compiler.request import Calibration, Surroundings

TOOLS = ("torch", "transformers", "apache-tvm", "apache-tvm-ffi", "numpy")
"""Packages whose version shapes the bytes of a bundle."""

CHAT_TEMPLATE = "chat_template"
SHOWN = 3
"""Tensors named in a warning."""


def fingerprint(checkpoint: Checkpoint) -> str:
    """What tells this model apart; of the config alone where the weights are elsewhere."""
    tensors = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.index.items()}
    return model_fingerprint(checkpoint.config_sha256, tensors)


def describe_modules(folder: Path, checkpoint: Checkpoint, targets: tuple[TargetRecord, ...]) -> Manifest:
    """The manifest of modules without weights; the writer fills in the file table."""
    return _describe(folder, checkpoint, targets, "modules")


def finish_bundle(
    writer: BundleWriter,
    checkpoint: Checkpoint,
    targets: tuple[TargetRecord, ...],
    calibration: Calibration,
    around: Surroundings,
    spare: TargetRecord | None = None,
    rounding: CalibratedRounding | None = None,
) -> Manifest:
    """Add weights, traces and schedule to the modules in the writer's folder, and commit the bundle.

    ``spare`` is a target for this machine's CPU that only the calibration uses; it does not stay in the bundle.
    ``rounding`` is for packing, where the policy's method wants one.
    """
    folder = writer.folder
    model = read_record(ModelRecord, "model", folder / "model.json")
    with stage("pack", around.log):
        packed = _pack(writer, checkpoint, model, around, rounding)
    write_record(plan_many(None, model, ()), folder / "schedule.json")
    traces = None
    if calibration.enabled:
        with stage("profile", around.log):
            runnable = (*targets, spare) if spare else targets
            traces = _profile(writer, checkpoint, runnable, calibration, around, packed)
    if spare is not None:
        shutil.rmtree(folder / "modules" / spare.name)
    with stage("schedule", around.log):
        pairs = [(machine, budgets_for(machine, model)) for machine in around.machines]
        write_record(plan_many(traces, model, pairs), folder / "schedule.json")
    return writer.commit(_describe(folder, checkpoint, targets, "bundle"), packed)


def _pack(
    writer: BundleWriter,
    checkpoint: Checkpoint,
    model: ModelRecord,
    around: Surroundings,
    rounding: CalibratedRounding | None,
) -> dict[str, FileRecord]:
    from safetensors.torch import load_file

    from moec.compiler.packing import pack

    packing = read_record(PackingRecord, "packing", writer.folder / "packing.json")
    constants = load_file(writer.folder / CONSTANTS_NAME)
    result = pack(
        checkpoint,
        model,
        packing,
        constants,
        writer.folder,
        journal_folder=writer.state,
        progress=around.progress,
        calibrated=rounding,
    )
    if result.extras:
        around.log.note(
            f"{len(result.extras)} tensors are of no use to the chain and left out: {_summary(result.extras)}"
        )
    if result.nonfinite:
        worst = ", ".join(
            f"{tensor} ({count} values)" for tensor, count in list(result.nonfinite.items())[:SHOWN]
        )
        around.log.note(f"warning: {len(result.nonfinite)} tensors hold NaN or infinity: {worst}")
    return {file.path.as_posix(): FileRecord(file.size_bytes, file.sha256) for file in result.files}


def _profile(
    writer: BundleWriter,
    checkpoint: Checkpoint,
    targets: tuple[TargetRecord, ...],
    calibration: Calibration,
    around: Surroundings,
    packed: Mapping[str, FileRecord],
) -> Traces | None:
    """Run the calibration prompts through the bundle as it is now, and keep the traces in it."""
    if not around.probe.can_run(targets):
        around.log.note("no target runs on this machine: every expert is taken to be used alike")
        return None
    writer.preview(_describe(writer.folder, checkpoint, targets, "bundle"), packed)
    traces = around.probe.run(writer.folder, calibration.prompts)
    path = writer.folder / TRACES_NAME
    path.parent.mkdir(exist_ok=True)
    save_traces(traces, path)
    around.log.note(f"{traces.tokens} tokens of {len(traces.sequence_starts)} prompts traced")
    return traces


def _describe(
    folder: Path, checkpoint: Checkpoint, targets: tuple[TargetRecord, ...], contents: Contents
) -> Manifest:
    packing = read_record(PackingRecord, "packing", folder / "packing.json")
    return Manifest(
        format_version=FORMAT_VERSION,
        contents=contents,
        moec_version=__version__,
        tools={name: importlib.metadata.version(name) for name in TOOLS},
        model_name=checkpoint.name,
        fingerprint=fingerprint(checkpoint),
        targets=targets,
        tokenizer=_tokenizer(folder / TOKENIZER_FOLDER),
        quantization=packing.quantization.name if packing.quantization else "none",
        formats=format_bytes(read_record(ModelRecord, "model", folder / "model.json")),
        fit=packing.fit,
        checkpoint_types=_types(checkpoint),
        files={},
        manifest_sha256=NO_SHA256,
    )


def _types(checkpoint: Checkpoint) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for entry in checkpoint.index.values():
        sizes[entry.dtype] += entry.size_bytes
    return dict(sorted(sizes.items()))


def _tokenizer(folder: Path) -> TokenizerRecord | None:
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.iterdir() if path.is_file())
    template = any(
        path.name.startswith(CHAT_TEMPLATE)
        or (path.suffix == ".json" and f'"{CHAT_TEMPLATE}"' in path.read_text())
        for path in files
    )
    return TokenizerRecord(tuple(f"{TOKENIZER_FOLDER}/{path.name}" for path in files), template)


def _summary(names: Iterable[str]) -> str:
    """Names by their beginnings, with how many there are of each: ``model.visual (316), mtp.layers (12)``."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    shown = [f"{beginning} ({count})" for beginning, count in counts.most_common(SHOWN)]
    return ", ".join(shown) + (" …" if len(counts) > SHOWN else "")

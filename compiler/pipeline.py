"""``compile_model`` and ``pack_model``: the stages in order, one line each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from moec.artifacts.files.codec import to_json
from moec.artifacts.files.manifest import TargetRecord
from moec.artifacts.files.reader import open_modules
from moec.artifacts.files.writer import BundleWriter, check_output
from moec.artifacts.words.interface import interface
from moec.compiler.bundling import describe_modules, fingerprint, finish_bundle
from moec.compiler.checkpoint import config_sha256, fetch_weights, open_checkpoint, with_tokenizer
from moec.compiler.choices import choose_context, choose_dtype
from moec.compiler.choose_formats import choose_formats, rounding_for
from moec.compiler.fitting.calibrated import check_calibration
from moec.compiler.generation import generation_defaults
from moec.compiler.lowering.formats import takes_formats
from moec.compiler.modules import copy_modules, save_modules, save_side_files
from moec.compiler.stages import stage
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from moec.artifacts.files.manifest import Manifest
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.partition import PartitionedModel
    from moec.compiler.request import Calibration, CompileRequest, Surroundings


def compile_model(request: CompileRequest, around: Surroundings) -> Manifest:
    """Compile a checkpoint into a bundle, or (``modules_only``) into its modules, at ``request.output``.

    Raises:
        MoecError: typed by what is wrong; a stage that fails unexpectedly is named. Nothing half-written is left,
            but what an interrupted packing needs to go on.
    """
    check_output(request.output, force=request.force)
    names = check_targets(request.targets)
    if request.fit is not None:
        check_calibration(request.calibration)
    with stage("checkpoint", around.log):
        checkpoint = with_tokenizer(open_checkpoint(request.model), request.tokenizer)
        check_encodings(checkpoint)
        weighing = not request.modules_only or request.fit is not None
        if weighing and not checkpoint.hub:
            checkpoint = fetch_weights(checkpoint)
    for note in checkpoint.notes:
        around.log.note(note)
    parts = build_parts(request, checkpoint, around)
    if weighing:
        with stage("weights", around.log):
            checkpoint = complete(checkpoint, parts)
    plain = parts
    parts = choose_formats(plain, checkpoint, request, names, around.log)
    key = None if request.modules_only else _resume_key(request, parts, checkpoint)
    with BundleWriter(request.output, force=request.force, resume_key=key) as writer:
        save_modules(parts, writer.folder)
        save_side_files(checkpoint, writer.folder)
        targets = tuple(lower_for(name, parts, writer.folder, request, around) for name in names)
        if request.modules_only:
            return writer.commit(describe_modules(writer.folder, checkpoint, targets))
        spare = None
        probing = request.calibration.enabled and not around.probe.can_run(targets)
        if probing and takes_formats(parts.model, "cpu"):
            around.log.note(
                "no target runs on this machine: one for its CPU is made for the calibration only"
            )
            spare = lower_for("cpu", parts, writer.folder, request, around)
        with rounding_for(parts, plain, checkpoint, request, around.log) as rounding:
            return finish_bundle(writer, checkpoint, targets, request.calibration, around, spare, rounding)


def check_targets(names: Sequence[str]) -> tuple[str, ...]:
    """The names without repetitions; raises ``CompileError`` where there is no such target, before any long work."""
    from moec.compiler.lowering.targets import parse_target

    return tuple(parse_target(name).name for name in dict.fromkeys(names))


def check_encodings(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is quantized in a way that moec does not read, before anything is fetched or traced."""
    from moec.compiler.packing.tensors.stored import stored_tensors

    stored_tensors(checkpoint.index, checkpoint.config)


def complete(checkpoint: Checkpoint, parts: PartitionedModel) -> Checkpoint:
    """The checkpoint with its weights, held against what the model needs.

    A hub's weights are fetched only here, where the model is known to compile.
    """
    from moec.compiler.packing import check_weights

    fetched = fetch_weights(checkpoint)
    check_weights(fetched, parts.model, parts.packing, parts.constants)
    return fetched


def build_parts(request: CompileRequest, checkpoint: Checkpoint, around: Surroundings) -> PartitionedModel:
    """Trace and partition, and write the graphs as ONNX where that is asked for; no weights are needed."""
    from moec.compiler.partition import partition
    from moec.compiler.trace import trace

    dtype = choose_dtype(checkpoint.config, request.dtype)
    context = choose_context(checkpoint.config, request.max_context)
    generation = generation_defaults(checkpoint.config, checkpoint.generation_config)
    with stage("trace", around.log):
        traced = trace(checkpoint.config, dtype=dtype, max_context=context)
    with stage("partition", around.log):
        parts = partition(traced, generation=generation, config_sha256=checkpoint.config_sha256)
    around.log.note(f"{len(parts.model.steps)} steps, {len(parts.functions)} distinct segments")
    if request.onnx is not None:
        from moec.compiler.onnx_export import export_onnx

        with stage("onnx", around.log):
            export_onnx(parts, request.onnx)
    return parts


def _resume_key(request: CompileRequest, parts: PartitionedModel, checkpoint: Checkpoint) -> str:
    """What must be the same for an interrupted packing to go on."""
    formats = json.dumps(to_json(parts.packing.quantization), sort_keys=True)
    return f"{fingerprint(checkpoint)} {request.dtype} {request.max_context} {formats}"


def lower_for(
    name: str, parts: PartitionedModel, folder: Path, request: CompileRequest, around: Surroundings
) -> TargetRecord:
    """Lower all segments and kernels for the target called ``name``, into ``modules/<name>`` below ``folder``."""
    from moec.compiler.lowering.lower import lower
    from moec.compiler.lowering.targets import parse_target

    target = parse_target(name)
    output = folder / "modules" / name
    output.mkdir(parents=True, exist_ok=True)
    dump = None if request.dump_ir is None else request.dump_ir / name
    with stage(f"lower {name}", around.log):
        module = lower(parts.model, parts.functions, target, output, dump)
    return TargetRecord(
        name=name,
        kind=target.kind,
        architectures=target.architectures or (target.mcpu,),
        cpu_features=target.cpu_features,
        files=tuple(f"modules/{name}/{file.as_posix()}" for file in module.files),
        interface=interface(),
    )


def pack_model(
    model: str,
    modules: Path,
    output: Path,
    calibration: Calibration,
    around: Surroundings,
    *,
    force: bool = False,
) -> Manifest:
    """Make a bundle from a checkpoint and modules that were compiled elsewhere; TVM's compiler is not needed.

    Raises:
        CheckpointError: the modules were compiled for another model.
        MoecError: as ``compile_model``.
    """
    check_output(output, force=force)
    compiled = open_modules(modules)
    with stage("checkpoint", around.log):
        checkpoint = open_checkpoint(model)
        check_encodings(checkpoint)
        checkpoint = fetch_weights(checkpoint)
    if config_sha256(checkpoint.config) != compiled.packing.config_sha256:
        raise CheckpointError(
            f"{modules} was not compiled for {model}.",
            "The checkpoint's config differs from the one that the modules were made from.",
            f"Compile it again: moec compile {model} -o MODULES --modules-only",
        )
    key = f"{fingerprint(checkpoint)} {compiled.manifest.manifest_sha256}"
    with BundleWriter(output, force=force, resume_key=key) as writer:
        copy_modules(compiled, writer.folder)
        return finish_bundle(writer, checkpoint, compiled.manifest.targets, calibration, around)

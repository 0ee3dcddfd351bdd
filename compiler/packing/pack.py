"""Stage ``pack``: the checkpoint's weights, streamed into the bundle's layout."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from threadpoolctl import threadpool_limits

from moec.artifacts.sizes import exact_bytes
from moec.compiler.checkpoint import fetch_weights
from moec.compiler.packing.dense import DENSE_FILE
from moec.compiler.packing.journal import JOURNAL_FILE, Journal
from moec.compiler.packing.memory import MemoryGate
from moec.compiler.packing.output import PackedFile, Progress, Silent, writing
from moec.compiler.packing.plan import plan_pack
from moec.compiler.packing.tensors.reading import ByteSource, FileSource
from moec.compiler.packing.writing import StoppedError, Work, write_dense, write_experts
from moec.compiler.tracing.model.build import build_config, build_model
from moec.errors import BundleError, OutputError
from moec.formats import CALIBRATED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from moec.artifacts.model import ModelRecord
    from moec.artifacts.packing import PackingRecord
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.packing.calibrated import CalibratedRounding
    from moec.compiler.packing.experts import ExpertsFile
    from moec.compiler.packing.plan import PackPlan

WEIGHTS_FOLDER = "weights"
HELD_BYTES = 256 << 20
"""Most that the threads hold together beyond their read buffers, unless one matrix alone takes more."""
QUANTIZING_HELD_BYTES = 2 << 30
"""The same where they quantize: whole matrices that are not read row by row (interleaved, transposed) are held in
float32, and shall not make threads wait for each other on up to 16 cores."""
MAX_WORKERS = 4
"""Threads that copy; where they quantize, which is work for processors, there is one for each."""


@dataclass(frozen=True)
class PackResult:
    """What pack wrote."""

    files: tuple[PackedFile, ...]
    extras: tuple[str, ...]
    """Tensors of the checkpoint that were left out: known, and of no use to the model."""
    nonfinite: dict[str, int]
    """Tensor -> values in it that are NaN or infinite, as packed."""


def pack(
    checkpoint: Checkpoint,
    model: ModelRecord,
    packing: PackingRecord,
    constants: Mapping[str, torch.Tensor],
    output: Path,
    *,
    journal_folder: Path | None = None,
    progress: Progress | None = None,
    source: ByteSource | None = None,
    workers: int | None = None,
    warn: Callable[[str, int], None] | None = None,
    calibrated: CalibratedRounding | None = None,
) -> PackResult:
    """Write ``weights/`` of a bundle into ``output``.

    Every byte of the checkpoint is read at most once, in pieces; memory does not depend on the model's size.
    Killed and run again with the same arguments, pack goes on where it was, and the bytes are the same. For
    that it keeps ``pack-journal.jsonl``, also when it is done; ``forget_journal`` removes it.

    Args:
        checkpoint: where the weights are.
        model: the chain that was compiled.
        packing: how its weights are made.
        constants: the tensors of ``constants.safetensors``.
        output: the bundle's folder, made if missing.
        journal_folder: where the journal is kept instead of in ``output``; it must exist.
        progress: hears about bytes written.
        source: reads the checkpoint's files.
        workers: threads, each writing a file at a time.
        warn: told, once a tensor, that it holds so many values that are NaN or infinite (the result says it too).
        calibrated: rounds experts, where the record's method wants to know what enters them.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen (nothing is written then), or a file is
            damaged.
        OutputError: the disk is too small or full, or the folder cannot be written.
        BundleError: the records do not belong together.
    """
    method = packing.quantization.method if packing.quantization else None
    if method in CALIBRATED and calibrated is None:
        raise BundleError(
            f"These modules want weights that the method {method} rounded.",
            "It runs the model on calibration prompts, which packing by itself does not.",
            "Compile the whole bundle with moec compile, or other modules without this method.",
        )
    checkpoint = fetch_weights(checkpoint)
    meta = build_model(build_config(checkpoint.config), getattr(torch, model.dtype))
    plan = plan_pack(checkpoint, model, packing, constants, meta)
    weights = output / WEIGHTS_FOLDER
    with writing(weights):
        weights.mkdir(parents=True, exist_ok=True)
        identity = f"{plan.identity} {calibrated.identity}" if calibrated else plan.identity
        journal = Journal((journal_folder or output) / JOURNAL_FILE, identity)
        if not journal.resumed:
            _remove_own_files(weights)
        _check_space(weights, plan.size_bytes)
    watched = _Serial(progress or Silent())
    gate = MemoryGate(QUANTIZING_HELD_BYTES if plan.quantizers else HELD_BYTES)
    work = Work(
        plan,
        constants,
        meta,
        source or FileSource(),
        weights,
        journal,
        watched,
        gate.hold,
        warn or _nothing,
        calibrated,
    )
    watched.start(plan.size_bytes)
    try:
        done = _run(work, workers or _workers(plan, calibrated))
    finally:
        watched.close()
    nonfinite = {name: count for _, found in done for name, count in found.items()}
    return PackResult(tuple(sorted((f for f, _ in done), key=lambda f: f.path)), plan.extras, nonfinite)


def check_weights(
    checkpoint: Checkpoint, model: ModelRecord, packing: PackingRecord, constants: Mapping[str, torch.Tensor]
) -> None:
    """Hold the checkpoint's tensor table against what packing will need, before any other work is spent on it.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen.
    """
    meta = build_model(build_config(checkpoint.config), getattr(torch, model.dtype))
    plan_pack(checkpoint, model, packing, constants, meta)


def forget_journal(folder: Path) -> None:
    """Remove the journal that pack keeps in ``folder`` to resume; the weights are complete without it."""
    with writing(folder):
        (folder / JOURNAL_FILE).unlink(missing_ok=True)


def _run(work: Work, workers: int) -> list[tuple[PackedFile, dict[str, int]]]:
    """Write all files; the first error stops every thread at its next piece."""
    # The threads are the parallelism: a team of torch or numpy for each of them would only be in the way, unless there
    # are few of them for want of memory.
    team = max(1, len(os.sched_getaffinity(0)) // workers) if work.calibrated else 1
    with (
        threadpool_limits(team, "blas"),
        ThreadPoolExecutor(workers, "moec-pack", torch.set_num_threads, (team,)) as pool,
    ):
        futures = [pool.submit(_write_file, work, layer) for layer in (None, *work.plan.experts)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            work.stop.set()
            for future in futures:
                future.cancel()
    finished = [future for future in futures if not future.cancelled()]
    for future in finished:
        error = future.exception()
        if error is not None and not isinstance(error, StoppedError):
            raise error
    return [future.result() for future in finished]


def _workers(plan: PackPlan, calibrated: CalibratedRounding | None) -> int:
    """Threads for the plan, at most one for each processor that this process may use."""
    cores = len(os.sched_getaffinity(0))
    if calibrated is not None:
        return max(1, min(cores, QUANTIZING_HELD_BYTES // calibrated.thread_bytes))
    return cores if plan.quantizers else min(MAX_WORKERS, cores)


def _write_file(work: Work, layer: ExpertsFile | None) -> tuple[PackedFile, dict[str, int]]:
    try:
        return write_dense(work) if layer is None else write_experts(work, layer)
    finally:
        work.hold(0)


class _Serial:
    """Passes progress on from many threads, one call at a time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()

    def start(self, total_bytes: int) -> None:
        self._progress.start(total_bytes)

    def advance(self, size_bytes: int) -> None:
        with self._lock:
            self._progress.advance(size_bytes)

    def close(self) -> None:
        self._progress.close()


def _nothing(tensor: str, count: int) -> None:
    """Warn nobody."""


def _remove_own_files(weights: Path) -> None:
    for pattern in (DENSE_FILE, "experts-*.bin"):
        for name in (pattern, f"{pattern}.part"):
            for path in weights.glob(name):
                path.unlink()


def _check_space(weights: Path, size_bytes: int) -> None:
    present = sum(path.stat().st_size for path in weights.iterdir())
    free = shutil.disk_usage(weights).free
    lacking = size_bytes - present - free
    if lacking > 0:
        raise OutputError(
            f"The disk of {weights} is {exact_bytes(lacking)} too small.",
            f"The weights take {exact_bytes(size_bytes)}, {exact_bytes(free)} are free.",
            "Free some space, or write elsewhere.",
        )

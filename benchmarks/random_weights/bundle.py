"""A bundle with random weights, straight from compiled modules: no checkpoint, no torch, every core.

It needs numpy, `moec.artifacts` and `moec.formats` alone, so that it runs where a kit does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.random_weights.derived import DerivedTensors
from benchmarks.random_weights.safetensors_files import NewTensor, header, read_small
from benchmarks.random_weights.values import DEVIATION, POOL_VALUES, RandomPools, all_cores, bfloat16_bits
from moec.artifacts.files.manifest import MANIFEST_NAME, FileRecord, render_manifest
from moec.artifacts.files.reader import open_modules
from moec.artifacts.files.records import write_record
from moec.artifacts.files.safetensors import TENSOR_ALIGNMENT
from moec.artifacts.files.verify import hash_files
from moec.artifacts.files.writer import check_output
from moec.artifacts.layout.experts import layout
from moec.artifacts.model import DTYPE_BYTES
from moec.artifacts.paths import CONSTANTS_NAME, DENSE_NAME, WEIGHTS_FOLDER, experts_name
from moec.artifacts.schedule import LayerProfile, RoutingProfile, ScheduleRecord
from moec.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from moec.artifacts.files.bundle import Modules
    from moec.artifacts.model import ExpertBody, ModelRecord
    from moec.artifacts.packing import DenseTensor

SCHEDULE_NAME = "schedule.json"
CONSTANT = "constant:"


def write_bundle(
    modules: Path,
    output: Path,
    *,
    deviation: float = DEVIATION,
    pool_values: int = POOL_VALUES,
    workers: int | None = None,
    alike: bool = False,
    force: bool = False,
) -> int:
    """Write the bundle; norms are 1, constants what they are, everything else is random.

    The files are hashed as they are written, so that the bundle verifies, but not flushed to the disk.

    Args:
        modules: what ``moec compile --modules-only`` made.
        output: the bundle's folder.
        deviation: standard deviation of weights.
        pool_values: random values before they repeat.
        workers: threads; all cores by default.
        alike: experts of all layers of a shape are one file under several names: where memory or a disk does not hold
            them all. What moves and where to stays the same.
        force: replace a bundle that is there.

    Returns:
        Bytes of weights.
    """
    check_output(output, force=force)
    compiled = open_modules(modules)
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / WEIGHTS_FOLDER).mkdir(parents=True)
    _copy(compiled, staging)
    write_record(uniform_schedule(compiled.model), staging / SCHEDULE_NAME)
    pools = RandomPools(pool_values, deviation)
    weights = write_weights(compiled, staging, pools, workers or all_cores(), alike=alike)
    files = compiled.manifest.files | hash_files(staging, [SCHEDULE_NAME]) | weights
    manifest = dataclasses.replace(compiled.manifest, contents="bundle", files=dict(sorted(files.items())))
    (staging / MANIFEST_NAME).write_bytes(render_manifest(manifest))
    shutil.rmtree(output, ignore_errors=True)
    staging.rename(output)
    return sum(record.size_bytes for record in weights.values())


def uniform_schedule(model: ModelRecord) -> ScheduleRecord:
    """Every expert is taken to be used alike, and nothing is planned."""
    layers = tuple(
        LayerProfile(
            layer.layer,
            tuple(range(layer.experts)),
            (layer.top_k / layer.experts,) * layer.experts,
            (layer.top_k / layer.experts,) * layer.experts,
            (),
        )
        for layer in model.experts
    )
    return ScheduleRecord(RoutingProfile("uniform", 0, 0, layers), ())


def _copy(modules: Modules, folder: Path) -> None:
    for name in modules.manifest.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(modules.path / name, folder / name)


def write_weights(
    modules: Modules, folder: Path, pools: RandomPools, workers: int, *, alike: bool = False
) -> dict[str, FileRecord]:
    """Write ``weights/`` below ``folder``, a file a thread; sizes and hashes by the path in the bundle."""
    model = modules.model
    bodies = {body.name: body for body in model.bodies}
    for dtype in sorted({body.dtype for body in model.bodies} | {t.dtype for t in modules.packing.dense}):
        if dtype.startswith(("bfloat", "float")):
            pools.pool(dtype)
    for name, columns in _quantized(modules):
        pools.rows(name, columns)
    constants = read_small(modules.path / CONSTANTS_NAME)
    place = 0
    first: dict[tuple[str, int], str] = {}
    links: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as threads:
        pieces = _dense_pieces(modules.packing.dense, pools, constants)
        futures = {DENSE_NAME: threads.submit(_write, folder / DENSE_NAME, pieces)}
        for layer in model.experts:
            body = bodies[layer.body]
            path = experts_name(layer.layer)
            if alike and (own := first.setdefault((body.name, layer.experts), path)) != path:
                links[path] = own
                continue
            values = expert_pieces(layer.experts, body, pools, place)
            futures[path] = threads.submit(_write, folder / path, values)
            place += layer.experts * layout(body).stride_bytes
        written = {path: future.result() for path, future in futures.items()}
    for path, own in links.items():
        (folder / path).hardlink_to(folder / own)
    return written | {path: written[own] for path, own in links.items()}


def _quantized(modules: Modules) -> set[tuple[str, int]]:
    """Formats of weights, and the columns that these have."""
    found = {
        (tensor.format, tensor.shape[1]) for tensor in modules.packing.dense if tensor.format is not None
    }
    for body in modules.model.bodies:
        if body.format is not None:
            found |= {(body.format, body.hidden), (body.format, body.intermediate)}
    return found


def expert_pieces(
    count: int, body: ExpertBody, pools: RandomPools, place: int
) -> Iterator[memoryview | bytes]:
    """``count`` experts, one after the other; padding of plain ones is random as well."""
    shape = layout(body)
    if body.format is None:
        yield from pools.pool(body.dtype).pieces(place, count * shape.stride_bytes // DTYPE_BYTES[body.dtype])
        return
    columns = {"gate": body.hidden, "up": body.hidden, "down": body.intermediate}
    for expert in range(count):
        written = 0
        for part in shape.parts:
            yield bytes(part.offset_bytes - written)
            where = place + expert * shape.stride_bytes + part.offset_bytes
            if part.name in columns:
                yield from pools.rows(body.format, columns[part.name]).pieces(where, part.shape[0])
            else:
                yield from pools.pool(body.dtype).pieces(where, part.shape[0])
            written = part.offset_bytes + part.size_bytes
        yield bytes(shape.stride_bytes - written)


def _write(path: Path, pieces: Iterable[memoryview | bytes]) -> FileRecord:
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[file.write(rest) :]
            digest.update(piece)
            size += len(piece)
    return FileRecord(size, digest.hexdigest())


def _dense_pieces(
    tensors: tuple[DenseTensor, ...], pools: RandomPools, constants: dict[str, bytes]
) -> Iterable[memoryview | bytes]:
    """``dense.safetensors`` from front to back."""
    stored = [tensor.spec.stored for tensor in tensors]
    named = zip(tensors, stored, strict=True)
    new = [NewTensor(tensor.name, spec.dtype, tuple(map(int, spec.shape))) for tensor, spec in named]
    beginning, gaps = header(new, TENSOR_ALIGNMENT)
    yield beginning
    place, derived = 0, DerivedTensors()
    for tensor, gap in zip(tensors, gaps, strict=True):
        yield bytes(gap)
        count = math.prod(tensor.shape)
        known = _known_bytes(tensor, count, constants)
        if tensor.format is not None:
            yield from pools.rows(tensor.format, tensor.shape[1]).pieces(place, tensor.shape[0])
            place += count
        elif known is not None:
            yield known
        elif (values := derived.values(tensor, pools.pool(tensor.dtype), place)) is not None:
            yield values.tobytes()
            place += count
        else:
            yield from pools.pool(tensor.dtype).pieces(place, count)
            place += count


def _known_bytes(tensor: DenseTensor, count: int, constants: dict[str, bytes]) -> bytes | None:
    """What is not random: constants, norms, and integers."""
    if all(source.startswith(CONSTANT) for source in tensor.sources):
        if tensor.steps or len(tensor.sources) != 1:
            raise BundleError(
                f"{tensor.name} cannot be written.",
                "It is computed from constants, which needs torch.",
                "Write a checkpoint, and pack that.",
            )
        return constants[tensor.sources[0].removeprefix(CONSTANT)]
    if len(tensor.shape) == 1 and any("norm" in source for source in tensor.sources):
        ones: Any = np.ones(count, np.float32)
        if tensor.dtype == "bfloat16":
            return bfloat16_bits(ones).tobytes()
        return bytes(ones.astype(tensor.dtype).tobytes())
    return None if tensor.dtype.startswith(("bfloat", "float")) else bytes(count * DTYPE_BYTES[tensor.dtype])

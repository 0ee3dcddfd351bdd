"""A checkpoint with random weights, in the layout that models of its type are published in.

Names and shapes come from transformers' model on the meta device and its own conversion to the published layout;
the model never exists in memory, and each file is streamed by a thread of its own.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from benchmarks.random_weights.safetensors_files import NewTensor, header
from benchmarks.random_weights.values import POOL_VALUES, RandomPools, all_cores

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

SHARD_BYTES = 2_000_000_000
MXFP4_BLOCK = 32
MXFP4_SCALE = 120
"""Exponent of a block's scale, 127 meaning 1: four-bit values have a root mean square of 2.9, weights one of 0.02."""


def write_checkpoint(
    config: Path,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    pool_values: int = POOL_VALUES,
    workers: int | None = None,
) -> int:
    """Write ``config.json`` and the shards of a model.

    Args:
        config: a published ``config.json``.
        folder: made if missing.
        dtype: of weights.
        shard_bytes: largest size of a file, unless one tensor is larger.
        pool_values: random values before they repeat.
        workers: threads; all cores by default.

    Returns:
        Bytes of weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, folder / "config.json")
    shards = split(published_tensors(folder, dtype), shard_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    pools = RandomPools(pool_values)
    for kind in sorted({t.dtype for shard in shards for t in shard if t.dtype != "uint8"}):
        pools.pool(kind)
    place, jobs = 0, []
    with ThreadPoolExecutor(workers or all_cores()) as threads:
        for name, shard in zip(names, shards, strict=True):
            jobs.append(threads.submit(_write, folder / name, _pieces(shard, pools, place)))
            place += sum(tensor.values for tensor in shard)
        for job in jobs:
            job.result()
    total = sum(tensor.size_bytes for shard in shards for tensor in shard)
    index = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    record = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(record, indent=1) + "\n")
    return total


def published_tensors(folder: Path, dtype: str) -> list[NewTensor]:
    """Every tensor of the checkpoint whose ``config.json`` is in ``folder``, in the model's order."""
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    mxfp4 = (getattr(config, "quantization_config", None) or {}).get("quant_method") == "mxfp4"
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    tied = set(model.all_tied_weights_keys)
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    tensors = [
        NewTensor(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
        for name, value in revert_weight_conversion(model, state).items()
    ]
    return [one for tensor in tensors for one in (_mxfp4(tensor) if mxfp4 else [tensor])]


def _mxfp4(tensor: NewTensor) -> list[NewTensor]:
    """The experts' matrices ``[E, in, out]`` as they are stored: ``[E, out, in]`` in blocks of 32 values."""
    if not tensor.name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return [tensor]
    experts, inner, outer = tensor.shape
    blocks = (experts, outer, inner // MXFP4_BLOCK)
    return [
        NewTensor(f"{tensor.name}_blocks", "uint8", (*blocks, MXFP4_BLOCK // 2)),
        NewTensor(f"{tensor.name}_scales", "uint8", blocks),
    ]


def split(tensors: Iterable[NewTensor], shard_bytes: int) -> list[list[NewTensor]]:
    """Tensors in order, in files of at most ``shard_bytes`` unless one alone is larger."""
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size_bytes
    return shards


def _pieces(tensors: list[NewTensor], pools: RandomPools, place: int) -> Iterator[memoryview | bytes]:
    beginning, _ = header(tensors)
    yield beginning
    for number, tensor in enumerate(tensors):
        if tensor.name.endswith("norm.weight"):
            yield torch.ones(tensor.values, dtype=getattr(torch, tensor.dtype)).view(torch.uint8).numpy().data
        elif tensor.name.endswith("_scales"):
            yield bytes([MXFP4_SCALE]) * tensor.values
        elif tensor.dtype == "uint8":
            yield np.random.Generator(np.random.SFC64(place + number)).bytes(tensor.values)
        else:
            yield from pools.pool(tensor.dtype).pieces(place, tensor.values)
        place += tensor.values


def _write(path: Path, pieces: Iterable[memoryview | bytes]) -> None:
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[file.write(rest) :]

"""How much memory packing takes: a checkpoint of any size is generated and packed in a process of its own.

    python -m benchmarks.pack_memory --gigabytes 6 --quantization int4

writes ``benchmarks/results/pack_memory.json``, or with a quantization ``pack_memory-<quantization>.json``. Peak
resident memory is the kernel's ``VmHWM`` of that process, mapped file pages included (``ru_maxrss`` would begin at the
parent's, which exec hands on).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.support.common import print_rows, write_result

if TYPE_CHECKING:
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.packing import PackingRecord

ROOT = Path(__file__).parent.parent
SHARD_BYTES = 1 << 30
_BLOCK_BYTES = 16 << 20


def config_of(layers: int, hidden: int = 2048, intermediate: int = 4096, experts: int = 16) -> dict[str, Any]:
    """The config.json of a Qwen3-MoE; its experts take ``6 * hidden * intermediate`` bytes each."""
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "moe_intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": hidden // 16,
        "num_experts": experts,
        "num_experts_per_tok": 2,
    }


def generate(folder: Path, size_bytes: int) -> int:
    """Write a sharded checkpoint of about ``size_bytes``; its exact size in bytes."""
    folder.mkdir(parents=True)
    config = config_of(max(size_bytes // 818_000_000, 1))
    if size_bytes < 800_000_000:
        intermediate = max(size_bytes // (3 * 6 * 16 * 512) // 64 * 64, 64)
        config = config_of(3, hidden=512, intermediate=intermediate) | {"vocab_size": 1000}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = _shapes(config)
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(shapes):  # as save_pretrained: experts 0, 1, 10, 11, ..., 2, ...
        size = _size(shapes[name])
        if filled + size > SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, {name: shapes[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return sum(map(_size, shapes.values()))


def measure(*checkpoints: Path, quantization: str | None = None) -> list[dict[str, Any]]:
    """Pack the checkpoints one after the other in a fresh process, each into ``packed`` beside it.

    The peak resident bytes before and after each, and the seconds that it and all its threads took.
    """
    command = [sys.executable, "-m", "benchmarks.pack_memory", "--child", *map(str, checkpoints)]
    command += [] if quantization is None else ["--quantization", quantization]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result: list[dict[str, Any]] = json.loads(ran.stdout)
    return result


def pack_here(checkpoint: Path, output: Path, quantization: str | None = None) -> dict[str, Any]:
    """Pack in this process, with records made from the config alone.

    With a quantization, its recipe's formats are those of experts, and of all other matrices of the checkpoint.
    """
    import torch

    from moec.compiler.checkpoint import open_checkpoint
    from moec.compiler.packing import pack
    from tests.support.packing_records import meta_model, records

    opened = open_checkpoint(checkpoint)
    model, packing = records(meta_model(opened.config, torch.bfloat16), opened.config)
    if quantization is not None:
        model, packing = _quantized(model, packing, quantization)
    before = _peak_bytes()
    start, started = time.perf_counter(), time.process_time()
    packed = pack(opened, model, packing, {"table": torch.zeros(3)}, output)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - started
    return {
        "resident_before_bytes": before,
        "resident_peak_bytes": _peak_bytes(),
        "packed_bytes": sum(file.size_bytes for file in packed.files),
        "seconds": seconds,
        "processor_seconds": processor_seconds,
    }


def _quantized(
    model: ModelRecord, packing: PackingRecord, quantization: str
) -> tuple[ModelRecord, PackingRecord]:
    from moec.compiler.quantization import policy_named

    policy = policy_named(quantization)
    experts, dense = policy.format_for("", "experts"), policy.format_for("", "linear")
    tensors = tuple(
        dataclasses.replace(tensor, format=dense) if len(tensor.shape) > 1 else tensor
        for tensor in packing.dense
    )
    bodies = tuple(dataclasses.replace(body, format=experts) for body in model.bodies)
    return (
        dataclasses.replace(model, bodies=bodies),
        dataclasses.replace(packing, dense=tensors, quantization=policy),
    )


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the real checkpoints of this type have them."""
    from tests.support.packing_records import meta_model

    result: dict[str, tuple[int, ...]] = {}
    for name, value in meta_model(config).state_dict().items():
        shape = tuple(value.shape)
        if name.endswith("experts.gate_up_proj"):
            for expert in range(shape[0]):
                for part in ("gate_proj", "up_proj"):
                    result[name.replace("gate_up_proj", f"{expert}.{part}.weight")] = (
                        shape[1] // 2,
                        shape[2],
                    )
        elif name.endswith("experts.down_proj"):
            for expert in range(shape[0]):
                result[name.replace("down_proj", f"{expert}.down_proj.weight")] = shape[1:]
        else:
            result[name] = shape
    return result


def _size(shape: tuple[int, ...]) -> int:
    size = 2
    for extent in shape:
        size *= extent
    return size


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import torch

    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + _size(shape)]}
        end += _size(shape)
    text = json.dumps(header).encode()
    values = torch.randn(_BLOCK_BYTES // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    block = values.view(torch.uint8).numpy().data
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= file.write(block[: min(end, len(block))])


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def main() -> None:
    """Run the measurement, or with ``--child`` its inner process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--quantization", help="as for moec compile, by name")
    parser.add_argument("--scratch", type=Path, default=None, help="where the checkpoint and the weights go")
    parser.add_argument(
        "--child", type=Path, nargs="+", metavar="CHECKPOINT", help="pack these, print figures"
    )
    options = parser.parse_args()
    if options.child:
        done = [pack_here(folder, folder.parent / "packed", options.quantization) for folder in options.child]
        print(json.dumps(done))
        return
    scratch = Path(tempfile.mkdtemp(prefix="moec-pack-", dir=options.scratch))
    try:
        size = generate(scratch / "model", int(options.gigabytes * 1e9))
        result = measure(scratch / "model", quantization=options.quantization)[0]
    finally:
        shutil.rmtree(scratch)
    row = {
        "checkpoint GB": size / 1e9,
        "quantization": options.quantization or "none",
        "packed GB": result["packed_bytes"] / 1e9,
        "GB/s": size / 1e9 / result["seconds"],
        "GB/s of a core": size / 1e9 / result["processor_seconds"],
        "peak resident MiB": result["resident_peak_bytes"] / 2**20,
        "of it before packing MiB": result["resident_before_bytes"] / 2**20,
    }
    name = "pack_memory" + (f"-{options.quantization}" if options.quantization else "")
    path = write_result(name, [row], **result)
    print_rows([row])
    print(path)


if __name__ == "__main__":
    main()

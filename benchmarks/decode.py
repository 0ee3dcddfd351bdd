"""Decode and prefill on the CPU, end to end, beside the memory's speed and transformers eager in the same run.

python benchmarks/make_checkpoint.py qwen3-moe-2gb /tmp/qwen3-moe-2gb
python benchmarks/decode.py /tmp/qwen3-moe-2gb
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.common import print_rows, write_result
from moec.runtime.threads import default_threads


def run_moec(bundle: Path, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """``moec bench`` in a process of its own."""
    command = [sys.executable, "-m", "moec", "bench", str(bundle), "--json"]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    result: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return result


def run_transformers(model: Path, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Seconds of transformers eager for the same work, with its cache, in bfloat16."""
    code = f"""
import json, time, torch, transformers
torch.set_num_threads({default_threads()})
m = transformers.AutoModelForCausalLM.from_pretrained({str(model)!r}, dtype=torch.bfloat16,
    attn_implementation="eager", experts_implementation="eager").eval()
ids = torch.randint(0, m.config.vocab_size, (1, {prompt_tokens}))
with torch.inference_mode():
    m(ids[:, :8])
    t = time.perf_counter(); o = m(ids, use_cache=True, logits_to_keep=1); prefill = time.perf_counter() - t
    steps = []
    for _ in range({new_tokens}):
        t = time.perf_counter()
        o = m(o.logits[:, -1:].argmax(-1), past_key_values=o.past_key_values, use_cache=True)
        steps.append(time.perf_counter() - t)
print(json.dumps(dict(prefill=prefill, steps=steps)))
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    return {"prefill": found["prefill"], "step": median(found["steps"])}


def compile_bundle(model: Path, output: Path) -> float:
    """Compile without calibration; seconds."""
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "moec",
        "compile",
        str(model),
        "-o",
        str(output),
        "--calibration",
        "none",
    ]
    subprocess.run([*command, "--target", "cpu"], check=True)
    return time.perf_counter() - start


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--new-tokens", default=48, show_default=True)
@click.option(
    "--repeats", default=3, show_default=True, help="Interleaved runs of each system; medians count."
)
def main(model: Path, prompt_tokens: int, new_tokens: int, repeats: int) -> None:
    """Compile MODEL into a temporary bundle and measure it."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        bundle = Path(folder, "model.moec")
        seconds = compile_bundle(model, bundle)
        ours, theirs = [], []
        for _ in range(repeats):
            ours.append(run_moec(bundle, prompt_tokens, new_tokens))
            theirs.append(run_transformers(model, prompt_tokens, new_tokens))
    decode = median(run["decode_ms_per_step"] for run in ours)
    reference = median(run["step"] for run in theirs) * 1e3
    floor = median(run["floor_ms_per_step"] for run in ours)
    rows = [
        {"system": "floor (active bytes / read bandwidth)", "decode ms/token": floor, "over floor": 1.0},
        {
            "system": "moec",
            "decode ms/token": decode,
            "over floor": median(run["ratio_to_floor"] for run in ours),
        },
        {"system": "transformers eager", "decode ms/token": reference, "over floor": reference / floor},
    ]
    prefill = {
        "moec_tokens_per_s": median(run["prefill_tokens_per_s"] for run in ours),
        "transformers_tokens_per_s": prompt_tokens / median(run["prefill"] for run in theirs),
    }
    path = write_result(
        f"decode-cpu-{model.name}",
        rows,
        prefill=prefill,
        compile_seconds=seconds,
        model_bytes=sum(file.stat().st_size for file in model.glob("*.safetensors")),
        read_bandwidth_gb_s=median(run["read_bandwidth_gb_s"] for run in ours),
        active_bytes_per_token=ours[0]["active_bytes_per_token"],
        runs=[{key: value for key, value in run.items() if key != "stats"} for run in ours],
    )
    print_rows(rows)
    print(f"prefill: {prefill}\n{path}")


if __name__ == "__main__":
    main()

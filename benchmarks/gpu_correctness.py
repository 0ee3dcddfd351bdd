"""The bundles of ``.carry/tiny`` on a GPU, held against what transformers computed where they were compiled.

    python -m benchmarks.gpu_correctness [--device cuda:0] [--within SECONDS] [NAMES...]

Each model runs in a process of its own, in several ways: with large steps (prefill kernels) and with steps of four
tokens (decode kernels), all experts resident; on a GPU also with room for a quarter of them, the others over the link
or with the CPU's help. Held to: argmax agreement; logits within 2e-2, relative, at 99 % of the positions; perplexity
of the trained example; same bits twice; over the link alone the bits of the resident run, with the CPU's help its
argmaxes: who computes an expert follows from what the GPU has then, so bits may differ from run to run. The CPU
computes half of the missing experts whatever they cost it, for by their cost it would have none of a tiny model's.

Where two experts' scores are closer than 16 bits can tell, another one is chosen and the token's logits are others. So
transformers' own error in 16 bits stands beside ours: a model that misses a bound which transformers misses by as much
is ``as transformers`` instead of ``ok``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import click
import numpy as np

from benchmarks.support.budgets import limit_of_share
from benchmarks.support.common import print_rows, write_result
from benchmarks.support.references import Reference, load_reference, perplexity, position_errors
from moec import runtime
from moec.artifacts.words.slots import MOST_SHARED
from moec.runtime.devices.cuda.offload import helping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from moec.runtime import Model

TINY = Path(__file__).parents[1] / ".carry" / "tiny"
EXAMPLE_NAME = "example"
LEAST_AGREEMENT = 0.99
MOST_ERROR = 2e-2
MOST_PERPLEXITY_ERROR = 5e-3
LEAST_OF_RESIDENT = 0.998
"""Of argmaxes with the CPU's help, a model; one of 512 positions may be another one's. Over all models: 0.999."""
PASSED = ("ok", "as transformers")
DEVICE_MEMORY = "2GiB"
CACHE_TOKENS = 1024
SECONDS = 300
AT_ONCE = 4


@dataclass(frozen=True)
class Way:
    """How a model is loaded."""

    batch: int
    step_tokens: int
    share: float = 1.0
    """Of the experts, on the GPU."""
    threads: int = 0
    """Of the CPU, for experts that are not."""
    resident: str = ""
    """Name of the way with all experts that has steps of the same size."""


WAYS = {
    "prefill": Way(8, 512),
    "decode": Way(1, 4),
    "prefill, 25 %, link": Way(8, 512, 0.25, resident="prefill"),
    "decode, 25 %, link": Way(1, 4, 0.25, resident="decode"),
    "decode, 25 %, CPU helps": Way(1, 4, 0.25, 2, resident="decode"),
}


@click.command()
@click.argument("names", nargs=-1)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), default=TINY, show_default=True)
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--at-once", default=AT_ONCE, show_default=True, help="Processes side by side.")
@click.option("--within", type=float, default=None, help="Seconds after which no model is waited for.")
@click.option("--one", is_flag=True, hidden=True, help="Check the one model in this process, print JSON.")
def main(
    names: tuple[str, ...], folder: Path, device: str, at_once: int, within: float | None, one: bool
) -> None:
    """Check the models NAMES, or all."""
    if one:
        print(json.dumps(check(folder, names[0], device)))
        return
    names = names or tuple(sorted(path.stem for path in folder.glob("*.npz")))
    end = float("inf") if within is None else time.monotonic() + within
    with ThreadPoolExecutor(at_once) as threads:
        rows = [
            row
            for found in threads.map(lambda name: _in_process(folder, name, device, end), names)
            for row in found
        ]
    path = write_result(f"gpu_correctness-{device.partition(':')[0]}", rows)
    print_rows(rows)
    helped = [row["of resident"] for row in rows if "CPU" in row["way"]]
    if helped:
        print(f"with the CPU's help {np.mean(helped):.4%} of the argmaxes are those of the resident runs")
    failed = sorted({row["model"] for row in rows if row["verdict"] not in PASSED})
    print(
        f"{path}\n{len(names) - len(failed)} of {len(names)} models pass"
        + (f"; not: {failed}" if failed else "")
    )
    sys.exit(bool(failed))


def check(folder: Path, name: str, device: str) -> list[dict[str, Any]]:
    """Run one bundle every way that the device has; rows of the table."""
    reference = load_reference(folder / f"{name}.npz")
    rows: list[dict[str, Any]] = []
    logits: dict[str, NDArray[np.float32]] = {}
    bundle = folder / f"{name}.moec"
    for label, way in WAYS.items():
        step_tokens = way.step_tokens
        if reference.sources is not None:
            # A source, and a prompt whose tokens compete for the capacity of experts, are in one step.
            step_tokens = max(step_tokens, *reference.sources.shape, *reference.sequences.shape)
        if way.share < 1 and not device.startswith("cuda"):
            continue
        options: dict[str, Any] = {
            "device": device,
            "max_batch": way.batch,
            "max_step_tokens": step_tokens,
        }
        options["cache_tokens"] = CACHE_TOKENS
        if device.startswith("cuda"):
            options |= {"cpu_threads": way.threads, "device_memory": DEVICE_MEMORY}
        if way.share < 1:
            options["device_memory"] = limit_of_share(
                bundle,
                way.share,
                way.threads,
                max_batch=way.batch,
                step_tokens=step_tokens,
                cache_tokens=CACHE_TOKENS,
            )
        with half_by_cpu(), runtime.load(bundle, **options) as model:
            facts, logits[label] = run(model, reference)
            misses, by_cpu = model.stats.misses, model.stats.cpu_misses
        facts = {"model": name, "way": label} | facts
        if way.resident:
            same = logits[label].argmax(-1) == logits[way.resident].argmax(-1)
            facts["of resident"] = float(same.mean())
            facts["misses"] = misses
            if way.threads:
                facts["by the CPU"] = by_cpu
            else:
                facts["same bits"] &= bool(np.array_equal(logits[label], logits[way.resident]))
        rows.append(facts | {"verdict": verdict(facts)})
    return rows


@contextmanager
def half_by_cpu() -> Iterator[None]:
    """Let models that are loaded inside give the CPU half of a layer's missing experts, where it helps at all."""
    shares = tuple((misses + 1) // 2 for misses in range(MOST_SHARED + 1))
    with patch.object(helping, "cpu_shares", lambda *_: shares):
        yield


def run(model: Model, reference: Reference) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """What a model makes of the reference's sequences, and its logits."""
    first, second = teacher_forced(model, reference), teacher_forced(model, reference)
    greedy = model.generate(
        reference.prompt, max_new_tokens=len(reference.greedy), do_sample=False, eos_token_id=[]
    )[0, -len(reference.greedy) :]
    errors = position_errors(first, reference.logits)
    facts = {
        "agreement": float((first.argmax(-1) == reference.logits.argmax(-1)).mean()),
        "transformers'": reference.stored_agreement,
        "median error": float(np.median(errors)),
        "error at 99 %": float(np.quantile(errors, LEAST_AGREEMENT)),
        "of transformers": float(np.quantile(reference.stored_errors, LEAST_AGREEMENT)),
        "perplexity": perplexity(reference.sequences, first),
        "perplexity of transformers": reference.perplexity,
        "greedy tokens equal": common_prefix(greedy, reference.greedy),
        "same bits": bool(np.array_equal(first, second)),
    }
    return facts, first


def teacher_forced(model: Model, reference: Reference) -> NDArray[np.float32]:
    """Logits ``[S, L, V]``."""
    if reference.sources is None:
        return np.stack([np.asarray(model.forward(ids.tolist()))[0] for ids in reference.sequences])
    pairs = zip(reference.sources, reference.sequences, strict=True)
    return np.stack([np.asarray(model.forward(source.tolist(), ids.tolist()))[0] for source, ids in pairs])


def common_prefix(found: NDArray[np.int64], expected: NDArray[np.int64]) -> int:
    """Tokens until the first that differs."""
    differing = np.flatnonzero(found != expected)
    return int(differing[0]) if differing.size else len(expected)


def verdict(facts: dict[str, Any]) -> str:
    """``ok``, ``as transformers``, or what is out of its bound; what is not a number is."""
    problems, excused = [], False
    for problem, good, theirs in (
        ("agreement", facts["agreement"] >= LEAST_AGREEMENT, facts["agreement"] >= facts["transformers'"]),
        (
            "logits",
            facts["error at 99 %"] <= MOST_ERROR,
            facts["error at 99 %"] <= facts["of transformers"],
        ),
    ):
        excused |= not good and theirs
        if not good and not theirs:
            problems.append(problem)
    if not facts["same bits"] and "by the CPU" not in facts:
        problems.append("bits")
    if not facts.get("by the CPU", 1):
        problems.append("nothing was computed by the CPU")
    if not facts.get("misses", 1):
        problems.append("nothing was offloaded")
    if not facts.get("of resident", 1.0) >= LEAST_OF_RESIDENT:
        problems.append("of resident")
    off = abs(facts["perplexity"] / facts["perplexity of transformers"] - 1)
    if facts["model"] == EXAMPLE_NAME and not off <= MOST_PERPLEXITY_ERROR:
        problems.append("perplexity")
    return ", ".join(problems) or PASSED[excused]


def _in_process(folder: Path, name: str, device: str, end: float) -> list[dict[str, Any]]:
    """A GPU's error ends its process: it must not take the other models with it."""
    seconds = min(SECONDS, end - time.monotonic())
    command = [sys.executable, "-m", "benchmarks.gpu_correctness", "--one", "--folder", str(folder)]
    try:
        done = subprocess.run(
            [*command, "--device", device, name],
            capture_output=True,
            text=True,
            timeout=max(seconds, 0.1),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [{"model": name, "way": "", "verdict": f"no answer in {max(seconds, 0):.0f} s"}]
    if done.returncode:
        print(f"{name}:\n{done.stderr[-1500:]}", file=sys.stderr)
        return [{"model": name, "way": "", "verdict": "failed"}]
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


if __name__ == "__main__":
    main()

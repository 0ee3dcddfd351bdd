"""The bundles of ``.carry/tiny`` on a GPU, held against what transformers computed where they were compiled.

    python -m benchmarks.gpu_correctness [--device cuda:0] [NAMES...]

Each model runs in a process of its own, three times: with large steps (prefill kernels), with steps of four tokens
(decode kernels), and on a GPU with such steps and slots for a quarter of the experts, whose logits must be those of the
resident run, bit for bit. Held to: argmax agreement; logits within 2e-2, relative, at 99 % of the positions (where two
experts' scores are closer than a 16-bit cache can tell, another one is chosen and the token's logits are others: the
same bundle on the CPU has two such in 512 positions of the tiny gpt-oss); perplexity of the trained example; same bits
twice.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.budgets import device_limit
from benchmarks.common import print_rows, write_result
from benchmarks.references import Reference, load_reference, perplexity, position_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from moec.runtime import Model

TINY = Path(__file__).parents[1] / ".carry" / "tiny"
EXAMPLE_NAME = "example"
LEAST_AGREEMENT = 0.99
MOST_ERROR = 2e-2
MOST_PERPLEXITY_ERROR = 5e-3
PATHS = {"prefill": (8, 512), "decode": (1, 4), "offloaded": (1, 4)}
"""Name of a way through the kernels to the sequences and tokens of a step that a model is loaded for."""
OFFLOADED = "offloaded"
CACHE_TOKENS = 256
"""Of a model whose experts are offloaded: what of the memory is not for experts must be the same in both runs."""
SHARE = 0.25
"""Of the experts that have a slot on the GPU where they are offloaded."""
DEVICE_MEMORY = "2GiB"
SECONDS = 300
AT_ONCE = 4


@click.command()
@click.argument("names", nargs=-1)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), default=TINY, show_default=True)
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--one", is_flag=True, hidden=True, help="Check the one model in this process, print JSON.")
def main(names: tuple[str, ...], folder: Path, device: str, one: bool) -> None:
    """Check the models NAMES, or all."""
    if one:
        ways = [path for path in PATHS if path != OFFLOADED or device.startswith("cuda")]
        print(json.dumps([check(folder, names[0], path, device) for path in ways]))
        return
    names = names or tuple(sorted(path.stem for path in folder.glob("*.npz")))
    with ThreadPoolExecutor(AT_ONCE) as threads:
        rows = [
            row
            for found in threads.map(lambda name: _in_process(folder, name, device), names)
            for row in found
        ]
    path = write_result(f"gpu_correctness-{device.partition(':')[0]}", rows)
    print_rows(rows)
    failed = sorted({row["model"] for row in rows if row["verdict"] != "ok"})
    print(
        f"{path}\n{len(names) - len(failed)} of {len(names)} models pass"
        + (f"; not: {failed}" if failed else "")
    )
    sys.exit(bool(failed))


def check(folder: Path, name: str, path: str, device: str) -> dict[str, Any]:
    """Run one bundle one way; a row of the table."""
    from moec import runtime

    reference = load_reference(folder / f"{name}.npz")
    batch, tokens = PATHS[path]
    if reference.sources is not None:
        # A source, and a prompt whose tokens compete for the capacity of experts, are in one step.
        tokens = max(tokens, *reference.sources.shape, *reference.sequences.shape)

    def load(limit: int | str | None = DEVICE_MEMORY) -> AbstractContextManager[Model]:
        return runtime.load(
            folder / f"{name}.moec",
            device=device,
            device_memory=limit if device.startswith("cuda") else None,
            max_batch=batch,
            max_step_tokens=tokens,
            cache_tokens=CACHE_TOKENS if path == OFFLOADED else None,
            cpu_threads=0 if path == OFFLOADED else None,
        )

    resident = _resident(load, reference) if path == OFFLOADED else None
    with load() if resident is None else load(resident.limit) as model:
        first, second = teacher_forced(model, reference), teacher_forced(model, reference)
        greedy = model.generate(
            reference.prompt, max_new_tokens=len(reference.greedy), do_sample=False, eos_token_id=[]
        )[0, -len(reference.greedy) :]
        misses = model.stats.misses
    errors = position_errors(first, reference.logits)
    facts = {
        "model": name,
        "path": path,
        "argmax agreement": float((first.argmax(-1) == reference.logits.argmax(-1)).mean()),
        "median error": float(np.median(errors)),
        "error at 99 %": float(np.quantile(errors, LEAST_AGREEMENT)),
        "perplexity": perplexity(reference.sequences, first),
        "of transformers": reference.perplexity,
        "greedy tokens equal": common_prefix(greedy, reference.greedy),
        "same bits": bool(np.array_equal(first, second)),
        "misses": misses,
        "bits of the resident run": resident is None or bool(np.array_equal(first, resident.logits)),
    }
    return facts | {"verdict": verdict(facts)}


@dataclass(frozen=True, eq=False)
class _Resident:
    """What a run with all experts on the GPU gave, and the memory that leaves room for ``SHARE`` of them."""

    logits: NDArray[np.float32]
    limit: int


def _resident(load: Callable[[], AbstractContextManager[Model]], reference: Reference) -> _Resident:
    with load() as model:
        return _Resident(teacher_forced(model, reference), device_limit(model, SHARE))


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
    """``ok``, or what is out of its bound; what is not a number is."""
    problems = []
    if not facts["argmax agreement"] >= LEAST_AGREEMENT:
        problems.append("agreement")
    if not facts["error at 99 %"] <= MOST_ERROR:
        problems.append("logits")
    if not facts["same bits"]:
        problems.append("bits")
    if not facts["bits of the resident run"]:
        problems.append("bits of the resident run")
    if facts["path"] == OFFLOADED and not facts["misses"]:
        problems.append("nothing was offloaded")
    off = abs(facts["perplexity"] / facts["of transformers"] - 1)
    if facts["model"] == EXAMPLE_NAME and not off <= MOST_PERPLEXITY_ERROR:
        problems.append("perplexity")
    return ", ".join(problems) or "ok"


def _in_process(folder: Path, name: str, device: str) -> list[dict[str, Any]]:
    """A GPU's error ends its process: it must not take the other models with it."""
    command = [sys.executable, "-m", "benchmarks.gpu_correctness", "--one", "--folder", str(folder)]
    try:
        done = subprocess.run(
            [*command, "--device", device, name], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return [{"model": name, "path": "", "verdict": f"no answer in {SECONDS} s"}]
    if done.returncode:
        print(f"{name}:\n{done.stderr[-1500:]}", file=sys.stderr)
        return [{"model": name, "path": "", "verdict": "failed"}]
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


if __name__ == "__main__":
    main()

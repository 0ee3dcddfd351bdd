"""moec beside llama.cpp and accelerate: the same shape, the same GPU bytes, in one run.

    python -m benchmarks.peers benchmarks/configs/deepseek-v2-lite.json --bundle bf16=v2.moec --bundle 4bit=int4.moec \
        --budget bf16=8GiB --budget 4bit=4GiB --llama-cpp build/llama_cpp_run --folder /dev/shm --accelerate

Every system has random weights of the shape, of a kind: bfloat16, or the closest formats of as many bits. Its GPU
bytes are what it takes beside the driver's context: moec's are a hard limit; of llama.cpp as many layers are on
the GPU with their experts as keep the budget (``llama_cpp/run.cpp``, built by ``build.sh``); accelerate gets it as
``max_memory``. One prompt, then tokens one by one; medians.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.peers.llama import LlamaCpp
from benchmarks.peers.ours import KINDS, Pair, PairType, run_engine, weights_of
from benchmarks.support.children import ACCELERATE, run_child
from benchmarks.support.common import print_rows, write_result
from benchmarks.support.work import Work, WorkType
from moec.runtime.machine.threads import default_threads
from moec.runtime.memory.budget import parse_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

WORK = Work(1, 512, 64)
FEW = 4
"""Tokens of accelerate's run, which takes seconds for each."""
BUDGETS = ("bf16=8GiB", "bf16=12GiB", "8bit=8GiB", "8bit=12GiB", "4bit=4GiB", "4bit=8GiB")
Way = tuple[str, list[str]]
"""What a row calls it, and options of ``engine_run``."""
WAYS: tuple[Way, ...] = (("link and CPU", []), ("link only", ["--cpu-threads", "0"]))


@click.command()
@click.argument("config", type=click.Path(exists=True, path_type=Path))
@click.option("--bundle", "bundles", type=PairType(), multiple=True, help="KIND=BUNDLE of moec.")
@click.option("--llama-cpp", "program", type=click.Path(exists=True, path_type=Path))
@click.option("--accelerate", is_flag=True, help="Measure transformers with accelerate too.")
@click.option(
    "--link-only/--no-link-only", default=True, show_default=True, help="moec without the CPU's help too."
)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("/dev/shm"), show_default=True)  # noqa: S108
@click.option("--budget", "pairs", type=PairType(), multiple=True, default=BUDGETS, show_default=True)
@click.option("--work", type=WorkType(), default=WORK, show_default=True)
@click.option("--threads", type=int, help="Of llama.cpp. [default: all CPUs]")
def main(
    config: Path,
    bundles: tuple[Pair, ...],
    program: Path | None,
    accelerate: bool,
    link_only: bool,
    folder: Path,
    pairs: tuple[Pair, ...],
    work: Work,
    threads: int | None,
) -> None:
    """Measure the shape of CONFIG."""
    budgets: dict[str, list[int]] = {}
    for kind, text in pairs:
        budgets.setdefault(kind, []).append(parse_memory(text, 0, "--budget"))
    rows: list[dict[str, Any]] = []
    errors: dict[str, str] = {}

    def add(name: str, found: Iterator[dict[str, Any]]) -> None:
        """Rows as they come: a run that is cut off has those before."""
        try:
            for row in found:
                rows.append({"system": name, **row})
                rows.sort(key=lambda row: (list(KINDS).index(row["kind"]), row["budget GiB"]))
                print_rows([{"system": name, **row}])
                write_result(f"peers-{config.stem}", rows, work=str(work), errors=errors)
        except (RuntimeError, OSError) as error:
            errors[name] = str(error)[-1500:]
            print(f"{name}: {error}", flush=True)

    ways = WAYS if link_only else WAYS[:1]
    for kind, own in budgets.items():
        for bundle in (Path(path) for name, path in bundles if name == kind):
            add("moec", moec_rows(bundle, kind, own, work, ways))
        if program is not None:
            facts = json.loads(config.read_bytes())
            llama = LlamaCpp(program, facts, KINDS[kind], folder, threads or default_threads())
            add("llama.cpp", llama_rows(llama, kind, own, work))
    if accelerate:
        add("accelerate", accelerate_rows(config, budgets.get("bf16", [])))
    path = write_result(f"peers-{config.stem}", rows, work=str(work), errors=errors)
    print_rows(rows)
    print(path)


def moec_rows(
    bundle: Path, kind: str, budgets: list[int], work: Work, ways: tuple[Way, ...]
) -> Iterator[dict[str, Any]]:
    """A row for each way and budget; what ``load`` chooses by itself comes first."""
    weights = weights_of(bundle)
    options = ["--device", "cuda:0", "--step-tokens", str(work.prompt_tokens), "--repeats", "2"]
    for budget in budgets:
        for how, more in ways:
            facts = run_engine(bundle, work, [*options, "--device-memory", str(budget), *more])
            words = cache_words(facts["runs"][0]["stats"])
            yield row_of(kind, weights, budget, f"{how}, {words}", facts)


def cache_words(stats: dict[str, Any]) -> str:
    """How many experts were there, and who had the others."""
    hits, misses, by_cpu = (stats[key] for key in ("hits", "misses", "cpu_misses"))
    words = f"{hits / max(1, hits + misses):.0%} hits"
    return f"{words}, {by_cpu / misses:.0%} of the misses by the CPU" if by_cpu else words


def llama_rows(llama: LlamaCpp, kind: str, budgets: list[int], work: Work) -> Iterator[dict[str, Any]]:
    """As much on the GPU as each budget holds."""
    llama.write()
    try:
        for budget in budgets:
            facts = llama.best(work, budget)
            flash = "with" if facts["flash_attention"] else "without"
            setting = f"experts of {facts['layers on the CPU']} layers on the CPU, {llama.threads} threads"
            yield row_of(kind, llama.kind, budget, f"{setting}, {flash} flash attention", facts)
    finally:
        llama.path.unlink(missing_ok=True)


def accelerate_rows(config: Path, budgets: list[int]) -> Iterator[dict[str, Any]]:
    """Its ``max_memory`` is the budget."""
    work = Work(WORK.batch, WORK.prompt_tokens, FEW)
    for budget in budgets:
        facts = run_child(ACCELERATE, config, [work], ["--budget", str(budget)])
        yield row_of("bf16", "bfloat16", budget, "weights moved for each call", facts)


def row_of(kind: str, weights: str, budget: int, setting: str, facts: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    return {
        "kind": kind,
        "weights": weights,
        "budget GiB": budget / 2**30,
        "setting": setting,
        "first token ms": facts["first_token_seconds"] * 1e3,
        "ms/token": facts["step_seconds"] * 1e3,
        "GPU GiB": facts["gpu_bytes"] / 2**30,
        "load s": facts["load_seconds"],
    }


if __name__ == "__main__":
    main()

"""moec beside llama.cpp on the processor alone: prompts, and the tokens after one, with weights of equal bits.

    python -m benchmarks.peers.on_cpu CONFIG --bundle 4bit=int4.moec --llama-cpp build/llama_cpp_run --folder /tmp

Both take random weights of CONFIG's shape: bfloat16, or codes of 8 or 4 bits with a scale for every 32 (``q8_0``,
``q4_0``; of moec what the bundle has). Each run is a process. They take turns, and the fastest of each counts, since
others on the machine disturb both. With one thread times are by the clock of that thread, which stands still while
others have the processor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.peers.llama import LlamaCpp
from benchmarks.peers.ours import KINDS, Pair, PairType, run_engine, weights_of
from benchmarks.support.common import print_rows, write_result
from benchmarks.support.work import Work

NEW_TOKENS = 16
TIMES = ("first_token_seconds", "step_seconds")


@click.command()
@click.argument("config", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--bundle", "bundles", type=PairType(), multiple=True, required=True, help="KIND=BUNDLE of moec."
)
@click.option("--llama-cpp", "program", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="For llama.cpp's files.")
@click.option("--prompt", "prompts", type=int, multiple=True, default=(32, 128, 512), show_default=True)
@click.option("--threads", type=int, default=2, show_default=True, help="Of both.")
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
def main(
    config: Path,
    bundles: tuple[Pair, ...],
    program: Path,
    folder: Path,
    prompts: tuple[int, ...],
    threads: int,
    turns: int,
) -> None:
    """Measure the shape of CONFIG."""
    facts = json.loads(config.read_bytes())
    rows: list[dict[str, Any]] = []
    for kind, bundle in bundles:
        llama = LlamaCpp(program, facts, KINDS[kind], folder, threads, thread_clock=threads == 1)
        llama.write()
        for prompt in prompts:
            work = Work(1, prompt, NEW_TOKENS)
            ours, theirs = [], []
            for _ in range(turns):
                ours.append(moec_times(Path(bundle), work, threads))
                theirs.append(llama.run(work, 0, "mmap"))
            rows.append(
                {"kind": kind, "weights": weights_of(Path(bundle)), "prompt": prompt} | compared(ours, theirs)
            )
            print_rows(rows[-1:])
            write_result(f"peers-cpu-{config.stem}", rows, threads=threads, turns=turns)
        llama.path.unlink()
    print_rows(rows)


def moec_times(bundle: Path, work: Work, threads: int) -> dict[str, Any]:
    """Of one process."""
    options = ["--cpu-threads", str(threads), "--repeats", "1"]
    return run_engine(bundle, work, options + ["--thread-clock"] * (threads == 1))


def compared(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of each, in milliseconds, and how many times as long llama.cpp takes."""
    best = {
        name: [min(run[key] for run in runs) * 1e3 for key in TIMES]
        for name, runs in (("moec", ours), ("llama.cpp", theirs))
    }
    row: dict[str, Any] = {"target": ours[0]["target"]}
    for number, what in enumerate(("prompt ms", "ms/token")):
        row |= {f"{name} {what}": times[number] for name, times in best.items()}
        row[f"ratio, {what}"] = best["llama.cpp"][number] / best["moec"][number]
    return row


if __name__ == "__main__":
    main()

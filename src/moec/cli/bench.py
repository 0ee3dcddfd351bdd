"""``moec bench``: how fast a bundle runs here, beside what the memory allows."""

from __future__ import annotations

import random
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from moec.artifacts.sizes import human_bytes
from moec.cli.options import bundle_argument, json_option, processor_options
from moec.cli.output import print_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Unpack

    from moec.cli.options import ProcessorOptions
    from moec.runtime import Model


@click.command("bench", short_help="Time prompts and decoding.")
@bundle_argument
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Of each sequence."
)
@click.option(
    "--new-tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Of each sequence."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@processor_options
@json_option
def command(
    bundle: Path,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    as_json: bool,
    **processor: Unpack[ProcessorOptions],
) -> None:
    """Time prefill and decode of BUNDLE on random tokens, as a ratio to the memory's speed measured in the same run.

    \b
    Example:
      moec bench tiny.moec --prompt-tokens 256 --new-tokens 64
    """
    from moec import runtime
    from moec.artifacts.layout.cache import PAGE_TOKENS

    with runtime.load(
        bundle,
        max_batch=batch,
        # A source and what is written each begin a page that they may not fill.
        cache_tokens=batch * (prompt_tokens + new_tokens + 2 * PAGE_TOKENS),
        verify="sizes",
        **processor,
    ) as model:
        facts = measure(model, prompt_tokens, new_tokens, batch, processor["device"])
    if as_json:
        print_json(facts)
        return
    click.echo(f"prefill  {facts['prefill_tokens_per_s']:.1f} tokens/s ({batch} x {prompt_tokens} tokens)")
    click.echo(
        f"decode   {facts['decode_ms_per_step']:.3f} ms/step, {facts['decode_tokens_per_s']:.1f} tokens/s"
    )
    click.echo(
        f"floor    {facts['floor_ms_per_step']:.3f} ms/step: {human_bytes(facts['active_bytes_per_token'])} of active "
        f"weights a token at {facts['read_bandwidth_gb_s']:.1f} GB/s measured"
    )
    click.echo(f"ratio    {facts['ratio_to_floor']:.2f}" + (" (batch 1 floor)" if batch > 1 else ""))


def measure(
    model: Model, prompt_tokens: int, new_tokens: int, batch: int, device: str = "cpu"
) -> dict[str, Any]:
    """Time one batch from its first step to its last; facts as JSON values."""
    from moec.artifacts.layout.footprint import footprint
    from moec.artifacts.steps import ExpertsStep
    from moec.runtime.devices.measure import gpu_record, read_bandwidth
    from moec.runtime.devices.names import parse_ordinals

    facts = footprint(model.record)
    decoding = {step.layer for step in model.record.steps if isinstance(step, ExpertsStep)}
    experts = (layer.top_k * layer.expert_bytes for layer in facts.layers if layer.layer in decoding)
    active = facts.dense_bytes_per_token + sum(experts)
    gpus = [gpu_record(f"cuda:{ordinal}").bandwidth_gb_s for ordinal in parse_ordinals(device)]
    bandwidth = max(gpus) if gpus else read_bandwidth(model.cpu_threads)
    run_batch(model, min(prompt_tokens, 8), 2, 1)
    model.stats.reset()
    prefill, steps = run_batch(model, prompt_tokens, new_tokens, batch)
    decode = median(steps)
    floor = active / bandwidth / 1e9
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "target": model.target,
        "cpu_threads": model.cpu_threads,
        "prefill_tokens_per_s": batch * prompt_tokens / prefill,
        "decode_ms_per_step": decode * 1e3,
        "decode_tokens_per_s": batch / decode,
        "active_bytes_per_token": active,
        "read_bandwidth_gb_s": bandwidth,
        "floor_ms_per_step": floor * 1e3,
        "ratio_to_floor": decode / floor,
        "stats": model.stats.to_dict(),
    }


def run_batch(
    model: Model,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, list[float]]:
    """Seconds by ``clock`` until every sequence has its first token, and seconds of each step after that.

    Behind an encoder ``prompt_tokens`` are the source's.
    """
    from moec.artifacts.random_tokens import random_tokens
    from moec.runtime import Request, Sampling

    engine = model.engine
    draw = random.Random(0)  # noqa: S311 - reproducible load, not a secret
    prompts = [tuple(random_tokens(model.record, prompt_tokens, draw)) for _ in range(batch)]
    behind = engine.limits.sources
    sequences = [
        engine.add(
            Request(
                prompt=prompt[:1] if behind else prompt,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                eos_token_ids=frozenset(),
                sampling=Sampling(),
                seed=0,
                source=prompt if behind else (),
            )
        )
        for prompt in prompts
    ]
    start = clock()
    while any(not sequence.new_tokens for sequence in sequences):
        engine.step()
    prefill = clock() - start
    steps: list[float] = []
    while engine.busy:
        before = clock()
        engine.step()
        steps.append(clock() - before)
    return prefill, steps

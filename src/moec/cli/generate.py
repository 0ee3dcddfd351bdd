"""``moec generate``: continue a prompt."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from moec.artifacts.sizes import human_bytes
from moec.cli.loading import load_model, new_tokens_after
from moec.cli.options import (
    NEW_TOKENS,
    bundle_argument,
    json_option,
    max_new_tokens_option,
    processor_options,
    routing_options,
    sampling_options,
    stop_option,
)
from moec.cli.output import print_json
from moec.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Unpack

    from moec.cli.options import LoadOptions
    from moec.runtime import Model


@click.command("generate", short_help="Continue a prompt.")
@bundle_argument
@click.argument("prompt", required=False)
@click.option("--token-ids", metavar="1,2,3", help="The prompt as token ids instead of text.")
@max_new_tokens_option
@stop_option
@sampling_options
@processor_options
@routing_options
@click.option(
    "--forced-bos-token-id",
    type=click.IntRange(min=0),
    metavar="N",
    help="What a decoder behind an encoder begins with, such as the token of a language.",
)
@click.option("--stats", is_flag=True, help="Say afterwards how fast it was and where the time went.")
@json_option
def command(
    bundle: Path,
    prompt: str | None,
    token_ids: str | None,
    max_new_tokens: int | None,
    stops: tuple[str, ...],
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    greedy: bool,
    seed: int | None,
    forced_bos_token_id: int | None,
    stats: bool,
    as_json: bool,
    **loading: Unpack[LoadOptions],
) -> None:
    """Continue PROMPT (or stdin, where PROMPT is "-") with the model in BUNDLE, printing text as it comes.

    Sampling follows the checkpoint's generation config unless an option here says otherwise. With --token-ids and
    --json the new token ids are printed. Behind an encoder PROMPT is what that reads, and the decoder's answer is
    printed.

    \b
    Example:
      moec generate tiny.moec "In the beginning God" --max-new-tokens 60 --stats
    """
    from moec import runtime

    text = sys.stdin.read() if prompt == "-" else prompt
    if (text is None) == (token_ids is None):
        raise click.UsageError("give a prompt (or - for stdin), or --token-ids, and not both")
    with load_model(bundle, **loading) as model:
        if forced_bos_token_id is not None and not model.has_encoder:
            raise RequestError(
                "--forced-bos-token-id has nothing to say here.",
                "It is what a decoder behind an encoder begins with, and this model has no encoder.",
                "Leave it out.",
            )
        ids = parse_token_ids(token_ids) if token_ids is not None else model.encode(text or "")
        streamer = (
            None
            if as_json or token_ids is not None
            else runtime.TextStreamer(model.tokenizer, stop_strings=stops)
        )
        start = time.perf_counter()
        output = model.generate(
            ids,
            max_new_tokens=max_new_tokens or new_tokens_after(model, ids, NEW_TOKENS),
            stop_strings=stops,
            do_sample=choose_sampling(greedy, temperature, top_p, top_k),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            forced_bos_token_id=forced_bos_token_id,
            seed=seed,
            streamer=streamer,
        )
        seconds = time.perf_counter() - start
        begun = 1 if model.has_encoder else len(ids)
        new_ids = [int(token) for token in output[0][begun:]]
        if as_json:
            print_json(_result(model, ids, new_ids, stops, seconds))
        elif token_ids is not None:
            click.echo(",".join(map(str, new_ids)))
        if stats and not as_json:
            report(model, len(new_ids), seconds)


def choose_sampling(
    greedy: bool, temperature: float | None, top_p: float | None, top_k: int | None
) -> bool | None:
    """Whether to sample: as told; yes where a sampling option is given; else (``None``) as the checkpoint says."""
    if greedy:
        if temperature is not None or top_p is not None or top_k is not None:
            raise click.UsageError("--greedy contradicts --temperature, --top-p and --top-k")
        return False
    return True if (temperature, top_p, top_k) != (None, None, None) else None


def parse_token_ids(text: str) -> list[int]:
    """``"1, 2,3"`` as a list.

    Raises:
        RequestError: an entry is no number.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RequestError(
            f"--token-ids {text!r} is no list of numbers.", "", "Write them like 1,2,3."
        ) from error


def report(model: Model, new_tokens: int, seconds: float) -> None:
    """Print speed and the stages' share to stderr."""
    stats = model.stats
    click.echo(
        f"{new_tokens} tokens in {seconds:.2f} s, {new_tokens / seconds:.1f} tokens/s (prompt included); "
        f"expert hits {stats.hits}, misses {stats.misses}, {human_bytes(stats.bytes_moved)} moved",
        err=True,
    )
    shares = ", ".join(f"{name} {spent:.0f} ms" for name, spent in stats.milliseconds.items())
    click.echo(shares, err=True)
    if stats.engine_bytes:
        brought, late = human_bytes(stats.engine_bytes), stats.late_orders
        click.echo(f"copy engine: {brought} of misses, too late for {late} layers of a step", err=True)
    guessed = stats.prefetch
    if guessed.chosen:
        click.echo(
            f"prefetch: {guessed.recall:.0%} of the experts guessed, {guessed.exact_match:.0%} of the tokens exactly; "
            f"{human_bytes(guessed.fetched_bytes)} fetched, {human_bytes(guessed.wasted_bytes)} of it in vain",
            err=True,
        )


def _result(
    model: Model, prompt_ids: list[int], new_ids: list[int], stops: tuple[str, ...], seconds: float
) -> dict[str, Any]:
    from moec.runtime.stops import text_before

    return {
        "token_ids": new_ids,
        "text": text_before(model.decode(new_ids), stops) if model.has_tokenizer else None,
        "prompt_tokens": len(prompt_ids),
        "seconds": round(seconds, 4),
        "stats": model.stats.to_dict(),
    }

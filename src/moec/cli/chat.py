"""``moec chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from moec.cli.generate import choose_sampling
from moec.cli.loading import load_model, new_tokens_after
from moec.cli.options import (
    NEW_TOKENS,
    bundle_argument,
    json_option,
    max_new_tokens_option,
    prefix_caching_option,
    processor_options,
    routing_options,
    sampling_options,
    stop_option,
)
from moec.cli.output import print_json_line
from moec.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Unpack

    from moec.cli.options import LoadOptions
    from moec.runtime import Model

FAREWELLS = ("/exit", "/quit")


@click.command("chat", short_help="Talk to a model, line by line.")
@bundle_argument
@click.option("--system", help="A system message to begin with.")
@max_new_tokens_option
@stop_option
@sampling_options
@prefix_caching_option
@processor_options
@routing_options
@json_option
def command(
    bundle: Path,
    system: str | None,
    max_new_tokens: int | None,
    stops: tuple[str, ...],
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    greedy: bool,
    seed: int | None,
    prefix_caching: bool | None,
    as_json: bool,
    **loading: Unpack[LoadOptions],
) -> None:
    """Talk to the model in BUNDLE, line by line; /exit or the end of input ends it.

    A model without a chat template simply continues the text so far. With --json each answer is one line of JSON.

    \b
    Example:
      moec chat tiny.moec --max-new-tokens 40
    """
    from moec import runtime
    from moec.runtime.stops import text_before

    do_sample = choose_sampling(greedy, temperature, top_p, top_k)
    with load_model(bundle, prefix_caching=prefix_caching, **loading) as model:
        if model.has_encoder:
            raise RequestError(
                "An encoder-decoder model does not chat.",
                "It answers one text with another and keeps no conversation.",
                f'Use: moec generate {bundle} "..."',
            )
        messages = [{"role": "system", "content": system}] if system else []
        for line in _lines():
            messages.append({"role": "user", "content": line})
            ids = _prompt(model, messages)
            output = model.generate(
                ids,
                max_new_tokens=new_tokens_after(model, ids, max_new_tokens or NEW_TOKENS),
                stop_strings=stops,
                do_sample=do_sample,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                repetition_penalty=repetition_penalty,
                seed=seed,
                streamer=None if as_json else runtime.TextStreamer(model.tokenizer, stop_strings=stops),
            )
            new_ids = [int(token) for token in output[0][len(ids) :]]
            answer = text_before(model.decode(new_ids), stops)
            messages.append({"role": "assistant", "content": answer})
            if as_json:
                print_json_line(messages[-1] | {"token_ids": new_ids, "prompt_tokens": len(ids)})


def _lines() -> Iterator[str]:
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(mark)
        except EOFError:
            return
        if line.strip() in FAREWELLS:
            return
        if line.strip():
            yield line


def _prompt(model: Model, messages: list[dict[str, str]]) -> list[int]:
    if model.tokenizer.has_chat_template:
        return model.tokenizer.encode_chat(messages)
    return model.encode("\n".join(message["content"] for message in messages))

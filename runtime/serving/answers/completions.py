"""What completions have that chats do not: prompts whose text goes on, and may come first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.runtime.serving.answers.choices import Choice, ScoredToken
from moec.runtime.serving.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.runtime.serving.asked.bodies import CompletionBody
    from moec.runtime.serving.asked.requests import Asked
    from moec.runtime.serving.service import Service

CONTEXT_TOKENS = 8
"""Of a prompt, read again so that its continuation begins as it would in the whole text."""


def completion_choices(service: Service, body: CompletionBody, asked: Asked) -> list[Choice]:
    """The choices of all prompts, those of a prompt together.

    Raises:
        ApiError: an encoder's prompt is to be echoed.
    """
    encoder, tokenizer = service.model.has_encoder, service.tokenizer
    if body.echo and encoder:
        raise ApiError(400, "The answer does not continue what an encoder reads.", param="echo")
    choices: list[Choice] = []
    for prompt, own in zip(body.prompts, asked.prompts, strict=True):
        before = (prompt if isinstance(prompt, str) else tokenizer.decode(own)) if body.echo else ""
        context = () if encoder else own[-CONTEXT_TOKENS:]
        choices += [
            Choice(len(choices) + number, tokenizer.stream(context=context), body.stops, before)
            for number in range(asked.n)
        ]
    return choices


async def score_prompts(service: Service, asked: Asked, choices: Sequence[Choice], top: int) -> None:
    """Let choices begin with their prompts' tokens and logprobs."""
    for number, prompt in enumerate(asked.prompts):
        scored = await service.score(prompt, top)
        tokens = [ScoredToken(*each) for each in zip(prompt, scored, strict=True)]
        for choice in choices[number * asked.n : (number + 1) * asked.n]:
            choice.begin(tokens)

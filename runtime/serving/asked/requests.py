"""What a client asks for, as requests of the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moec.errors import RequestError
from moec.runtime.engine.admission import check_request
from moec.runtime.engine.continuation import Continuation
from moec.runtime.requests.checks import end_tokens, sampling_from
from moec.runtime.requests.sides import sides
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.serving.asked.bodies import CompletionBody
from moec.runtime.serving.errors import ApiError, refused

if TYPE_CHECKING:
    from moec.artifacts.model import GenerationDefaults, ModelRecord
    from moec.runtime.engine import Engine, Request
    from moec.runtime.sampling import Sampling
    from moec.runtime.serving.asked.bodies import ChatBody, Generation

TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class Asked:
    """The requests for a list of prompts, ``n`` for each, those of a prompt together."""

    requests: tuple[Request, ...]
    prompts: tuple[tuple[int, ...], ...]
    """Token ids as the client's text has them; behind an encoder, what that reads."""
    n: int


def ask(
    engine: Engine, model: ModelRecord, body: ChatBody | CompletionBody, prompts: list[list[int]]
) -> Asked:
    """The requests for ``body``, whose prompts have these token ids; the engine takes each of them.

    Choice i has ``seed + i``, so that a list of prompts is answered as `Model.generate` does.

    Raises:
        ApiError: they are too long, or an option is out of range.
    """
    vocabulary = Vocabulary.of(model)
    n = 1 if body.n is None else body.n
    given = [prompt for prompt in map(tuple, prompts) for _ in range(n)]
    try:
        asked = _continuation(body, model, vocabulary)
        asked.check(vocabulary)
        sources, own = sides(model, given, None)
        requests = [
            replace(request, top_logprobs=body.scored) for request in asked.requests(engine, own, sources)
        ]
    except RequestError as error:
        raise refused(error) from error
    for request in requests[::n]:  # its choices are alike
        _check(engine, vocabulary, request)
    return Asked(tuple(requests), tuple(given[::n]), n)


def _continuation(
    body: ChatBody | CompletionBody, model: ModelRecord, vocabulary: Vocabulary
) -> Continuation:
    defaults = model.generation
    ends = () if body.ignore_eos else end_tokens(defaults, None)
    first = body.forced_bos_token_id if isinstance(body, CompletionBody) else None
    if first is not None and not model.encoder:
        raise ApiError(400, "forced_bos_token_id is for encoder-decoder models.", param="forced_bos_token_id")
    return Continuation(
        sampling_of(body, defaults, vocabulary),
        (*ends, *(body.stop_token_ids or ())),
        body.most_tokens,
        body.min_tokens or 0,
        defaults.forced_bos_token_id if first is None else first,
        defaults.forced_eos_token_id,
        body.seed,
    )


def sampling_of(body: Generation, defaults: GenerationDefaults, vocabulary: Vocabulary) -> Sampling:
    """How tokens are chosen: greedily at temperature 0, drawn where an option of drawing is given.

    Raises:
        RequestError: an option is out of range.
    """
    drawing = (body.temperature, body.top_p, body.top_k) != (None, None, None)
    chosen = sampling_from(
        defaults,
        False if body.temperature == 0 else drawing or None,
        body.temperature,
        body.top_p,
        None if body.top_k is None else max(0, body.top_k),
        body.repetition_penalty,
    )
    bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
    if bias:
        vocabulary.check([token for token, _ in bias])
    return replace(
        chosen,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
    )


def _check(engine: Engine, vocabulary: Vocabulary, request: Request) -> None:
    """Refuse what the engine would refuse."""
    prompt, source, new = request.prompt, request.source, request.max_new_tokens
    try:
        check_request(engine.limits, vocabulary, prompt, source, new)
    except RequestError as error:
        long = len(source) > engine.limits.max_context or len(prompt) + new > engine.capacity_tokens(
            len(source)
        )
        raise refused(error, code=TOO_LONG if long else None) from error

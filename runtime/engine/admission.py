"""Whether a request can be run at all, however little else is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.runtime.engine.pages import pages_for
from moec.runtime.requests.checks import cache_too_small, step_too_small, too_long, wrong_source

if TYPE_CHECKING:
    from moec.runtime.engine.scheduler import Limits
    from moec.runtime.requests.vocabulary import Vocabulary


def check_request(
    limits: Limits, vocabulary: Vocabulary, prompt: tuple[int, ...], source: tuple[int, ...], new: int
) -> None:
    """Refuse tokens that are none of the model's, and a sequence that finds no room in context, step or cache.

    Args:
        limits: of the engine.
        vocabulary: of the model.
        prompt: tokens.
        source: what an encoder reads for it.
        new: tokens that may follow the prompt; 0: none are chosen, and the last of it enters the cache too.

    Raises:
        RequestError: says which.
    """
    vocabulary.check(prompt)
    _check_source(limits, vocabulary, source)
    _check_room(limits, len(prompt), new, len(source))


def _check_source(limits: Limits, vocabulary: Vocabulary, source: tuple[int, ...]) -> None:
    """Refuse a source that no step holds or that no encoder reads."""
    if bool(source) != limits.sources:
        raise wrong_source(needed=limits.sources)
    if not source:
        return
    vocabulary.check(source)
    if len(source) > limits.max_context:
        raise too_long(len(source), 0, limits.max_context)
    if len(source) > limits.max_step_tokens:
        raise step_too_small("source", len(source), limits.max_step_tokens)


def _check_room(limits: Limits, prompt: int, new: int, source: int) -> None:
    """Refuse what exceeds context or cache, and a prompt that must be run whole and exceeds a step."""
    if prompt + new > limits.max_context:
        raise too_long(prompt, new, limits.max_context)
    most = limits.max_step_tokens - (limits.max_batch if new else 0)
    if limits.whole_prompts and prompt > most:
        raise step_too_small("decoder's prompt", prompt, most)
    needed = pages_for(source) + pages_for(prompt + max(0, new - 1))
    if needed > limits.cache_pages:
        raise cache_too_small(needed, limits.cache_pages)

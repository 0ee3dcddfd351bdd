"""Checks of what users ask for, and the errors that say what is wrong with it."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from moec.artifacts.cache import PAGE_TOKENS
from moec.errors import RequestError
from moec.runtime.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moec.artifacts.model import GenerationDefaults


class Listed(Protocol):
    """What gives its elements as nested lists, such as a tensor of another package, wherever it lies."""

    def tolist(self) -> Any:
        """The elements."""
        ...


def too_long(prompt: int, new: int, context: int) -> RequestError:
    """The error for a sequence that exceeds the context."""
    wanted = f"{prompt} prompt tokens and {new} new ones" if new else f"{prompt} tokens"
    return RequestError(
        f"{wanted} do not fit the model's context of {context} tokens.",
        "The bundle was compiled for this context length.",
        "Shorten the prompt, ask for fewer new tokens, or compile with a larger --max-context.",
    )


def cache_too_small(needed_pages: int, available_pages: int) -> RequestError:
    """The error for a sequence that the key-value cache cannot hold."""
    return RequestError(
        f"The request needs {needed_pages * PAGE_TOKENS} tokens of key-value cache.",
        f"The cache has room for {available_pages * PAGE_TOKENS}.",
        "Load the model with a larger cache_tokens, or make the request shorter.",
    )


def step_too_small(what: str, tokens: int, most: int) -> RequestError:
    """The error for what has to be in one step and is longer."""
    return RequestError(
        f"The {what} has {tokens} tokens.",
        f"All of it is run in one step, and a step takes {most}.",
        "Load the model with a larger max_step_tokens, or shorten it.",
    )


def wrong_source(*, needed: bool) -> RequestError:
    """The error for a request that lacks what the encoder reads, or has something where there is no encoder."""
    if needed:
        return RequestError(
            "There is nothing for the encoder to read.",
            "This is an encoder-decoder model.",
            "Give input_ids for the encoder; decoder_input_ids begin the answer.",
        )
    return RequestError(
        "There is no encoder that could read the source.",
        "This model is a decoder.",
        "Give input_ids only.",
    )


def sampling_from(
    defaults: GenerationDefaults,
    do_sample: bool | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
) -> Sampling:
    """Options of ``generate`` over the model's defaults; greedy search checks only those it uses.

    Raises:
        RequestError: an option is out of range.
    """
    sample = defaults.do_sample if do_sample is None else bool(do_sample)
    penalty = defaults.repetition_penalty if repetition_penalty is None else repetition_penalty
    _check_number("repetition_penalty", penalty, above=0.0)
    if not sample:
        return Sampling(repetition_penalty=float(penalty))
    temperature = defaults.temperature if temperature is None else temperature
    top_p = defaults.top_p if top_p is None else top_p
    top_k = defaults.top_k if top_k is None else top_k
    _check_number("temperature", temperature, above=0.0)
    _check_number("top_p", top_p, above=0.0, most=1.0)
    check_count("top_k", top_k, least=0)
    return Sampling(True, float(temperature), int(top_k), float(top_p), float(penalty))


def check_count(name: str, value: object, least: int) -> None:
    """Raise `RequestError` where ``value`` is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise RequestError(
            f"{name}={value!r} is out of range.",
            f"It must be an integer, at least {least}.",
            f"Change {name}.",
        )


def _check_number(name: str, value: object, above: float, most: float = math.inf) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not above < float(value) <= most or math.isinf(float(value)):  # type: ignore[arg-type]
        limit = f" and at most {most:g}" if most < math.inf else ""
        raise RequestError(
            f"{name}={value!r} is out of range.",
            f"It must be a number above {above:g}{limit}.",
            f"Change {name}.",
        )


def end_tokens(defaults: GenerationDefaults, given: int | Iterable[int] | None) -> tuple[int, ...]:
    """End tokens: ``given``, an id or several, or the model's; an empty list is none."""
    if given is None:
        return defaults.eos_token_id
    ids = (given,) if isinstance(given, Integral) else tuple(given)  # type: ignore[arg-type]
    for token in ids:
        check_count("eos_token_id", token, least=0)
    return tuple(int(token) for token in ids)


def to_prompts(input_ids: object, attention_mask: object = None) -> list[tuple[int, ...]]:
    """Prompts without padding.

    Args:
        input_ids: token ids of one prompt, or of several as a list of lists or an array ``[B, T]``.
        attention_mask: as ``input_ids``; 0 at padding, which must lie on one side.

    Raises:
        RequestError: these are not integers of the right shape, or the mask has a hole.
    """
    rows = _rows(input_ids, "input_ids")
    if attention_mask is None:
        return [tuple(row) for row in rows]
    masks = _rows(attention_mask, "attention_mask")
    if [len(row) for row in rows] != [len(mask) for mask in masks]:
        raise RequestError(
            "attention_mask has another shape than input_ids.", "", "Give one entry for each token."
        )
    return [_unpad(row, mask) for row, mask in zip(rows, masks, strict=True)]


def _unpad(row: list[int], mask: list[int]) -> tuple[int, ...]:
    real = [place for place, entry in enumerate(mask) if entry]
    if real and real[-1] - real[0] + 1 != len(real):
        raise RequestError(
            "attention_mask has a hole.",
            "Only padding on the left or right is possible.",
            "Remove those tokens.",
        )
    return tuple(row[place] for place in real)


def _rows(value: object, name: str) -> list[list[int]]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    problem = RequestError(
        f"{name} is not made of token ids.",
        "It must be a list of integers, a list of such lists, or an integer array [B, T].",
        f"Change {name}.",
    )
    if not isinstance(value, (list, tuple)):
        raise problem
    rows = [value] if not value or not isinstance(value[0], (list, tuple, np.ndarray)) else value
    result: list[list[int]] = []
    for row in rows:
        items = row.tolist() if isinstance(row, np.ndarray) else row
        if not isinstance(items, (list, tuple)):
            raise problem
        if any(not isinstance(item, (int, np.integer)) for item in items):
            raise problem
        result.append([int(item) for item in items])
    return result

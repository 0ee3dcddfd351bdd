"""Checks of what users ask for, and the errors that say what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.errors import RequestError
from moec.runtime.sampling import Sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.artifacts.model import GenerationDefaults

_LEAST, _MOST = 1e-30, 1e30
"""Between these logits can be multiplied and divided by a number as float32."""
_MOST_TOP_K = 2**31 - 1
"""What a kernel's argument holds; more than any vocabulary."""


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
    check_flag("do_sample", do_sample)
    sample = defaults.do_sample if do_sample is None else bool(do_sample)
    penalty = defaults.repetition_penalty if repetition_penalty is None else repetition_penalty
    _check_number("repetition_penalty", penalty)
    if not sample:
        return Sampling(repetition_penalty=float(penalty))
    temperature = defaults.temperature if temperature is None else temperature
    top_p = defaults.top_p if top_p is None else top_p
    top_k = defaults.top_k if top_k is None else top_k
    _check_number(
        "temperature",
        temperature,
        do="For the likeliest tokens: do_sample=False, --greedy, or over HTTP temperature 0.",
    )
    _check_number("top_p", top_p, least=0.0, most=1.0)
    check_count("top_k", top_k, least=0)
    return Sampling(True, float(temperature), min(int(top_k), _MOST_TOP_K), float(top_p), float(penalty))


def check_flag(name: str, value: object) -> None:
    """Raise `RequestError` where ``value`` is neither true nor false nor ``None``."""
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise RequestError(f"{name}={value!r} is no answer.", "It must be True or False.", f"Change {name}.")


def check_count(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise `RequestError` where ``value`` is not an integer from ``least`` to ``most``; ``None``: however large."""
    number = isinstance(value, Integral) and not isinstance(value, bool)
    if not number or int(value) < least or (most is not None and int(value) > most):  # type: ignore[call-overload]
        raise RequestError(
            f"{name}={value!r} is out of range.",
            f"It must be an integer, at least {least}."
            if most is None
            else f"It must be an integer, {least} to {most}.",
            f"Change {name}.",
        )


def _check_number(name: str, value: object, least: float = _LEAST, most: float = _MOST, do: str = "") -> None:
    """Raise `RequestError` where ``value`` is not a number above 0 from ``least`` to ``most``."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or value == 0 or not least <= float(value) <= most:  # type: ignore[arg-type]
        limits = f"above 0 and at most {most:g}" if least == 0.0 else f"from {least:g} to {most:g}"
        raise RequestError(
            f"{name}={value!r} is out of range.", f"It must be a number {limits}.", do or f"Change {name}."
        )


def end_tokens(defaults: GenerationDefaults, given: int | Iterable[int] | None) -> tuple[int, ...]:
    """End tokens: ``given``, an id or several, or the model's; an empty list is none."""
    if given is None:
        return defaults.eos_token_id
    several = isinstance(given, (list, tuple, set, frozenset)) or np.ndim(given) == 1  # type: ignore[arg-type]
    ids: tuple[int, ...] = tuple(given) if several else (given,)  # type: ignore[arg-type,assignment]
    for token in ids:
        check_count("eos_token_id", token, least=0)
    return tuple(int(token) for token in ids)


def stop_strings_of(given: object) -> tuple[str, ...]:
    """Texts that end an answer: one, several or none.

    Raises:
        RequestError: one is no text, or empty.
    """
    if given is None:
        return ()
    stops: tuple[Any, ...] = (given,)
    if isinstance(given, Iterable) and not isinstance(given, str):
        with suppress(TypeError):  # an array of no dimension says that it can be iterated over
            stops = tuple(given)
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise RequestError(
                f"stop_strings has {stop!r}.",
                "It must be a text that is not empty, or several.",
                "Change it.",
            )
    return stops


def to_prompts(
    input_ids: object, attention_mask: object = None, name: str = "input_ids"
) -> list[tuple[int, ...]]:
    """Prompts without padding.

    Args:
        input_ids: token ids of one prompt, or of several as a list of lists or an array ``[B, T]``.
        attention_mask: as ``input_ids``; 0 at padding, which must lie on one side.
        name: of the argument, for messages.

    Raises:
        RequestError: these are not integers of the right shape, or the mask has a hole.
    """
    rows = _rows(input_ids, name)
    if attention_mask is None:
        return [tuple(row) for row in rows]
    masks = _masks(attention_mask)
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


def padded_rows(input_ids: object) -> NDArray[np.int64] | None:
    """Prompts as they came, padding and all, ``[B, T]``; ``None`` where they are of different lengths."""
    rows = _rows(input_ids, "input_ids")
    return np.array(rows, np.int64) if len({len(row) for row in rows}) == 1 else None


def _masks(value: object) -> list[list[int]]:
    problem = RequestError(
        "attention_mask is not made of zeros and ones.",
        "It says of each token whether it is one (1) or padding (0).",
        "Change attention_mask.",
    )
    rows = _nested(value, problem)
    if any(not isinstance(item, Real) or item not in (0, 1) for row in rows for item in row):
        raise problem
    return [[int(item) for item in row] for row in rows]


def _rows(value: object, name: str) -> list[list[int]]:
    problem = RequestError(
        f"{name} is not made of token ids.",
        "It must be a list of integers, a list of such lists, or an integer array [B, T].",
        f"Change {name}.",
    )
    rows = _nested(value, problem)
    if any(isinstance(item, bool) or not isinstance(item, Integral) for row in rows for item in row):
        raise problem
    return [[int(item) for item in row] for row in rows]


def _nested(value: object, problem: RequestError) -> list[list[Any]]:
    """A row, or several, as lists; raises ``problem`` where it is neither."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise problem
    several = bool(value) and (
        isinstance(value[0], (list, tuple)) or (hasattr(value[0], "tolist") and np.ndim(value[0]))
    )
    result: list[list[Any]] = []
    for row in value if several else [value]:
        items = row.tolist() if hasattr(row, "tolist") else row
        if not isinstance(items, (list, tuple)):
            raise problem
        result.append(list(items))
    return result

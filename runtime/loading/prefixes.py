"""Whether a model's prompts can begin with pages that are in the cache already, and what its user is told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.steps import CapacityStep, StateStep
from moec.errors import RequestError

if TYPE_CHECKING:
    from moec.artifacts.model import ModelRecord


def choose_prefix_caching(model: ModelRecord, wanted: bool | None) -> tuple[bool, tuple[str, ...]]:
    """Whether to do it, and notes for the user.

    Args:
        model: the chain.
        wanted: ``None``: where the model can.

    Raises:
        RequestError: it is wanted, and the model cannot.
    """
    reason = _obstacle(model)
    if reason is None:
        return wanted is not False, ()
    if wanted:
        raise RequestError(
            "This model has no prefix caching.", f"{reason}.", "Leave prefix_caching out, or set it to False."
        )
    return False, () if wanted is False else (f"Prefix caching is off: {reason}.",)


def _obstacle(model: ModelRecord) -> str | None:
    """Why pages of the cache say less than a prompt's tokens."""
    if model.encoder:
        return "What a decoder caches depends on the text that its encoder has read"
    if any(isinstance(step, CapacityStep) for step in model.steps):
        return "A prompt's tokens compete for the capacity of experts, so all of them are run together"
    states = sum(isinstance(step, StateStep) for step in model.steps)
    if states:
        return (
            f"{states} layers keep a state of all tokens so far, of which none is left at the end of a page"
        )
    return None

"""What of a request is for an encoder and what for the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.errors import RequestError
from moec.runtime.requests.checks import to_prompts, wrong_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from moec.artifacts.model import ModelRecord
    from moec.runtime.requests.checks import Listed

    TokenIds = Sequence[int] | Sequence[Sequence[int]] | NDArray[np.int64] | Listed
    """One row of token ids, or several."""
    Rows = list[tuple[int, ...]]


def sides(model: ModelRecord, given: Rows, decoder_input_ids: TokenIds | None) -> tuple[Rows, Rows]:
    """What the encoder reads, nothing where there is none, and the prompts that are continued.

    Args:
        model: with or without an encoder.
        given: rows of ``input_ids``.
        decoder_input_ids: the decoder's prompts; ``None``: its start token.

    Raises:
        RequestError: prompts for a decoder where there is none behind an encoder, or not as many as sources, or none
            where the model has no start token.
    """
    if not model.encoder:
        if decoder_input_ids is not None:
            raise wrong_source(needed=False)
        return [()] * len(given), given
    if decoder_input_ids is not None:
        prompts = to_prompts(decoder_input_ids, name="decoder_input_ids")
        if len(prompts) != len(given):
            raise RequestError(
                f"There are {len(given)} rows of input_ids and {len(prompts)} of decoder_input_ids.",
                "Each source has one answer.",
                "Give as many of both.",
            )
        return given, prompts
    start = model.generation.decoder_start_token_id
    if start is None:
        raise RequestError(
            "The decoder has nothing to begin with.",
            "The checkpoint names no decoder_start_token_id.",
            "Give decoder_input_ids.",
        )
    return given, [(start,)] * len(given)


def no_decoder_tokens() -> RequestError:
    """The error for logits that nobody said the tokens of."""
    return RequestError(
        "forward lacks decoder_input_ids.",
        "Logits are of the decoder's tokens; input_ids are the encoder's.",
        "Give them, beginning with the model's decoder_start_token_id.",
    )

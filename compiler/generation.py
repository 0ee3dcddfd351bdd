"""Generation defaults of a checkpoint, resolved as transformers' ``generate`` resolves them."""

from __future__ import annotations

from typing import Any

from moec.artifacts.model import GenerationDefaults
from moec.errors import CheckpointError

TOP_K = 50
"""What transformers samples from where neither the checkpoint nor the caller says."""


def generation_defaults(
    config: dict[str, Any], generation_config: dict[str, Any] | None
) -> GenerationDefaults:
    """Read the defaults off ``generation_config.json``, or off ``config.json`` where there is none.

    Args:
        config: the checkpoint's ``config.json``; token ids are taken from it (or from its text part) where
            the other file is missing.
        generation_config: the checkpoint's ``generation_config.json``, if it has one.

    Raises:
        CheckpointError: an option has a value of another kind.
    """
    text = config.get("text_config") or {}
    source = {**text, **config} if generation_config is None else generation_config
    if generation_config is not None and config.get("is_encoder_decoder"):
        source = {"decoder_start_token_id": config.get("decoder_start_token_id"), **source}
    try:
        return _read(source)
    except (TypeError, ValueError) as error:
        name = "config.json" if generation_config is None else "generation_config.json"
        raise CheckpointError(
            f"The checkpoint's {name} has generation options that are no numbers.",
            f"{error}.",
            "Download or copy this file again.",
        ) from error


def _read(source: dict[str, Any]) -> GenerationDefaults:
    eos = source.get("eos_token_id")
    top_k = source.get("top_k")
    return GenerationDefaults(
        bos_token_id=_one(source.get("bos_token_id")),
        eos_token_id=tuple(map(int, eos))
        if isinstance(eos, (list, tuple))
        else ()
        if eos is None
        else (int(eos),),
        pad_token_id=_one(source.get("pad_token_id")),
        do_sample=bool(source.get("do_sample") or False),
        temperature=_number(source.get("temperature"), 1.0),
        top_k=TOP_K if top_k is None else int(top_k),
        top_p=_number(source.get("top_p"), 1.0),
        repetition_penalty=_number(source.get("repetition_penalty"), 1.0),
        decoder_start_token_id=_start(source),
        forced_bos_token_id=_one(source.get("forced_bos_token_id")),
        forced_eos_token_id=_one(source.get("forced_eos_token_id")),
    )


def _start(source: dict[str, Any]) -> int | None:
    """What begins the decoder's text; transformers takes the beginning of any text where nothing is said."""
    own = _one(source.get("decoder_start_token_id"))
    return _one(source.get("bos_token_id")) if own is None and source.get("is_encoder_decoder") else own


def _one(token: Any) -> int | None:
    if isinstance(token, (list, tuple)):
        return int(token[0]) if token else None
    return None if token is None else int(token)


def _number(value: Any, default: float) -> float:
    return default if value is None else float(value)

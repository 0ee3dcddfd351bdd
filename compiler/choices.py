"""What follows from the checkpoint's config where the person did not choose: dtype, context, generation defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    from moec.artifacts.model import DType

DTYPES: dict[str, DType] = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
"""Names of ``--dtype``."""

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
DEFAULT_CONTEXT = 4096


def choose_dtype(config: dict[str, Any], asked: str | None) -> DType:
    """The dtype of weights and activations: as asked, else the checkpoint's own, else bfloat16.

    Raises:
        UnsupportedModelError: the checkpoint's own is none that moec computes in.
    """
    if asked is not None:
        return DTYPES[asked]
    text = config.get("text_config") or {}
    own = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    if own is None:
        return "bfloat16"
    name = str(own).removeprefix("torch.")
    if name not in DTYPES.values():
        raise UnsupportedModelError(
            f"The checkpoint's dtype is {name}.",
            f"moec computes in {', '.join(DTYPES.values())}.",
            f"Choose one with --dtype {'|'.join(DTYPES)}.",
        )
    return cast("DType", name)


def choose_context(config: dict[str, Any], asked: int | None) -> int:
    """The most tokens of a sequence: as asked, else what the config says.

    Raises:
        UnsupportedModelError: more is asked for than the model was made for.
    """
    text = config.get("text_config") or config
    own = next((int(text[key]) for key in CONTEXT_KEYS if isinstance(text.get(key), int)), None)
    if asked is None:
        return own or DEFAULT_CONTEXT
    if own is not None and asked > own:
        raise UnsupportedModelError(
            f"--max-context {asked} is more than the model's {own} tokens.",
            "Positions beyond those were never trained.",
            f"Ask for {own} at most.",
        )
    return asked

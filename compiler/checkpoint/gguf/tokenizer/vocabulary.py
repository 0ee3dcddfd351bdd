"""What both kinds of tokenizers have: tokens with types, special tokens, and what goes around a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokenizers import Tokenizer

    from moec.compiler.checkpoint.gguf.metadata import Metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of ``token_type``."""

SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Transformers' name of a special token -> GGUF's."""


@dataclass(frozen=True)
class Vocabulary:
    """The metadata of a tokenizer."""

    file: str
    """For messages."""
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    """Empty where the kind has none."""
    merges: Sequence[str]
    """Pairs with a space between; empty where the kind has none."""
    pre: str
    """The name of how text is split before merging; empty where the file does not say."""
    special: Mapping[str, int | None]
    """By transformers' names."""
    add_bos: bool
    add_eos: bool
    space_prefix: bool


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Read it.

    Raises:
        CheckpointError: a list is missing or not as long as that of the tokens.
    """
    values = metadata.values

    def listed(name: str, length: int | None = None) -> list[Any]:
        found = values.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(found, list) or (length is not None and found and len(found) != length):
            raise _damaged(metadata, name)
        return found

    tokens = listed("tokens")
    if not tokens:
        raise _damaged(metadata, "tokens")
    special = {name: values.get(f"tokenizer.ggml.{own}_token_id") for name, own in SPECIAL.items()}
    if any(number is not None and not 0 <= number < len(tokens) for number in special.values()):
        raise _damaged(metadata, "special token")
    return Vocabulary(
        file=str(metadata.path),
        tokens=tokens,
        types=listed("token_type", len(tokens)) or [NORMAL] * len(tokens),
        scores=listed("scores", len(tokens)),
        merges=listed("merges"),
        pre=str(values.get("tokenizer.ggml.pre", "")),
        special=special,
        add_bos=bool(
            values.get("tokenizer.ggml.add_bos_token", values.get("tokenizer.ggml.model") == "llama")
        ),
        add_eos=bool(values.get("tokenizer.ggml.add_eos_token", False)),
        space_prefix=bool(values.get("tokenizer.ggml.add_space_prefix", True)),
    )


def finish(tokenizer: Tokenizer, vocabulary: Vocabulary, around: Any) -> Tokenizer:
    """Add the tokens that are never split, and what goes around a text.

    Args:
        tokenizer: with its model, and how it splits and joins.
        vocabulary: what it was made from.
        around: a post-processor that comes first, or None.
    """
    from tokenizers import AddedToken, processors

    typed = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    special = [token for token, kind in typed if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    plain = [token for token, kind in typed if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    steps = [around] if around is not None else []
    marks = {
        name: vocabulary.special[name]
        for name, wanted in (("bos", vocabulary.add_bos), ("eos", vocabulary.add_eos))
        if wanted and vocabulary.special[name] is not None
    }
    if marks:
        text = {name: vocabulary.tokens[number] for name, number in marks.items() if number is not None}
        first, last = ([text[name]] if name in text else [] for name in ("bos", "eos"))
        steps.append(
            processors.TemplateProcessing(
                single=[*first, "$A", *last],
                pair=[*first, "$A", *last, *first, "$B:1", *last],
                special_tokens=[(vocabulary.tokens[n], n) for n in marks.values() if n is not None],
            )
        )
    if steps:
        tokenizer.post_processor = steps[0] if len(steps) == 1 else processors.Sequence(steps)
    return tokenizer


def _damaged(metadata: Metadata, what: str) -> CheckpointError:
    return CheckpointError(
        f"The tokenizer in {metadata.path} is damaged.",
        f"Its {what} is missing, or does not fit the others.",
        "Use another file, or give the model's own tokenizer: --tokenizer FOLDER.",
    )

"""SentencePiece's BPE, ``llama`` in GGUF: the file has scores, of which the merges follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.compiler.checkpoint.gguf.tokenizer.vocabulary import NORMAL, USER_DEFINED, Vocabulary, finish
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
"""What stands for a space in tokens."""


def sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer.

    Raises:
        CheckpointError: it has no scores.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    if not vocabulary.scores:
        raise CheckpointError(
            f"{vocabulary.file} has a SentencePiece tokenizer without scores.",
            "",
            "Use another file, or give the model's own tokenizer: --tokenizer FOLDER.",
        )
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.special["unk"]
    merges: Any = _merges(vocabulary, numbers)
    model = models.BPE(
        vocab=numbers,
        merges=merges,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    replace = normalizers.Replace(" ", SPACE)
    prefix = [normalizers.Prepend(SPACE)] if vocabulary.space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, replace])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return finish(tokenizer, vocabulary, None)


def _merges(vocabulary: Vocabulary, numbers: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that together are a token, in the order in which SentencePiece takes them: by score.

    Of pairs that make the same token, that of the lowest numbers is first; which of them is taken changes nothing but
    what happens on the way.
    """
    kinds = (NORMAL, USER_DEFINED)
    made = [
        number
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in kinds and len(token) > 1
    ]
    made.sort(key=lambda number: (-vocabulary.scores[number], number))
    merges: list[tuple[str, str]] = []
    for number in made:
        token = vocabulary.tokens[number]
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found = [pair for pair in halves if pair[0] in numbers and pair[1] in numbers]
        merges += sorted(found, key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
    return merges

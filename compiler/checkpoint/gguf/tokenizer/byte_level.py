"""Byte-level BPE, ``gpt2`` in GGUF: merges are in the file, how text is split before is a name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.compiler.checkpoint.gguf.tokenizer.splits import NORMALIZED, SPLITS, WHOLE_WORDS
from moec.compiler.checkpoint.gguf.tokenizer.vocabulary import Vocabulary, finish
from moec.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer.

    Raises:
        UnsupportedModelError: nobody has told moec what the name of its splitting means.
        CheckpointError: it has no merges.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    if vocabulary.pre not in SPLITS:
        raise UnsupportedModelError(
            f"{vocabulary.file} splits text by {vocabulary.pre!r} before it merges, which moec does not know.",
            f"It knows {', '.join(SPLITS)}.",
            "Give the folder of the model's own tokenizer: --tokenizer FOLDER.",
        )
    pairs = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(
            f"{vocabulary.file} has a byte-level tokenizer without usable merges.",
            "",
            "Use another file, or give the model's own tokenizer: --tokenizer FOLDER.",
        )
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    merges: Any = [pair for pair in pairs if all(token in numbers for token in (*pair, "".join(pair)))]
    tokenizer = Tokenizer(
        models.BPE(vocab=numbers, merges=merges, ignore_merges=vocabulary.pre in WHOLE_WORDS)
    )
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[vocabulary.pre]
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if vocabulary.pre in NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return finish(tokenizer, vocabulary, processors.ByteLevel(trim_offsets=False))

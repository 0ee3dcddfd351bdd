"""The tokenizer in a GGUF file's metadata, as ``tokenizer.json`` and ``tokenizer_config.json``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moec.compiler.checkpoint.gguf.tokenizer.byte_level import byte_level
from moec.compiler.checkpoint.gguf.tokenizer.sentencepiece import sentencepiece
from moec.compiler.checkpoint.gguf.tokenizer.vocabulary import Vocabulary, read_vocabulary
from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer

    from moec.compiler.checkpoint.gguf.metadata import Metadata

BUILDERS: dict[str, Callable[[Vocabulary], Tokenizer]] = {"gpt2": byte_level, "llama": sentencepiece}
"""``tokenizer.ggml.model`` -> what makes it."""

NO_TOKENIZER = (None, "none", "no_vocab")


def tokenizer_files(metadata: Metadata) -> dict[str, bytes]:
    """The files by name; none where the file has no tokenizer.

    Raises:
        UnsupportedModelError: it is of a kind that cannot be made from the metadata.
        CheckpointError: the metadata lacks a part of it.
    """
    values = metadata.values
    kind = values.get("tokenizer.ggml.model")
    whole = values.get("tokenizer.huggingface.json")
    if kind in NO_TOKENIZER and whole is None:
        return {}
    if whole is None and kind not in BUILDERS:
        raise UnsupportedModelError(
            f"{metadata.path} has a tokenizer of the kind {kind!r}.",
            f"moec makes {' and '.join(BUILDERS)} tokenizers from GGUF.",
            "Give the folder of the model's own tokenizer: --tokenizer FOLDER.",
        )
    vocabulary = read_vocabulary(metadata)
    made = whole if whole is not None else BUILDERS[str(kind)](vocabulary).to_str()
    return {"tokenizer.json": made.encode(), "tokenizer_config.json": _config(metadata, vocabulary)}


def _config(metadata: Metadata, vocabulary: Vocabulary) -> bytes:
    named: dict[str, Any] = {
        f"{name}_token": vocabulary.tokens[number]
        for name, number in vocabulary.special.items()
        if number is not None
    }
    template = metadata.values.get("tokenizer.chat_template")
    config = named | {
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if template is not None:
        config["chat_template"] = template
    return (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode()

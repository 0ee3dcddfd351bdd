"""Tokenizers made of GGUF's metadata cut text as the tokenizers that they were written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moec.compiler.checkpoint.gguf.metadata import Metadata
from moec.compiler.checkpoint.gguf.tokenizer import tokenizer_files
from moec.compiler.checkpoint.gguf.tokenizer.splits import SPLITS
from moec.errors import CheckpointError, UnsupportedModelError
from moec.runtime.tokenizer import Tokenizer as Runtime

CORPUS = [path.read_text(encoding="utf-8") for path in sorted(Path("docs").glob("*.md"))]
TEXTS = (
    "In the beginning God created the heaven, and 12345 things!",
    "  two spaces, a tab\t and\n\n lines; I'll SAY'it — naïve café, 你好世界 한국 ありがとう",
    "<|end|>x<think>y 🙂 don't 0.5%",
    "def f(x):\n    return x**2 # ok\r\n",
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def metadata(**values: Any) -> Metadata:
    named = {f"tokenizer.{key.replace('__', '.')}": value for key, value in values.items()}
    return Metadata(Path("x.gguf"), {"general.architecture": "llama", **named})


def made(tmp_path: Path, found: Metadata) -> Runtime:
    for name, content in tokenizer_files(found).items():
        (tmp_path / name).write_bytes(content)
    return Runtime(tmp_path)


def byte_level(pattern: str | Regex) -> Tokenizer:
    """A trained tokenizer as those of Qwen and gpt-oss are published: one pattern, then bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, pre: str, **more: Any) -> Metadata:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=lambda token: vocab[token])
    kinds = {"<|end|>": CONTROL, "<think>": USER_DEFINED}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return metadata(
        ggml__model="gpt2",
        ggml__pre=pre,
        ggml__tokens=tokens,
        ggml__token_type=[kinds.get(token, NORMAL) for token in tokens],
        ggml__merges=[" ".join(pair) for pair in merges],
        ggml__bos_token_id=vocab["<|end|>"],
        ggml__eos_token_id=vocab["<|end|>"],
        **more,
    )


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(("pre", "pattern"), [("gpt-2", GPT2), ("qwen2", QWEN2)])
def test_byte_level(pre: str, pattern: str, tmp_path: Path) -> None:
    original = byte_level(Regex(pattern))
    found = made(tmp_path, byte_level_metadata(original, pre))
    for text in TEXTS:
        assert found.encode(text) == original.encode(text).ids, text
        assert found.decode(found.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", SPLITS)
def test_every_way_to_split_keeps_all_of_a_text(pre: str, tmp_path: Path) -> None:
    found = made(tmp_path, byte_level_metadata(byte_level(" "), pre))
    for text in TEXTS:
        assert found.decode(found.encode(text), skip_special_tokens=False) == text


def test_what_goes_around_a_text_and_the_template(tmp_path: Path) -> None:
    original = byte_level(Regex(GPT2))
    bos = original.get_vocab()["<|end|>"]
    found = made(
        tmp_path,
        byte_level_metadata(
            original,
            "gpt-2",
            ggml__add_bos_token=True,
            chat_template="{{ bos_token }}{{ messages[0].content }}",
        ),
    )
    assert found.encode("so") == [bos, *original.encode("so").ids]
    assert found.apply_chat_template([{"role": "user", "content": "hi"}]) == "<|end|>hi"
    assert found.decode([bos, *original.encode("so").ids]) == "so"


def sentencepiece() -> Tokenizer:
    """As Mixtral's: spaces are U+2581, one in front, what is unknown is bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, show_progress=False, max_token_length=9
    )
    tokenizer.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["id"] < 3]
    return Tokenizer.from_str(json.dumps(plain))


def test_sentencepiece(tmp_path: Path) -> None:
    """Scores say the order in which tokens were merged, as SentencePiece's BPE writes them."""
    original = sentencepiece()
    vocab = original.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    first = 3 + 256
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - first)]
    letters = [number for number in range(first, len(tokens)) if len(tokens[number]) == 1]
    merged = [number for number in range(first, len(tokens)) if len(tokens[number]) > 1]
    scores = [0.0] * first + [0.0] * (len(tokens) - first)
    for rank, number in enumerate([*merged, *letters]):
        scores[number] = -float(rank)
    found = made(
        tmp_path,
        metadata(
            ggml__model="llama",
            ggml__tokens=tokens,
            ggml__token_type=types,
            ggml__scores=scores,
            ggml__bos_token_id=1,
            ggml__eos_token_id=2,
            ggml__unknown_token_id=0,
        ),
    )
    for text in (*TEXTS, *CORPUS[0].splitlines()[:40]):
        assert found.encode(text) == [1, *original.encode(text).ids], text
        assert found.decode(found.encode(text)) == text, text


def test_what_cannot_be_made_asks_for_a_folder() -> None:
    with pytest.raises(UnsupportedModelError, match=r"kind 't5'(?s:.*)--tokenizer FOLDER"):
        tokenizer_files(metadata(ggml__model="t5"))
    with pytest.raises(UnsupportedModelError, match=r"splits text by 'new'(?s:.*)--tokenizer FOLDER"):
        tokenizer_files(metadata(ggml__model="gpt2", ggml__tokens=["a"], ggml__pre="new"))
    with pytest.raises(CheckpointError, match=r"tokenizer in x\.gguf is damaged"):
        tokenizer_files(metadata(ggml__model="gpt2", ggml__tokens=["a"], ggml__token_type=[1, 1]))
    with pytest.raises(CheckpointError, match="without scores"):
        tokenizer_files(metadata(ggml__model="llama", ggml__tokens=["a"]))
    assert tokenizer_files(metadata()) == {}

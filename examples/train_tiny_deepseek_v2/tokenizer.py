"""The tokenizer, and chapters as its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from examples.train_tiny_deepseek_v2.text import Chapter

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"


BEGIN_ID, END_ID, PAD_ID = 0, 1, 2


def train_tokenizer(chapters: list[Chapter], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts the begin token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((chapter.text for chapter in chapters), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, BEGIN_ID)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode_chapter(tokenizer: PreTrainedTokenizerFast, chapter: Chapter) -> tuple[list[int], list[int]]:
    """The chapter's tokens, between begin and end, and where its lines start in them."""
    tokens, starts = [BEGIN_ID], []
    for number, line in enumerate(chapter.lines):
        starts.append(len(tokens))
        piece = line if number == len(chapter.lines) - 1 else line + "\n"
        tokens.extend(tokenizer.encode(piece, add_special_tokens=False))
    tokens.append(END_ID)
    return tokens, starts

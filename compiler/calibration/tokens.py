"""Calibration prompts as token ids, for runs that have no bundle yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.profiling.calibration import DEFAULT_PROMPTS, random_prompts, read_prompts
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.model import ModelRecord
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.profiling.calibration import Prompt

TOKENIZER = "tokenizer.json"


def calibration_tokens(
    checkpoint: Checkpoint, model: ModelRecord, prompts: Sequence[Prompt] | None
) -> list[list[int]]:
    """The prompts' tokens, at most a context each; those of a single token say nothing and are left out.

    Args:
        checkpoint: its ``tokenizer.json`` makes tokens of text.
        model: how many tokens there are, and how long a sequence is.
        prompts: None: the shipped ones, or random tokens where the checkpoint has no tokenizer.

    Raises:
        CheckpointError: a prompt is text and there is no tokenizer, or a token id is out of range, or nothing is left.
    """
    files = {path.name: path for path in checkpoint.tokenizer_files}
    tokenizer = None
    if TOKENIZER in files:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(files[TOKENIZER]))
    if prompts is None:
        prompts = random_prompts(model) if tokenizer is None else read_prompts(DEFAULT_PROMPTS)
    sequences = []
    for prompt in prompts:
        if prompt.token_ids is not None:
            ids = list(prompt.token_ids)
        elif tokenizer is not None:
            ids = list(tokenizer.encode(prompt.text or "").ids)
        else:
            raise CheckpointError(
                "The calibration prompts are text, and the checkpoint has no tokenizer.",
                f"There is no {TOKENIZER} in {checkpoint.path}.",
                'Give the prompts as {"token_ids": [...]} lines.',
            )
        if any(token >= model.vocab_size for token in ids):
            raise CheckpointError(
                f"A calibration prompt has the token {max(ids)}.",
                f"The model has {model.vocab_size} tokens.",
                "Make the prompts with this model's tokenizer.",
            )
        sequences.append(ids[: model.max_context])
    sequences = [ids for ids in sequences if len(ids) > 1]
    if not sequences:
        raise CheckpointError(
            "No calibration prompt has two tokens or more.",
            "",
            "Give longer prompts with --calibration FILE.",
        )
    return sequences

"""From logits to the next token of each row, without the host: penalty, temperature, top-k, top-p, a draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.kernels.cuda.sample.histogram import histogram
from moec.compiler.kernels.cuda.sample.operands import declare
from moec.compiler.kernels.cuda.sample.pick import pick
from moec.compiler.kernels.cuda.sample.score import score
from moec.compiler.kernels.emit import build

if TYPE_CHECKING:
    from tvm import tirx

MAX_VOCAB = 1 << 19
"""A block of the second launch has a thread for each chunk, and sums of masses stay far below 2**64."""


def sample(vocab: int) -> tirx.PrimFunc:
    """The kernel ``sample(logits, options, seen, workspace, tokens)``; R and S are symbolic.

    The order is transformers': repetition penalty, forbidden tokens, and for rows that draw temperature, top-k (ties
    are kept), softmax, top-p. A row's result depends on its own logits, options and bits alone, and is the same each
    time.

    Arguments:
        logits: float32 ``[R, V]``, from 1 row.
        options: int32 ``[R, 32]``, words as `moec.artifacts.words.sampling` names them; read on the device.
        seen: int32 ``[S, ceil(V / 32)]``, bits of the tokens that the sequence of each slot has, prompt included. The
            host writes a slot's row when its sequence starts; the kernel adds the chosen token. Rows of one call have
            different slots; a row with slot -1 has no bits.
        workspace: uint8 ``[R * row_bytes(V)]``, 64-byte aligned; needs no initial value and keeps nothing.
        tokens: int64 ``[R]``, written.

    Args:
        vocab: V, to 2**19.
    """
    assert 0 < vocab <= MAX_VOCAB, vocab

    def body() -> None:
        operands = declare(vocab)
        score(operands)
        histogram(operands)
        pick(operands)

    return build("sample", body)

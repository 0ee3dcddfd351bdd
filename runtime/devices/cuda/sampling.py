"""Tokens chosen on the GPU: options staged with each step, and the sequences' tokens so far as bits in its memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.words import sampling as words
from moec.runtime.device import PackedCall, View, padded_bytes
from moec.runtime.tensors import aligned_zeros

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from numpy.typing import NDArray

    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.engine.sequence import Sequence

_FLOATS = {words.TEMPERATURE: "temperature", words.REPETITION_PENALTY: "repetition_penalty"}


class DeviceSampler:
    """Chooses tokens with the kernel of ``compiler/kernels/cuda/sample``.

    Args:
        device: the GPU.
        function: ``sample(logits, options, seen, workspace, tokens)``.
        vocab_size: V.
        rows: sequences that run at once.

    Raises:
        BudgetError: the GPU has too little memory.
    """

    def __init__(self, device: CudaDevice, function: Callable[..., Any], vocab_size: int, rows: int) -> None:
        self._device, self._function = device, function
        self._vocab_size, self.rows = vocab_size, rows
        self._words = words.seen_words(vocab_size)
        self._options: NDArray[np.int32] = aligned_zeros((rows, words.OPTION_WORDS), np.int32)
        self._mirror = device.mirror(self._options)
        self._seen = device.allocate(4 * rows * self._words)
        self._workspace = device.allocate(rows * words.row_bytes(vocab_size))
        self._results = device.results(8 * rows)
        self._slots: list[tuple[Sequence, int] | None] = [None] * rows
        """Whose tokens the bits of a slot are, and how many of them were chosen."""
        self._bases: dict[Sequence, NDArray[np.int32]] = {}

    def can_choose(self, sequences: list[Sequence], *, ahead: int) -> bool:
        """Whether the kernel can do, and has room for, what these sequences want."""
        return len(sequences) <= self.rows and all(
            len(sequence.forbidden(ahead)) <= words.MAX_FORBIDDEN
            and sequence.forced(ahead) is None
            and not sequence.sampler.needs_logits
            for sequence in sequences
        )

    def stage(self, sequences: list[Sequence], *, ahead: int) -> None:
        """Put the options of each row where the next step's copy takes them."""
        for row, sequence in enumerate(sequences):
            drawn = sequence.sampler.drawn + ahead
            self._options[row] = self._base(sequence, drawn)
            self._options[row, words.COUNTER] = drawn
            if forbidden := sequence.forbidden(ahead):
                self._options[row, words.FORBIDDEN_COUNT] = len(forbidden)
                self._options[row, words.FORBIDDEN : words.FORBIDDEN + len(forbidden)] = sorted(forbidden)
        self._mirror.update(len(sequences))

    def call(self, logits: View, tokens: int) -> PackedCall:
        """The call that chooses from ``logits``, one row of V a token, and puts the tokens at an address."""
        count = math.prod(logits.shape) // self._vocab_size
        tensor = self._device.tensor
        arguments = (
            tensor(View(logits.address, "float32", (count, self._vocab_size))),
            tensor(View(self._mirror.address, "int32", (count, words.OPTION_WORDS))),
            tensor(View(self._seen.address, "int32", (self.rows, self._words))),
            tensor(View(self._workspace.address, "uint8", (count * words.row_bytes(self._vocab_size),))),
            tensor(View(tokens, "int64", (count,))),
        )
        return PackedCall("sampling", self._function, arguments)

    def read(self, sequences: list[Sequence], tokens: int) -> Callable[[], list[int]]:
        """Begin to read the tokens that are chosen; they are noted by the sequences' samplers once they are there."""
        wait = self._results.begin(View(tokens, "int64", (len(sequences),)))

        def finish() -> list[int]:
            chosen: list[int] = wait().tolist()
            for sequence, token in zip(sequences, chosen, strict=True):
                sequence.sampler.accept(token)
            return chosen

        return finish

    def _base(self, sequence: Sequence, drawn: int) -> NDArray[np.int32]:
        """What stays the same from step to step; a sequence that needs a slot gets that of its page table row.

        The kernel adds each token that it chooses to the slot's bits. Where the host chose some, they are written anew.
        """
        lease = sequence.lease
        assert lease is not None, "a sequence that does not run has no next token"
        sampling = sequence.sampler.sampling
        if sampling.repetition_penalty != 1.0:
            if self._slots[lease.row] != (sequence, drawn):
                self._write_seen(lease.row, sequence)
                self._bases.pop(sequence, None)
            self._slots[lease.row] = (sequence, drawn + 1)
        base = self._bases.get(sequence)
        if base is None:
            base = option_words(sequence, -1 if sampling.repetition_penalty == 1.0 else lease.row)
            self._bases = {item: row for item, row in self._bases.items() if item.finished is None}
            self._bases[sequence] = base
        return base

    def _write_seen(self, slot: int, sequence: Sequence) -> None:
        bits = np.zeros(32 * self._words, np.uint8)
        bits[sequence.tokens] = 1
        packed = np.packbits(bits, bitorder="little").view(np.int32)
        self._device.write(self._seen.address + 4 * slot * self._words, packed)


def option_words(sequence: Sequence, slot: int) -> NDArray[np.int32]:
    """The words of a row of options that stay the same for all tokens of a sequence."""
    sampler, sampling = sequence.sampler, sequence.sampler.sampling
    row = np.zeros(words.OPTION_WORDS, np.int32)
    row[words.SLOT], row[words.DO_SAMPLE], row[words.TOP_K] = slot, sampling.do_sample, sampling.top_k
    for place, name in _FLOATS.items():
        row.view(np.float32)[place] = getattr(sampling, name)
    row[words.TAIL : words.TAIL + 2] = np.array([1.0 - sampling.top_p]).view(np.int32)
    row[words.SEED : words.SEED + 2] = np.array([sampler.seed], np.uint64).view(np.int32)
    return row


def sampler_bytes(vocab_size: int, rows: int) -> int:
    """Device memory of a `DeviceSampler`, without what is staged."""
    sizes = 4 * rows * words.seen_words(vocab_size), rows * words.row_bytes(vocab_size)
    return sum(map(padded_bytes, sizes))

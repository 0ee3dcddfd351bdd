"""The tensors of a ``sample`` kernel, flat, and what a row's options say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import sampling as words
from moec.artifacts.words.sampling import BINS, CHUNK, OPTION_WORDS, padded, row_bytes, seen_words
from moec.compiler.kernels.cuda.primitives import value
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import ALIGNMENT_BYTES, Argument, arguments, i64, load, symbol

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr

LOWEST = float("-inf")
_NATS = 28.0
"""What the bins cover below the maximum, all but the last: less than this has no mass."""
_ONE = 2.0**40
"""Mass of the likeliest token."""


@dataclass(frozen=True)
class Operands:
    """The arguments, and the workspace as arrays of each type (one place is always of one type)."""

    vocab: int
    rows: Expr
    logits: Buffer
    options: Buffer
    seen: Buffer
    floats: Buffer
    integers: Buffer
    wides: Buffer
    tokens: Buffer

    @property
    def entries(self) -> int:
        """Scores of a row, with padding."""
        return padded(self.vocab)

    @property
    def chunks(self) -> int:
        """Blocks that score one row."""
        return self.entries // CHUNK

    def score(self, row: Expr, entry: Expr) -> Expr:
        """Place of a score in ``floats``."""
        return self._place(row, 0, 4) + T.cast(entry, "int64")

    def listed(self, row: Expr, number: Expr) -> Expr:
        """Place in ``integers`` of an entry of the list of keys."""
        return self._place(row, 4 * self.entries, 4) + T.cast(number, "int64")

    def best_score(self, row: Expr, chunk: Expr) -> Expr:
        """Place in ``floats`` of a chunk's best score."""
        return self._place(row, 8 * self.entries, 4) + T.cast(chunk, "int64")

    def best_entry(self, row: Expr, chunk: Expr) -> Expr:
        """Place in ``integers`` of the entry that has it."""
        return self._place(row, 8 * self.entries + 4 * self.chunks, 4) + T.cast(chunk, "int64")

    def count(self, row: Expr, bin_: Expr) -> Expr:
        """Place in ``integers`` of a bin's number of entries."""
        return self._place(row, 8 * self.entries + 8 * self.chunks, 4) + T.cast(bin_, "int64")

    def mass(self, row: Expr, bin_: Expr) -> Expr:
        """Place in ``wides`` of a bin's mass."""
        return self._place(row, 8 * self.entries + 8 * self.chunks + 4 * BINS, 8) + T.cast(bin_, "int64")

    def _place(self, row: Expr, offset: int, size: int) -> Expr:
        return T.cast(row, "int64") * i64(row_bytes(self.vocab) // size) + i64(offset // size)

    def word(self, row: Expr, number: int | Expr) -> Expr:
        """An option, int32."""
        place = i64(number) if isinstance(number, int) else T.cast(number, "int64")
        return settle(load(self.options, T.cast(row, "int64") * i64(OPTION_WORDS) + place))

    def real(self, row: Expr, number: int) -> Expr:
        """An option, float32."""
        return settle(T.reinterpret("float32", self.word(row, number)))

    def wide(self, row: Expr, number: int) -> Expr:
        """An option of two words, uint64."""
        low, high = (T.cast(T.cast(self.word(row, number + k), "uint32"), "uint64") for k in range(2))
        return settle(low | (high << T.uint64(32)))

    def draws(self, row: Expr) -> Expr:
        """Whether a row's token is drawn."""
        return settle(self.word(row, words.DO_SAMPLE) != T.int32(0))


def declare(vocab: int) -> Operands:
    """Declare the arguments of ``sample``."""
    rows, slots = symbol("R"), symbol("S")
    logits, options, seen, workspace, tokens = arguments(
        Argument("logits", (rows, vocab), "float32"),
        Argument("options", (rows, OPTION_WORDS), "int32"),
        Argument("seen", (slots, seen_words(vocab)), "int32"),
        Argument("workspace", (rows * i64(row_bytes(vocab)),), "uint8"),
        Argument("tokens", (rows,), "int64"),
    )
    floats, integers, wides = (
        T.decl_buffer(
            (rows * i64(row_bytes(vocab) // size),), dtype, data=workspace.data, align=ALIGNMENT_BYTES
        )
        for dtype, size in (("float32", 4), ("int32", 4), ("uint64", 8))
    )
    return Operands(vocab, rows, logits, options, seen, floats, integers, wides, tokens)


def bin_of(largest: Expr, score: Expr) -> Expr:
    """The bin of a score, int32: 0 at the maximum; in the last one nothing has mass, and infinity lies there."""
    place = settle((largest - score) * T.float32((BINS - 1) / _NATS))
    return settle(T.cast(T.min(place, T.float32(BINS - 1)), "int32"))


def mass_of(largest: Expr, score: Expr) -> Expr:
    """A token's mass, uint64, proportional to its probability: of integers, all orders of a sum are the same."""
    return settle(T.cast(value("float32", "exp", score - largest) * T.float32(_ONE), "uint64"))


def key_of(score: Expr) -> Expr:
    """uint32 in the order of the scores."""
    bits = settle(T.reinterpret("uint32", score))
    return settle(T.Select(bits >= T.uint32(1 << 31), ~bits, bits | T.uint32(1 << 31)))


def score_of(key: Expr) -> Expr:
    """The score of a key."""
    bits = settle(T.Select(key >= T.uint32(1 << 31), key & T.uint32((1 << 31) - 1), ~key))
    return settle(T.reinterpret("float32", bits))

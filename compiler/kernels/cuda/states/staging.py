"""What tokens bring to a recurrence, staged in shared memory: several of them at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.operands import settled
from moec.compiler.kernels.cuda.primitives import LANES, i32, registers, shared, value
from moec.compiler.kernels.emit import Buffer, Expr, i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.artifacts.states import RecurrenceSpec

STAGED = 8192
"""Numbers of keys, queries and decays of rows in shared memory, at most, unless one token has more."""


@dataclass(frozen=True)
class Stage:
    """Shared memory for what some tokens bring, token after token."""

    query: Buffer
    key: Buffer
    product: Buffer
    """``k . q``."""
    value: Buffer
    factor: Buffer | None
    """What the state decays by: a number a token, or one for each row; or steps, for each column."""
    beta: Buffer | None


@dataclass(frozen=True)
class _Piece:
    """Part of what tokens bring: ``width`` numbers each, and where one of a token's is read."""

    target: Buffer
    width: int
    read: Callable[[Expr, Expr], Expr]
    exponential: bool = False
    """Stage ``exp`` of it."""


class Staging:
    """How a block stages while it is emitted.

    Args:
        spec: the recurrence.
        inputs: queries, keys and values, then the decay and beta where there are such.
        most: tokens at a time.
        threads: of the block, which all take part.
    """

    def __init__(self, spec: RecurrenceSpec, inputs: Sequence[Buffer], most: int, threads: int) -> None:
        self.spec, self.threads = spec, threads
        per_token = spec.key_dim * (3 if spec.decay == "channel" else 2)
        self.tokens = max(1, min(most, STAGED // per_token))
        """At a time."""
        self.query, self.key, self.value, *rest = inputs
        self.beta = rest.pop() if spec.delta else None
        self.decay = rest[0] if rest else None

    def reserve(self) -> Stage:
        """Emit the shared memory."""
        spec, rows = self.spec, self.tokens * self.spec.key_dim
        sizes = {"head": self.tokens, "channel": rows, "rates": self.tokens * LANES}
        return Stage(
            shared(rows),
            shared(rows),
            shared(self.tokens),
            shared(self.tokens * LANES),
            None if spec.decay == "fixed" else shared(sizes[spec.decay]),
            shared(self.tokens) if spec.delta else None,
        )

    def bring(
        self, stage: Stage, head: Expr, first_column: Expr, begin: Expr, count: Expr, thread: Expr
    ) -> None:
        """Stage what ``count`` tokens from ``begin`` on bring to a head: to its columns from the first on."""
        spec, heads = self.spec, self.spec.value_heads
        key_head = settled(T.truncdiv(head, i32(heads // spec.key_heads)))

        def rows(source: Buffer, own: Expr, of: int) -> Callable[[Expr, Expr], Expr]:
            def read(token: Expr, row: Expr) -> Expr:
                line = i64(begin + token) * i64(of) + i64(own)
                return load(source, line * i64(spec.key_dim) + i64(row))

            return read

        def columns(source: Buffer) -> Callable[[Expr, Expr], Expr]:
            def read(token: Expr, lane: Expr) -> Expr:
                column = T.min(first_column + lane, i32(spec.value_dim - 1))
                line = i64(begin + token) * i64(heads) + i64(head)
                return load(source, line * i64(spec.value_dim) + i64(column))

            return read

        def alone(source: Buffer) -> Callable[[Expr, Expr], Expr]:
            return lambda token, _: load(source, (begin + token) * i32(heads) + head)

        pieces = [
            _Piece(stage.query, spec.key_dim, rows(self.query, key_head, spec.key_heads)),
            _Piece(stage.key, spec.key_dim, rows(self.key, key_head, spec.key_heads)),
            _Piece(stage.value, LANES, columns(self.value)),
        ]
        if spec.decay == "head":
            pieces.append(_Piece(stage.factor, 1, alone(self.decay), exponential=True))
        elif spec.decay == "channel":
            pieces.append(_Piece(stage.factor, spec.key_dim, rows(self.decay, head, heads), exponential=True))
        elif spec.decay == "rates":
            pieces.append(_Piece(stage.factor, LANES, columns(self.decay)))
        if stage.beta is not None:
            pieces.append(_Piece(stage.beta, 1, alone(self.beta)))
        self._copy(pieces, count, thread)

    def _copy(self, pieces: list[_Piece], count: Expr, thread: Expr) -> None:
        """``target[token, i] = read(token, i)`` for ``count`` tokens, by all threads: asked for first, then stored."""
        asked: list[tuple[_Piece, Expr, Expr, Buffer]] = []
        for piece in pieces:
            for turn in range(-(-self.tokens * piece.width // self.threads)):
                number = settled(i32(turn * self.threads) + thread)
                there = T.bind(number < count * i32(piece.width))
                held = registers(1)
                with when(there):
                    token = settled(T.truncdiv(number, i32(piece.width)))
                    store(held, 0, piece.read(token, settled(T.truncmod(number, i32(piece.width)))))
                asked.append((piece, number, there, held))
        for piece, number, there, held in asked:
            with when(there):
                found = load(held, 0)
                store(piece.target, number, value("float32", "exp", found) if piece.exponential else found)

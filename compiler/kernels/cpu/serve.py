"""The CPU's side of a captured GPU step: threads that wait for requests in the mailbox and run experts in place.

Every thread of a team calls ``serve_experts`` once and stays in it until it is told to stop; see
``artifacts/words/mailbox.py`` for the words that they share with the GPU and with each other. A request has two
phases, as ``experts_<body>`` has: gate and up of all its experts, then down. The rows of a phase are cut into equal
pieces, and a thread takes the next piece that nobody has: a thread that sleeps, or whose core somebody else uses, holds
nobody up but for the piece it is at. A piece says nothing about who computes it or in which order: the same request
gives the same bits with any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import mailbox
from moec.compiler.kernels.cpu.atomics import add, atomics, load_acquire, pause, store_release, take
from moec.compiler.kernels.cpu.expert_parts import ExpertTensors
from moec.compiler.kernels.cpu.machine import Machine
from moec.compiler.kernels.cpu.serve_pieces import DownPieces, GateUpPieces
from moec.compiler.kernels.cpu.watch import watch
from moec.compiler.kernels.emit import (
    Argument,
    Buffer,
    Expr,
    arguments,
    at_address,
    build,
    i64,
    keep,
    load,
    registers,
    scope,
    store,
    symbol,
    when,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tvm import tirx

    from moec.artifacts.model import ExpertBody


def serve(bodies: Sequence[ExpertBody], *, lanes: int, machine: str) -> tirx.PrimFunc:
    """The kernel ``serve_experts(words, index, weight, x, out, control, layers, middle)``.

    ``words [128]``, ``index [P]``, ``control [128]`` and ``layers [L, 4]`` are int64; ``weight [P]``, ``x [N]``,
    ``out [N]`` and ``middle [M]`` are float32. The first five lie in the mailbox; ``middle`` has room for `ENTRIES`
    times the largest intermediate size.

    Args:
        bodies: all of a model, numbered as in ``layers``.
        lanes: float32 lanes of the target's vectors (16, 8 or 4).
        machine: of the target, as ``uname -m`` says it.
    """

    def emit() -> None:
        pairs, values, layers, room = symbol("P"), symbol("N"), symbol("L"), symbol("M")
        buffers = arguments(
            Argument("words", (mailbox.WORDS,), "int64"),
            Argument("index", (pairs,), "int64"),
            Argument("weight", (pairs,), "float32"),
            Argument("x", (values,), "float32"),
            Argument("out", (values,), "float32"),
            Argument("control", (mailbox.CONTROL_WORDS,), "int64"),
            Argument("layers", (layers, mailbox.LAYER_WORDS), "int64"),
            Argument("middle", (room,), "float32"),
        )
        with atomics(machine):
            _Server(bodies, Machine(lanes), _Shared(*buffers)).emit()

    return build(mailbox.SERVE, emit, alone=False)


@dataclass(frozen=True)
class _Shared:
    words: Buffer
    index: Buffer
    weight: Buffer
    x: Buffer
    out: Buffer
    control: Buffer
    layers: Buffer
    middle: Buffer


class _Server:
    """The loop of one thread while it is emitted."""

    def __init__(self, bodies: Sequence[ExpertBody], machine: Machine, shared: _Shared) -> None:
        self.bodies, self.machine, self.shared = bodies, machine, shared

    def emit(self) -> None:
        watch(self.shared.words, mailbox.POSTED, self.shared.control, self._answer)

    def _answer(self, request: Expr) -> None:
        control = self.shared.control
        chunks = keep(load(control, mailbox.CHUNKS))
        limit = keep(request * chunks)

        def gate_finished() -> None:
            add(control, mailbox.GATE_FINISHED, 1)

        def down_finished() -> None:
            finished = add(control, mailbox.DOWN_FINISHED, 1)
            with when(finished + i64(1) == limit):
                store_release(self.shared.words, mailbox.DONE, request)

        self._phase(mailbox.GATE_TAKEN, limit, chunks, GateUpPieces, gate_finished)
        waiting = load_acquire(control, mailbox.GATE_FINISHED) < limit
        with T.While(T.And(waiting, load_acquire(control, mailbox.STOP) == i64(0))):
            pause()
        self._phase(mailbox.DOWN_TAKEN, limit, chunks, DownPieces, down_finished)

    def _phase(
        self,
        taken: int,
        limit: Expr,
        chunks: Expr,
        phase: type[GateUpPieces | DownPieces],
        finished: Callable[[], None],
    ) -> None:
        """Take pieces and work on them until none is left.

        The request is looked at only with a piece in hand: without one it may be over, and the next be on its way.
        """
        control, words = self.shared.control, self.shared.words
        piece = registers(2, "int64")
        store(piece, 0, take(control, taken, limit))
        with when(load(piece, 0) >= i64(0)):
            row = keep(load(words, mailbox.LAYER) * i64(mailbox.LAYER_WORDS))
            number = keep(load(self.shared.layers, row + i64(mailbox.BODY)))
            for own, body in enumerate(self.bodies):
                with when(number == i64(own)), scope():
                    pieces = phase(body, self.machine, self._tensors(row), self.shared.middle)
                    with T.While(load(piece, 0) >= i64(0)):
                        pieces.piece(keep(load(piece, 0) - (limit - chunks)), chunks)
                        finished()
                        store(piece, 0, take(control, taken, limit))

    def _tensors(self, row: Expr) -> ExpertTensors:
        shared = self.shared
        address, experts, chosen = (
            keep(load(shared.layers, row + i64(word)))
            for word in (mailbox.TABLE, mailbox.EXPERTS, mailbox.CHOSEN)
        )
        table = at_address(address, experts, "int64")
        tokens = keep(load(shared.words, mailbox.COUNT))
        return ExpertTensors(
            shared.x, shared.index, shared.weight, table, shared.out, tokens, chosen, experts
        )

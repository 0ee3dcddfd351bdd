"""Handing experts to the CPU inside a captured step: a request before the GPU's own experts, its sums after them.

``artifacts/words/mailbox.py`` says what lies in the mailbox, ``kernels/cpu/serve.py`` is the other side.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import mailbox
from moec.compiler.kernels.cuda.primitives import (
    call,
    element,
    launch,
    launch_next,
    registers,
    shared,
    sync,
    unroll,
    value,
    wait_previous,
)
from moec.compiler.kernels.emit import (
    Argument,
    Buffer,
    Expr,
    arguments,
    build,
    ceildiv,
    i64,
    load,
    loop,
    store,
    symbol,
    when,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tvm import tirx

    from moec.artifacts.model import ExpertBody

POST_THREADS = 512
COLLECT_THREADS = 128
VECTOR = 4
"""float32 in an access of 16 bytes."""
LOADS = 4
"""Accesses that a thread of ``collect`` has under way at once."""
LOOKS = 64
"""At the request's number between two at the clock and at the host's wish to give up."""


def post(body: ExpertBody) -> tirx.PrimFunc:
    """The kernel ``post_<body>(x, index, weight, layer, sent, words, box_index, box_weight, box_x)``.

    Makes a request of what ``index [T, K]`` names, if it names anything; where nobody took the sums of the one before,
    because a step ended in its middle, once that one is answered: the CPU must not miss a number. ``index``,
    ``layer [1]`` (its ordinal), ``sent [4]``, ``words [128]`` and ``box_index [P]`` are int64; ``x [T, H]``,
    ``weight [T, K]``, ``box_weight [P]`` and ``box_x [N]`` are float32. ``words`` and the boxes lie in the mailbox.
    T * K is at most `ENTRIES`.
    """

    def emit() -> None:
        tokens, chosen, pairs, values = symbol("T"), symbol("K"), symbol("P"), symbol("N")
        x, index, weight, layer, sent, words, box_index, box_weight, box_x = arguments(
            Argument("x", (tokens, body.hidden), "float32"),
            Argument("index", (tokens, chosen), "int64"),
            Argument("weight", (tokens, chosen), "float32"),
            Argument("layer", (1,), "int64"),
            Argument("sent", (mailbox.SENT_WORDS,), "int64"),
            Argument("words", (mailbox.WORDS,), "int64"),
            Argument("box_index", (pairs,), "int64"),
            Argument("box_weight", (pairs,), "float32"),
            Argument("box_x", (values,), "float32"),
        )
        with launch((1,), POST_THREADS) as (_, thread):
            any_share, arrived = shared(1, "int32"), shared(1, "int32")
            launch_next()
            wait_previous()
            with when(thread == T.int32(0)):
                store(any_share, 0, T.int32(0))
                left = T.And(load(sent, mailbox.TAKEN) != load(sent, mailbox.SENT), _works(sent))
                with when(left):
                    _wait(sent, words, arrived)
            sync()
            number = T.bind(i64(thread))
            with _strided(number, tokens * chosen, POST_THREADS) as pair, when(load(index, pair) >= i64(0)):
                store(any_share, 0, T.int32(1))
            sync()
            wanted = T.bind(T.And(load(any_share, 0) != T.int32(0), _works(sent)))
            with when(wanted):
                with _strided(number, tokens * chosen, POST_THREADS) as pair:
                    store(box_index, pair, load(index, pair))
                    store(box_weight, pair, load(weight, pair))
                _copy(x, box_x, tokens * i64(body.hidden), number, POST_THREADS, body.hidden)
            sync()
            with when(thread == T.int32(0)):
                _announce(wanted, sent, words, load(layer, 0), tokens)

    return build(mailbox.post_name(body.name), emit, alone=False)


def _announce(wanted: Expr, sent: Buffer, words: Buffer, layer: Expr, tokens: Expr) -> None:
    with when(wanted):
        request = registers(1, "int64")
        store(request, 0, load(sent, mailbox.SENT) + i64(1))
        store(words, mailbox.LAYER, layer)
        store(words, mailbox.COUNT, tokens)
        call("release_system", element(words, mailbox.POSTED), load(request, 0))
        store(sent, mailbox.SENT, load(request, 0))
    store(sent, mailbox.PENDING, T.cast(wanted, "int64"))


def collect(body: ExpertBody) -> tirx.PrimFunc:
    """The kernel ``collect_<body>(out [T, H], sent [4], words [128], box_out [N])``.

    Waits for the sums of the request that ``post`` made, where it made one, and adds them to ``out``: each by one
    addition, so that the same share of the CPU gives the same bits. Where the host aborts, or the time that it allows
    has passed, ``out`` stays as it is, and ``words`` and ``sent`` say so.
    """

    def emit() -> None:
        tokens, values = symbol("T"), symbol("N")
        out, sent, words, box = arguments(
            Argument("out", (tokens, body.hidden), "float32"),
            Argument("sent", (mailbox.SENT_WORDS,), "int64"),
            Argument("words", (mailbox.WORDS,), "int64"),
            Argument("box_out", (values,), "float32"),
        )
        total = tokens * i64(body.hidden)
        each = COLLECT_THREADS * VECTOR * LOADS
        with launch((ceildiv(total, each),), COLLECT_THREADS) as ((block,), thread):
            arrived = shared(1, "int32")
            launch_next()
            wait_previous()
            pending = T.bind(T.And(load(sent, mailbox.PENDING) != i64(0), _works(sent)))
            with when(thread == T.int32(0)):
                store(arrived, 0, T.int32(0))
                with when(pending):
                    _wait(sent, words, arrived)
            sync()
            with when(load(arrived, 0) != T.int32(0)):
                first = T.bind(i64(block) * i64(each) + i64(thread) * i64(VECTOR))
                _add(out, box, first, total, body.hidden)

    return build(mailbox.collect_name(body.name), emit, alone=False)


def _works(sent: Buffer) -> Expr:
    return load(sent, mailbox.BROKEN) == i64(0)


def _wait(sent: Buffer, words: Buffer, arrived: Buffer) -> None:
    """Set ``arrived`` once the CPU has answered; leave it where nobody will."""
    request, looking, start = registers(1, "int64"), registers(1, "int32"), registers(1, "int64")
    store(request, 0, load(sent, mailbox.SENT))
    store(start, 0, value("int64", "nanoseconds"))
    store(looking, 0, T.int32(1))
    with T.While(load(looking, 0) != T.int32(0)):
        with loop(LOOKS), when(load(looking, 0) != T.int32(0)):
            done = value("int64", "acquire_system", element(words, mailbox.DONE))
            with when(done >= load(request, 0)):
                store(sent, mailbox.TAKEN, load(request, 0))
                store(arrived, 0, T.int32(1))
                store(looking, 0, T.int32(0))
        with when(load(looking, 0) != T.int32(0)):
            abort = value("int64", "acquire_system", element(words, mailbox.ABORT))
            limit = value("int64", "acquire_system", element(words, mailbox.LIMIT))
            now = value("int64", "nanoseconds")
            with when(T.Or(abort != i64(0), now - load(start, 0) > limit)):
                store(sent, mailbox.BROKEN, i64(1))
                call("release_system", element(words, mailbox.FAILED), load(request, 0))
                store(looking, 0, T.int32(0))


def _add(out: Buffer, box: Buffer, first: Expr, total: Expr, hidden: int) -> None:
    """``out += box`` at this thread's places; all reads are under way before the first is waited for."""
    step = COLLECT_THREADS * VECTOR
    if hidden % VECTOR:
        with loop(LOADS) as number, loop(VECTOR) as part:
            place = T.bind(first + number * i64(step) + part)
            with when(place < total):
                store(out, place, load(out, place) + load(box, place))
        return
    words = registers(LOADS * VECTOR, "uint32")
    with unroll(LOADS) as number:
        place = T.bind(first + i64(number) * i64(step))
        with when(place < total):
            call("load_system_16", element(words, number * T.int32(VECTOR)), element(box, place))
    with unroll(LOADS) as number:
        place = T.bind(first + i64(number) * i64(step))
        with when(place < total), unroll(VECTOR) as part:
            sum_ = T.reinterpret("float32", load(words, number * T.int32(VECTOR) + part))
            store(out, place + i64(part), load(out, place + i64(part)) + sum_)


def _copy(source: Buffer, target: Buffer, total: Expr, thread: Expr, threads: int, hidden: int) -> None:
    """Copy ``total`` float32, 16 bytes at a time where rows allow it."""
    width = 1 if hidden % VECTOR else VECTOR
    with _strided(thread, ceildiv(total, width), threads) as number:
        if width == 1:
            store(target, number, load(source, number))
        else:
            words = registers(VECTOR, "uint32")
            call("load_16", element(words, 0), element(source, number * i64(width)))
            parts = [load(words, part) for part in range(VECTOR)]
            call("store_16", element(target, number * i64(width)), *parts)


@contextmanager
def _strided(thread: Expr, total: Expr, threads: int) -> Iterator[Expr]:
    """A loop over the numbers ``thread, thread + threads, ...`` below ``total``."""
    with loop(ceildiv(total, threads)) as step:
        number = T.bind(thread + step * i64(threads))
        with when(number < total):
            yield number

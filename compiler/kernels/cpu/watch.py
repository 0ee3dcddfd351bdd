"""A thread of the CPU that looks for a GPU's requests in shared memory, from load to close.

Between steps it sleeps, within one it looks all the time: see ``CONTROL_WORDS`` in ``artifacts/words/mailbox.py`` for
the words by which it is woken and told to leave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import mailbox
from moec.compiler.kernels.cpu.atomics import add, load_acquire, nap, pause, sleep
from moec.compiler.kernels.emit import Buffer, Expr, either, i64, keep, load, mod, registers, store, when

if TYPE_CHECKING:
    from collections.abc import Callable


def watch(words: Buffer, posted: int, control: Buffer, answer: Callable[[Expr], None]) -> None:
    """Emit the loop of one thread: ``answer`` each new number in ``words[posted]`` until told to stop."""
    # Two elements each: see emit.settle.
    last, spins, watches = (registers(2, "int64") for _ in range(3))
    for counter in (last, spins, watches):
        store(counter, 0, i64(0))
    add(control, mailbox.SERVING, 1)
    with T.While(load_acquire(control, mailbox.STOP) == i64(0)):
        request = keep(load_acquire(words, posted))

        def found() -> None:
            store(last, 0, request)
            store(spins, 0, i64(0))
            store(watches, 0, i64(0))
            answer(request)

        either(request != load(last, 0), found, lambda: _idle(control, spins, watches))


def _idle(control: Buffer, spins: Buffer, watches: Buffer) -> None:
    """Look again soon; after many times sleep, or where a step is at work that asks for nothing, nap.

    A step that nobody waits for (it was begun ahead, and its sequence has ended) leaves the threads at work.
    """
    pause()
    store(spins, 0, load(spins, 0) + i64(1))
    with when(load(spins, 0) > load(control, mailbox.SPINS)):
        store(spins, 0, i64(0))
        epoch = keep(load_acquire(control, mailbox.EPOCH))
        # In this order: who stops threads says so first, and then changes the epoch.
        stopped = keep(load_acquire(control, mailbox.STOP))

        def look_within_a_step() -> None:
            store(watches, 0, load(watches, 0) + i64(1))
            with when(load(watches, 0) > load(control, mailbox.WATCHES)):
                nap(control, mailbox.EPOCH, epoch)
                store(spins, 0, load(control, mailbox.SPINS))

        with when(stopped == i64(0)):
            either(mod(epoch, 2) == i64(0), lambda: sleep(control, mailbox.EPOCH, epoch), look_within_a_step)

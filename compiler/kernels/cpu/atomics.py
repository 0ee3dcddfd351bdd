"""What threads say to each other through memory: operations that TIRx has no words for, as LLVM functions.

They come into a kernel as text, which LLVM links into its module and inlines. ``kernels/cuda/primitives.cuh`` is the
same for GPUs.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.emit import Expr, i64, keep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.kernels.emit import Buffer

_FUNCTIONS = """
declare i64 @syscall(i64, ...)

define i64 @moec_load_acquire(ptr %place) alwaysinline {
  %value = load atomic i64, ptr %place acquire, align 8
  call void asm sideeffect "", "~{memory}"()
  ret i64 %value
}
define void @moec_store_release(ptr %place, i64 %value) alwaysinline {
  call void asm sideeffect "", "~{memory}"()
  store atomic i64 %value, ptr %place release, align 8
  ret void
}
define i64 @moec_add(ptr %place, i64 %value) alwaysinline {
  call void asm sideeffect "", "~{memory}"()
  %before = atomicrmw add ptr %place, i64 %value acq_rel, align 8
  call void asm sideeffect "", "~{memory}"()
  ret i64 %before
}
define i64 @moec_take(ptr %place, i64 %limit) alwaysinline {
entry:
  %first = load atomic i64, ptr %place acquire, align 8
  br label %look
look:
  %seen = phi i64 [ %first, %entry ], [ %now, %try ]
  %left = icmp slt i64 %seen, %limit
  br i1 %left, label %try, label %none
try:
  %next = add i64 %seen, 1
  %pair = cmpxchg ptr %place, i64 %seen, i64 %next acq_rel acquire, align 8
  %now = extractvalue { i64, i1 } %pair, 0
  %taken = extractvalue { i64, i1 } %pair, 1
  br i1 %taken, label %done, label %look
none:
  ret i64 -1
done:
  call void asm sideeffect "", "~{memory}"()
  ret i64 %seen
}
define void @moec_pause() alwaysinline {
  call void asm sideeffect "PAUSE", "~{memory}"()
  ret void
}
define void @moec_sleep(ptr %place, i64 %value) alwaysinline {
  %low = trunc i64 %value to i32
  %ignored = call i64 (i64, ...) @syscall(i64 FUTEX, ptr %place, i32 128, i32 %low, ptr null)
  ret void
}
@moec_nap_time = private constant [2 x i64] [i64 0, i64 NAP]
define void @moec_nap(ptr %place, i64 %value) alwaysinline {
  %low = trunc i64 %value to i32
  %ignored = call i64 (i64, ...) @syscall(i64 FUTEX, ptr %place, i32 128, i32 %low, ptr @moec_nap_time)
  ret void
}
"""
"""``moec_sleep``: until somebody wakes those who sleep at ``place``, unless its low half is no longer that of
``value`` (FUTEX_WAIT_PRIVATE); ``moec_nap``: the same for at most ``NAP`` nanoseconds."""

NAP_NANOSECONDS = 10**6

_PAUSES = {"x86_64": "pause", "aarch64": "yield"}
_FUTEX = {"x86_64": 202}
"""Numbers of the system call; 98 on every architecture that came later."""


@contextmanager
def atomics(machine: str, more: str = "") -> Iterator[None]:
    """The scope of a kernel that uses these functions.

    Args:
        machine: what the code will run on, as ``uname -m`` says it.
        more: LLVM text of other functions that it uses.
    """
    words = {"PAUSE": _PAUSES.get(machine, "nop"), "FUTEX": _FUTEX.get(machine, 98), "NAP": NAP_NANOSECONDS}
    text = _FUNCTIONS
    for word, value in words.items():
        text = text.replace(word, str(value))
    with T.attr(tirx.const(0, "int32"), "pragma_import_llvm", text + more):
        yield


def load_acquire(words: Buffer, place: int) -> Expr:
    """A word, before everything that is read after it; what its writer wrote before can then be seen."""
    return T.call_extern("int64", "moec_load_acquire", _address(words, place))


def store_release(words: Buffer, place: int, value: Expr) -> None:
    """Write a word, after everything that was written before it."""
    T.evaluate(T.call_extern("void", "moec_store_release", _address(words, place), value))


def add(words: Buffer, place: int, value: int) -> Expr:
    """Add to a word, as acquire and release; gives what was there before."""
    return keep(T.call_extern("int64", "moec_add", _address(words, place), i64(value)))


def take(words: Buffer, place: int, limit: Expr) -> Expr:
    """Count a word up by one, unless it has reached ``limit``: gives what was there before, or -1."""
    return T.call_extern("int64", "moec_take", _address(words, place), limit)


def pause() -> None:
    """Between two looks at a word: tell the processor that this thread is waiting."""
    T.evaluate(T.call_extern("void", "moec_pause"))


def sleep(words: Buffer, place: int, value: Expr) -> None:
    """Sleep until woken at a word, unless it is no longer ``value``."""
    T.evaluate(T.call_extern("void", "moec_sleep", _address(words, place), value))


def nap(words: Buffer, place: int, value: Expr) -> None:
    """Sleep for a millisecond, unless woken at a word before, or it is no longer ``value``."""
    T.evaluate(T.call_extern("void", "moec_nap", _address(words, place), value))


def _address(words: Buffer, place: int) -> Expr:
    return T.address_of(tirx.BufferLoad(words, [i64(place)]))

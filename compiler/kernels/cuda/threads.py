"""One GPU thread for each of a number of results."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import Buffer, Expr, ceildiv, i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_THREADS = 128


@contextmanager
def threads(count: Expr) -> Iterator[Expr]:
    """Launch one thread for each of ``count`` results; yields a thread's result number."""
    blocks = T.thread_binding(ceildiv(count, BLOCK_THREADS), thread="blockIdx.x")
    with blocks as block, T.thread_binding(i64(BLOCK_THREADS), thread="threadIdx.x") as thread:
        number = T.bind(T.cast(block, "int64") * i64(BLOCK_THREADS) + T.cast(thread, "int64"))
        with when(number < count):
            yield number


def registers(size: int, dtype: str = "float32") -> Buffer:
    """A small array of a thread's own."""
    return T.alloc_buffer((size,), dtype, scope="local")


def read(buffer: Buffer, dtype: str, place: Expr) -> Expr:
    """One element as float32; bfloat16 is stored as its bits."""
    value = load(buffer, place)
    if dtype == "float32":
        return value
    if dtype == "float16":
        return T.cast(value, "float32")
    return T.reinterpret("float32", T.cast(value, "uint32") << T.uint32(16))


def write(buffer: Buffer, dtype: str, place: Expr, value: Expr) -> None:
    """Store a float32 as one element, rounded to nearest even."""
    if dtype == "float32":
        store(buffer, place, value)
    elif dtype == "float16":
        store(buffer, place, T.cast(value, "float16"))
    else:
        bits = T.bind(T.reinterpret("uint32", value))
        odd = (bits >> T.uint32(16)) & T.uint32(1)
        rounded = (bits + T.uint32(0x7FFF) + odd) >> T.uint32(16)
        quiet = (bits >> T.uint32(16)) | T.uint32(0x40)
        is_nan = (bits & T.uint32(0x7FFFFFFF)) > T.uint32(0x7F800000)
        store(buffer, place, T.cast(T.Select(is_nan, quiet, rounded), "uint16"))


def each_of(thread: Expr, together: int, count: Expr) -> Iterator[Expr]:
    """A loop over this thread's share of ``count`` numbers; its body is emitted once."""
    with T.serial(i32(0), T.bind(T.truncdiv(count + i32(together - 1), i32(together)))) as turn:
        number = T.bind(turn * i32(together) + thread)
        with when(number < count):
            yield number

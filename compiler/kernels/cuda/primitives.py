"""The functions of ``primitives.cuh`` as TIRx calls, and what else kernels say on a GPU.

``element(buffer, place)`` is an address: most primitives take pointers, to registers, shared or global memory.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.kernels.emit import Buffer, Expr

HEADER = Path(__file__).with_name("primitives.cuh")
"""Goes before the generated source."""

LANES = 32
MULTIPROCESSORS = 132
"""Of an H100 or H200: what launches are divided for."""
LINE_WORDS = 16
"""int64 in a line of the second-level cache, such as addresses."""
COUNTERS = 4096
"""Of blocks that share work, in each module: see ``moec_arrives_last``."""


def i32(value: int | Expr) -> Expr:
    """``value`` as an int32 expression."""
    return tirx.IntImm("int32", value) if isinstance(value, int) else T.cast(value, "int32")


@contextmanager
def launch(blocks: tuple[int | Expr, ...], threads: int) -> Iterator[tuple[list[Expr], Expr]]:
    """Launch a kernel over a grid of up to three dimensions; yields block numbers and thread number, int32."""
    with T.thread_binding(i32(threads), thread="threadIdx.x") as thread:
        frames = []
        numbers = []
        for extent, axis in zip(blocks, "xyz", strict=False):
            frame = T.thread_binding(i32(extent), thread=f"blockIdx.{axis}")
            numbers.append(frame.__enter__())
            frames.append(frame)
        yield numbers, thread
        for frame in reversed(frames):
            frame.__exit__(None, None, None)


def registers(size: int, dtype: str = "float32") -> Buffer:
    """A small array of a thread's own; in registers where every index is a constant after unrolling."""
    return T.alloc_buffer((size,), dtype, scope="local", align=16)


def shared(size: int, dtype: str = "float32") -> Buffer:
    """Memory of a block, at most 48 KB in all; larger amounts through ``shared_dynamic``."""
    return T.alloc_buffer((size,), dtype, scope="shared", align=128)


def shared_dynamic(size: int, dtype: str = "uint8", align: int = 128) -> Buffer:
    """Memory of a block that is given to it at launch: one such buffer in a kernel, up to 99 KB everywhere.

    Hopper has 227 KB.
    """
    return T.alloc_buffer((size,), dtype, scope="shared.dyn", align=align)


def sync() -> None:
    """Wait for all threads of the block."""
    T.evaluate(T.tvm_storage_sync("shared"))


@contextmanager
def unroll(extent: int) -> Iterator[Expr]:
    """A loop that is written out, so that registers can be indexed by its counter (int32)."""
    with T.unroll(i32(0), i32(extent)) as counter:
        yield counter


def element(buffer: Buffer, place: int | Expr) -> Expr:
    """The address of one element."""
    return T.address_of(tirx.BufferLoad(buffer, [i32(place) if isinstance(place, int) else place]))


def call(name: str, *arguments: Expr) -> None:
    """A primitive that returns nothing."""
    T.evaluate(T.call_extern("void", f"moec_{name}", *arguments))


def value(dtype: str, name: str, *arguments: Expr) -> Expr:
    """What a primitive returns, computed once, here."""
    return T.bind(T.call_extern(dtype, f"moec_{name}", *arguments))


def wait_previous() -> None:
    """Until the kernels before this one are done; nothing that they write may be read earlier.

    On GPUs before sm_90, and where a kernel is not launched early, this is nothing.
    """
    call("wait_previous")


def launch_next() -> None:
    """Let the next kernel of the stream begin with what it does before its ``wait_previous``."""
    call("launch_next")


def blocks_at_once(count: int) -> None:
    """Bound the registers of a thread so that a multiprocessor holds ``count`` blocks of this kernel at once."""
    call("blocks_at_once", i32(count))


def pack(dtype: str, low: Expr, high: Expr) -> Expr:
    """Two float32 rounded to ``dtype`` (bfloat16 or float16) in one uint32."""
    return value("uint32", f"pack_{SHORT[dtype]}", low, high)


def unpack(dtype: str, pair: Expr) -> tuple[Expr, Expr]:
    """The two numbers of a pair as float32."""
    short = SHORT[dtype]
    return value("float32", f"low_{short}", pair), value("float32", f"high_{short}", pair)


def mma(dtype: str, sums: Expr, a: list[Expr], b: list[Expr]) -> None:
    """``sums`` (address of 4 float32) += a (4 uint32) times b (2 uint32); see ``mma.m16n8k16``."""
    call(f"mma_{SHORT[dtype]}", sums, *a, *b)


def warp_sum(number: Expr, width: int = LANES) -> Expr:
    """The sum over groups of ``width`` neighbouring lanes, in every lane, always added in the same order."""
    return _butterfly(number, width, lambda a, b: a + b)


def warp_max(number: Expr, width: int = LANES) -> Expr:
    """The largest over groups of ``width`` neighbouring lanes, in every lane."""
    return _butterfly(number, width, T.max)


def _butterfly(number: Expr, width: int, combine: object) -> Expr:
    assert callable(combine)
    step = width // 2
    while step:
        number = T.bind(combine(number, value("float32", "shuffle_xor", number, i32(step))))
        step //= 2
    return number


SHORT = {"bfloat16": "bf16", "float16": "f16"}
"""The types in the names of primitives."""

"""Short names for the statements that kernels emit.

A kernel is a Python function that runs once, at compile time, and emits TIRx statements through TVM's builder.
Buffers are addressed flat, with 64-bit element offsets, and vectors are explicit: a load names its lane count.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Expr: TypeAlias = Any
"""A TIRx expression (``tvm.ir.Expr``); TVM ships no type stubs."""

Buffer: TypeAlias = Any

HAND_WRITTEN = "moec.kernel"
"""Attribute of functions that are written out: the loops of all others are TVM's to order."""

ALIGNMENT_BYTES = 64
CPU = 1
"""DLPack's device type."""
STORAGE = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}
"""How the elements of a tensor are read: bfloat16 as its bits, since LLVM has no arithmetic on it."""


def i64(value: int | Expr) -> Expr:
    """``value`` as an int64 expression."""
    return tirx.IntImm("int64", value) if isinstance(value, int) else T.cast(value, "int64")


def symbol(name: str) -> Expr:
    """A symbolic int64 dimension."""
    return tirx.Var(name, "int64")


def build(name: str, body: Callable[[], None], *, alone: bool = True) -> tirx.PrimFunc:
    """Run ``body``, which declares its arguments with ``argument``, into a PrimFunc called ``name``.

    Args:
        name: of the function.
        body: emits it.
        alone: nobody else writes to the arguments while the function runs, and none is part of another.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, HAND_WRITTEN: True})
        if alone:
            T.func_attr({"tirx.noalias": True})
        with scope():
            body()
    return builder.get().with_attr("global_symbol", name)


@dataclass(frozen=True)
class Argument:
    """A contiguous tensor that a kernel takes."""

    name: str
    shape: tuple[int | Expr, ...]
    dtype: str


def arguments(*declared: Argument | None) -> list[Buffer]:
    """Declare a kernel's arguments in order; each becomes a flat buffer of storage elements (``None`` stays so)."""
    matched = [None if argument is None else (argument, _match(argument)) for argument in declared]
    return [None if pair is None else _flat(*pair) for pair in matched]


def _match(argument: Argument) -> Buffer:
    handle = T.arg(argument.name, T.handle())
    return T.match_buffer(handle, _extents(argument), argument.dtype, align=ALIGNMENT_BYTES)


def _flat(argument: Argument, matched: Buffer) -> Buffer:
    size = i64(1)
    for extent in _extents(argument):
        size = size * extent
    dtype = STORAGE.get(argument.dtype, argument.dtype)
    return T.decl_buffer((size,), dtype, data=matched.data, align=ALIGNMENT_BYTES)


def _extents(argument: Argument) -> list[Expr]:
    return [i64(extent) if isinstance(extent, int) else extent for extent in argument.shape]


@contextmanager
def llvm_functions(text: str) -> Iterator[None]:
    """Statements that call functions which are given in LLVM's language; they become part of those that call them."""
    with T.attr(ir.StringImm("llvm"), "pragma_import_llvm", ir.StringImm(text)):
        yield


def at_address(address: Expr, size: int, dtype: str) -> Buffer:
    """A flat buffer of ``size`` elements at a machine ``address`` (int64)."""
    pointer = T.bind(T.reinterpret("handle", address))
    return T.decl_buffer((i64(size),), STORAGE.get(dtype, dtype), data=pointer, align=ALIGNMENT_BYTES)


_scopes: list[list[Expr]] = []
"""Pointers to free at the end of each open scope: a kernel, or a parallel loop's body."""


@contextmanager
def scope() -> Iterator[None]:
    """Statements at whose end the memory of ``scratch`` is given back."""
    _scopes.append([])
    yield
    for pointer in reversed(_scopes.pop()):
        T.evaluate(T.TVMBackendFreeWorkspace(T.int32(CPU), T.int32(0), pointer))


def scratch(size: int | Expr, dtype: str = "float32") -> Buffer:
    """Memory from the thread's workspace until the end of the kernel or of the parallel loop's body.

    Taken from the workspace by hand: TVM's CompactBufferAllocation spends seconds on proving how much of an
    allocated buffer is used.
    """
    extent = i64(size) if isinstance(size, int) else size
    bits = int(dtype[-2:])
    size_bytes = T.cast(extent * i64(bits // 8), "uint64")
    code = {"float32": 2, "int64": 0, "int32": 0, "int16": 0, "uint16": 1}[dtype]
    call = T.TVMBackendAllocWorkspace(T.int32(CPU), T.int32(0), size_bytes, T.int32(code), T.int32(bits))
    pointer = T.bind(call)
    _scopes[-1].append(pointer)
    return T.decl_buffer((extent,), dtype, data=pointer, align=ALIGNMENT_BYTES)


def registers(size: int, dtype: str = "float32") -> Buffer:
    """A small array that LLVM keeps in registers, where every index is a constant.

    Its scope is "global": TVM takes arrays of scope "local" from the workspace on the CPU, at a call each, and LLVM
    cannot keep those in registers (measured: 24,552 workspace calls a token in a tiny model, 2.4 times the step).
    """
    return T.alloc_buffer((size,), dtype, scope="global", align=ALIGNMENT_BYTES)


def keep(value: Expr) -> Expr:
    """``value``, computed once, here: a variable. Chains of it want a ``settle`` now and then."""
    return T.bind(value)


def settle(value: Expr) -> Expr:
    """``value``, computed once, here, through memory, so that TVM cannot see what it is.

    TVM's simplifier substitutes what a variable is bound to, also while it emits LLVM: chains of bindings grow
    exponentially at compile time (a softmax of a tanh took minutes). Not for inner loops: it costs a store and a load.
    """
    element, _, lanes = str(value.ty.dtype).partition("x")
    width = int(lanes or 1)
    # Twice as long as needed for integers: TVM's StorageRewrite loses arrays of 64 bits (0.27.0.post1).
    place = registers(2 if element == "int64" else width, element)
    store(place, 0, value, width)
    return load(place, 0, width)


def load(buffer: Buffer, offset: Expr | int, lanes: int = 1) -> Expr:
    """``lanes`` adjacent elements from ``offset``."""
    return tirx.BufferLoad(buffer, [offset if lanes == 1 else T.Ramp(offset, _one(offset), lanes)])


def store(buffer: Buffer, offset: Expr | int, value: Expr, lanes: int = 1) -> None:
    """Write ``lanes`` adjacent elements from ``offset``."""
    T.buffer_store(buffer, value, [offset if lanes == 1 else T.Ramp(offset, _one(offset), lanes)])


def prefetch(buffer: Buffer, offset: Expr) -> None:
    """Ask for the cache line at ``offset``, into the second level; an address outside the buffer does no harm."""
    address = T.address_of(tirx.BufferLoad(buffer, [offset]))
    read, second_level, data = T.int32(0), T.int32(2), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, read, second_level, data))


def lane(vector: Expr, number: int) -> Expr:
    """One element of a vector."""
    return tirx.Shuffle([vector], [tirx.IntImm("int32", number)])


def splat(value: Expr | float, lanes: int) -> Expr:
    """A float32 in every lane."""
    scalar = T.float32(value) if isinstance(value, (int, float)) else value
    return scalar if lanes == 1 else T.Broadcast(scalar, lanes)


def fill(buffer: Buffer, size: int, lanes: int, value: float = 0.0) -> None:
    """Set a register array; ``size`` is a multiple of ``lanes``."""
    for offset in range(0, size, lanes):
        store(buffer, offset, splat(value, lanes), lanes)


@contextmanager
def loop(extent: int | Expr, *, parallel: bool = False) -> Iterator[Expr]:
    """A loop over ``0 .. extent-1`` with an int64 counter."""
    kind = T.parallel if parallel else T.serial
    with kind(i64(0), i64(extent) if isinstance(extent, int) else extent) as counter:
        if parallel:
            with scope():
                yield counter
        else:
            yield counter


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Statements that run where ``condition`` holds."""
    with T.If(condition), T.Then():
        yield


def either(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Emit both branches of a condition."""
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def ceildiv(value: Expr, divisor: int) -> Expr:
    """``value / divisor`` rounded up, for values that are not negative."""
    return tirx.truncdiv(value + i64(divisor - 1), i64(divisor))


def div(value: Expr, divisor: int | Expr) -> Expr:
    """Quotient of values that are not negative."""
    return tirx.truncdiv(value, i64(divisor) if isinstance(divisor, int) else divisor)


def mod(value: Expr, divisor: int | Expr) -> Expr:
    """Remainder of values that are not negative."""
    return tirx.truncmod(value, i64(divisor) if isinstance(divisor, int) else divisor)


def _one(offset: Expr | int) -> Expr | int:
    return (
        1
        if isinstance(offset, int)
        else tirx.IntImm(offset.ty.dtype if hasattr(offset, "ty") else "int64", 1)
    )

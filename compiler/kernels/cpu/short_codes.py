"""Codes as integers of 16 bits, in vectors: what is multiplied by activations of 16 bits (``rounding``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.emit import Buffer, Expr, keep, load
from moec.formats.minifloat import MINIFLOATS
from moec.formats.rows import BLOCK, SYMMETRIC_ZERO

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cpu.machine import Machine
    from moec.formats.record import Format


@dataclass(frozen=True)
class ShortCodes:
    """A kind of codes whose values are small integers, times ``unit``."""

    vectors: Callable[[Buffer, Expr, int], list[Expr]]
    """Takes the bytes, where ``2 * lanes`` of them begin, and ``lanes``; gives int16 vectors of ``2 * lanes``."""
    per_byte: int
    """Codes of a byte, and vectors of a step."""
    unit: float = 1.0


def _int8(codes: Buffer, place: Expr, lanes: int) -> list[Expr]:
    count = 2 * lanes
    return [T.cast(T.reinterpret(f"int8x{count}", load(codes, place, count)), f"int16x{count}")]


def _int4(codes: Buffer, place: Expr, lanes: int) -> list[Expr]:
    count = 2 * lanes
    both = keep(T.cast(load(codes, place, count), f"uint16x{count}"))
    low, high = both & _splat("uint16", 15, count), both >> _splat("uint16", 4, count)
    return [T.reinterpret(f"int16x{count}", half) for half in (low, high)]


_LOOK_UPS = {16: "llvm.x86.ssse3.pshuf.b.128", 32: "llvm.x86.avx2.pshuf.b"}
"""By bytes: each byte's low half looks up one of sixteen, the same sixteen for every 16 bytes."""


def _e2m1(codes: Buffer, place: Expr, lanes: int) -> list[Expr]:
    count = 2 * lanes
    values = (MINIFLOATS["e2m1"].values() / E2M1_UNIT).astype(int).tolist() * (count // 16)
    numbers = [tirx.IntImm("int32", number) for number in range(count)]
    table = keep(tirx.Shuffle([tirx.IntImm("int8", value) for value in values], numbers))
    both = keep(load(codes, place, count))
    nibbles = [part & _splat("uint8", 15, count) for part in (both, both >> _splat("uint8", 4, count))]
    found = [T.call_llvm_intrin(f"int8x{count}", _LOOK_UPS[count], table, part) for part in nibbles]
    return [T.cast(part, f"int16x{count}") for part in found]


E2M1_UNIT = 0.5
"""What FP4's numbers are whole multiples of."""

SHORT_CODES: dict[str, ShortCodes] = {
    "int8": ShortCodes(_int8, 1),
    "int4": ShortCodes(_int4, 2),
    "e2m1": ShortCodes(_e2m1, 2, E2M1_UNIT),
}
"""By the name that ``Format.codes`` has."""


@dataclass(frozen=True)
class Steps:
    """How the codes of a row meet vectors: a step is ``2 * lanes`` of their bytes.

    Codes of 4 bits lie 16 low and 16 high in a block of 32 columns. Where a step is two blocks, its first vector has
    the low ones of both, its second the high ones; a block that is left over at the end is a step of half the lanes.
    """

    lanes: int
    """int32 lanes of a vector of sums."""
    columns: int
    paired: bool
    """Whether a step is two blocks of codes of 4 bits."""


def steps_of(kind: Format, machine: Machine) -> Steps | None:
    """The steps of a format's rows; None where products are made in float32."""
    if kind.codes not in SHORT_CODES or not machine.multiplies_shorts:
        return None
    columns = 2 * machine.lanes * SHORT_CODES[kind.codes].per_byte
    return Steps(machine.lanes, columns, columns == 2 * BLOCK)


def has_offsets(kind: Format) -> bool:
    """Whether something is added to, or taken from, all codes of a group."""
    return bool(kind.offset_bytes or usual_zero(kind))


def usual_zero(kind: Format) -> int:
    """The zero point of all groups of a format without any of their own."""
    return SYMMETRIC_ZERO if kind.codes == "int4" and not kind.minima else 0


_PRODUCTS = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}


def add_products(a: Expr, b: Expr, lanes: int) -> Expr:
    """int32: the sums of pairs of products of int16."""
    return T.call_llvm_intrin(f"int32x{lanes}", _PRODUCTS[lanes], a, b)


def _splat(dtype: str, value: int, lanes: int) -> Expr:
    return T.Broadcast(tirx.IntImm(dtype, value), lanes)

"""What the codes and scales of quantized weights mean, in vectors: one emitter for each kind (``moec.formats``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.numeric import widen
from moec.compiler.kernels.emit import Buffer, Expr, i64, keep, load, splat
from moec.formats.minifloat import MINIFLOATS
from moec.formats.rows import BLOCK, SYMMETRIC_ZERO

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cpu.machine import Machine

HALF_BLOCK = BLOCK // 2


@dataclass(frozen=True)
class Codes:
    """A kind of codes."""

    block: Callable[[Buffer, Expr, Expr | None, Machine], list[Expr]]
    """Takes the bytes, where a block of 32 columns begins, its zero point in every lane (None: the usual one) and the
    processor; gives the columns' values, times ``unit``, in order: float32 vectors."""
    unit: float = 1.0


def _int8(codes: Buffer, place: Expr, _zero: Expr | None, machine: Machine) -> list[Expr]:
    lanes = machine.lanes
    return [
        as_float(T.reinterpret(f"int8x{lanes}", load(codes, place + i64(offset), lanes)), lanes)
        for offset in range(0, BLOCK, lanes)
    ]


def _int4(codes: Buffer, place: Expr, zero: Expr | None, machine: Machine) -> list[Expr]:
    """The high half of a byte is made a number where it is, without a shift; the low one is looked up if possible."""
    lanes = machine.lanes
    zero = splat(float(SYMMETRIC_ZERO), lanes) if zero is None else zero
    both = _bytes(codes, place, machine)
    high = [_as_mantissa(number, 0xF0, lanes) - (zero + splat(_UNITS[0xF0], lanes)) for number in both]
    if machine.looks_up_sixteen:
        table = keep(T.cast(T.Ramp(T.int32(0), T.int32(1), lanes), f"float32x{lanes}") - zero)
        return [*(_look_up(table, number) for number in both), *high]
    low = [_as_mantissa(number, 0x0F, lanes) - (zero + splat(_UNITS[0x0F], lanes)) for number in both]
    return [*low, *high]


_UNITS = {0x0F: 2.0**23, 0xF0: 2.0**19}
"""Powers of two whose float32 has its last bit worth one where a half of a byte has its own."""


def _as_mantissa(number: Expr, half: int, lanes: int) -> Expr:
    """One half of a byte, added to its unit."""
    exponent = int(np.float32(_UNITS[half]).view(np.int32))
    bits = (number & _ints(half, lanes)) | _ints(exponent, lanes)
    return T.reinterpret(f"float32x{lanes}", bits)


def _e2m1(codes: Buffer, place: Expr, _zero: Expr | None, machine: Machine) -> list[Expr]:
    lanes = machine.lanes
    values = [T.float32(value) for value in MINIFLOATS["e2m1"].values()[:lanes].tolist()]
    both = _bytes(codes, place, machine)
    nibbles = [*both, *(number >> _ints(4, lanes) for number in both)]
    if machine.looks_up_sixteen:
        table = tirx.Shuffle(values, [tirx.IntImm("int32", number) for number in range(lanes)])
        return [_look_up(table, number) for number in nibbles]
    return [_e2m1_by_parts(keep(number), values, machine) for number in nibbles]


def _e2m1_by_parts(number: Expr, values: list[Expr], machine: Machine) -> Expr:
    """A magnitude and a sign."""
    lanes = machine.lanes
    sign = (number & _ints(8, lanes)) << _ints(28, lanes)
    if machine.looks_up_eight:
        table = tirx.Shuffle(values, [tirx.IntImm("int32", entry) for entry in range(lanes)])
        magnitude = T.call_llvm_intrin("float32x8", "llvm.x86.avx2.permps", table, number)
    else:
        low = keep(number & _ints(7, lanes))
        # Normal numbers by their bits: exponent and mantissa in place, the exponent's bias from 1 to 127.
        normal = T.reinterpret(f"float32x{lanes}", (low + _ints(126 << 1, lanes)) << _ints(22, lanes))
        magnitude = T.Select(low < _ints(2, lanes), as_float(low, lanes) * splat(0.5, lanes), normal)
    return T.reinterpret(f"float32x{lanes}", T.reinterpret(f"int32x{lanes}", magnitude) | sign)


def _e4m3(codes: Buffer, place: Expr, _zero: Expr | None, machine: Machine) -> list[Expr]:
    vectors = [
        keep(load(codes, place + i64(offset), machine.lanes)) for offset in range(0, BLOCK, machine.lanes)
    ]
    return [
        (_e4m3_by_f16 if machine.native_f16 else _e4m3_by_f32)(vector, machine.lanes) for vector in vectors
    ]


E4M3_UNIT = 2.0**-8
"""Exponents of e4m3 have a bias of 7, those of float16 of 15."""


def _e4m3_by_f16(vector: Expr, lanes: int) -> Expr:
    wide = T.cast(T.reinterpret(f"int8x{lanes}", vector), f"int16x{lanes}")
    bits = T.reinterpret(f"uint16x{lanes}", wide) << _shorts(7, lanes)
    number = keep(bits & _shorts(0xBF80, lanes))
    # NaN is the one magnitude that carries into the exponent's highest bit; with it, the exponent has every bit set.
    nan = (number + _shorts(0x80, lanes)) & _shorts(0x4000, lanes)
    return T.cast(T.reinterpret(f"float16x{lanes}", number | nan), f"float32x{lanes}")


def _e4m3_by_f32(vector: Expr, lanes: int) -> Expr:
    bits = keep(T.cast(vector, f"int32x{lanes}"))
    low = keep(bits & _ints(0x7F, lanes))
    sign = (bits & _ints(0x80, lanes)) << _ints(24, lanes)
    # 2^112 moves the exponent's bias from 7 to 127, but for the unit, and makes subnormals normal.
    number = T.reinterpret(f"float32x{lanes}", low << _ints(20, lanes)) * splat(2.0**112, lanes)
    finite = T.reinterpret(f"int32x{lanes}", number)
    magnitude = T.Select(low == _ints(0x7F, lanes), _ints(0x7FC00000, lanes), finite)
    return T.reinterpret(f"float32x{lanes}", magnitude | sign)


CODES: dict[str, Codes] = {
    "int8": Codes(_int8),
    "int4": Codes(_int4),
    "e4m3": Codes(_e4m3, E4M3_UNIT),
    "e2m1": Codes(_e2m1),
}
"""By the name that ``Format.codes`` has."""


def _plain(dtype: str) -> Callable[[Buffer, Expr, int, Machine], Expr]:
    return lambda buffer, place, lanes, machine: widen(
        buffer, dtype, place, lanes, native_f16=machine.native_f16
    )


def _e8m0(buffer: Buffer, place: Expr, lanes: int, _machine: Machine) -> Expr:
    """A power of two by its exponent; the least, 2^-127, is a subnormal."""
    suffix = "" if lanes == 1 else f"x{lanes}"
    exponent = keep(T.cast(load(buffer, place, lanes), f"int32{suffix}"))
    bits = T.Select(exponent == _ints(0, lanes), _ints(1 << 22, lanes), exponent << _ints(23, lanes))
    nan = T.Select(exponent == _ints(255, lanes), _ints(0x7FC00000, lanes), bits)
    return T.reinterpret(f"float32{suffix}", nan)


SCALES: dict[str, Callable[[Buffer, Expr, int, Machine], Expr]] = {
    "float16": _plain("float16"),
    "float32": _plain("float32"),
    "e8m0": _e8m0,
}
"""By the name that ``Format.scale`` has: take a buffer of ``SCALE_STORAGE``, a number, lanes and the processor."""
SCALE_STORAGE = {"float16": "float16", "float32": "float32", "e8m0": "uint8"}


def _bytes(codes: Buffer, place: Expr, machine: Machine) -> list[Expr]:
    """The 16 bytes of a block of codes of 4 bits, int32: columns 0 to 15 in the low halves, 16 to 31 in the high."""
    lanes = machine.lanes
    return [
        keep(T.cast(load(codes, place + i64(offset), lanes), f"int32x{lanes}"))
        for offset in range(0, HALF_BLOCK, lanes)
    ]


def _look_up(table: Expr, number: Expr) -> Expr:
    """Of a table of sixteen, by the four low bits of each lane."""
    return T.call_llvm_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", table, number)


def as_float(value: Expr, lanes: int) -> Expr:
    """Integers of 8 bits or more as float32."""
    suffix = "" if lanes == 1 else f"x{lanes}"
    return T.cast(T.cast(value, f"int32{suffix}"), f"float32{suffix}")


def _ints(value: int, lanes: int) -> Expr:
    return T.int32(value) if lanes == 1 else T.Broadcast(T.int32(value), lanes)


def _shorts(value: int, lanes: int) -> Expr:
    return T.Broadcast(T.uint16(value), lanes)

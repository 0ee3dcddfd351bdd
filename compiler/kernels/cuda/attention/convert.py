"""Between float32 tensors and what the cache and the tensor cores hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.numeric import F16_LARGEST, saturate_f16
from moec.compiler.kernels.cuda.primitives import call, element, pack, registers, unpack
from moec.compiler.kernels.emit import Buffer, Expr, load

if TYPE_CHECKING:
    from collections.abc import Sequence


def floats(buffer: Buffer, place: Expr, count: int) -> list[Expr]:
    """``count`` adjacent float32 (a multiple of 4) from a place that is a multiple of 4."""
    words = registers(count, "uint32")
    for start in range(0, count, 4):
        call("load_16", element(words, start), element(buffer, place + type_of(place, start)))
    return [T.bind(T.reinterpret("float32", T.bind(load(words, i)))) for i in range(count)]


def type_of(like: Expr, value: int) -> Expr:
    """An integer constant of the type of ``like``."""
    return T.int64(value) if str(like.ty.dtype) == "int64" else T.int32(value)


def stored(dtype: str, values: Sequence[Expr]) -> list[Expr]:
    """Pairs of the cache's 16-bit ``dtype``; float16 saturates."""
    if dtype == "float16":
        values = [saturate_f16(value, 1) for value in values]
    return [pack(dtype, values[i], values[i + 1]) for i in range(0, len(values), 2)]


def clamped(dtype: str, value: Expr) -> Expr:
    """``value`` within the range of ``dtype``, so that its two parts are finite."""
    if dtype != "float16":
        return value
    return T.bind(T.max(T.min(value, T.float32(F16_LARGEST)), T.float32(-F16_LARGEST)))


def split(dtype: str, low: Expr, high: Expr) -> tuple[Expr, Expr]:
    """A pair of float32 as two pairs of ``dtype``: the numbers rounded, and what that left out."""
    rounded = pack(dtype, low, high)
    first, second = unpack(dtype, rounded)
    return rounded, pack(dtype, low - first, high - second)


def floats_2(buffer: Buffer, place: Expr) -> list[Expr]:
    """Two adjacent float32."""
    return [T.bind(load(buffer, place)), T.bind(load(buffer, place + type_of(place, 1)))]

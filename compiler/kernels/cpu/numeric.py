"""Conversions between the stored types and float32, for vectors of any width, without calls to library functions."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.emit import Buffer, Expr, keep, load, store

F16_LARGEST = 65504.0


def widen(buffer: Buffer, dtype: str, offset: Expr | int, lanes: int, *, native_f16: bool) -> Expr:
    """Load ``lanes`` elements of a tensor of ``dtype`` as float32."""
    value = load(buffer, offset, lanes)
    if dtype == "float32":
        return value
    if dtype == "bfloat16":
        return _f32(_u32(value, lanes) << _const(16, lanes), lanes)
    assert dtype == "float16", dtype
    return T.cast(value, _type("float32", lanes)) if native_f16 else _widen_f16(value, lanes)


def narrow_store(
    buffer: Buffer, dtype: str, offset: Expr | int, value: Expr, lanes: int, *, native_f16: bool
) -> None:
    """Store float32 ``value`` as ``dtype``, rounded to nearest even."""
    if dtype == "float32":
        store(buffer, offset, value, lanes)
    elif dtype == "bfloat16":
        store(buffer, offset, _narrow_bf16(value, lanes), lanes)
    elif native_f16:
        store(buffer, offset, T.cast(value, _type("float16", lanes)), lanes)
    else:
        store(buffer, offset, _narrow_f16(value, lanes), lanes)


def saturate_f16(value: Expr, lanes: int) -> Expr:
    """``value`` within what float16 holds: beyond its largest number it stays there; NaN stays NaN."""
    value = keep(value)
    highest, lowest = (_floats(sign * F16_LARGEST, lanes) for sign in (1.0, -1.0))
    return T.Select(value > highest, highest, T.Select(value < lowest, lowest, value))


def _narrow_bf16(value: Expr, lanes: int) -> Expr:
    bits = keep(_bits(value, lanes))
    odd = (bits >> _const(16, lanes)) & _const(1, lanes)
    rounded = (bits + _const(0x7FFF, lanes) + odd) >> _const(16, lanes)
    quiet = (bits >> _const(16, lanes)) | _const(0x40, lanes)
    is_nan = (bits & _const(0x7FFFFFFF, lanes)) > _const(0x7F800000, lanes)
    return T.cast(T.Select(is_nan, quiet, rounded), _type("uint16", lanes))


def _widen_f16(value: Expr, lanes: int) -> Expr:
    bits = keep(T.cast(T.reinterpret(_type("uint16", lanes), value), _type("uint32", lanes)))
    magnitude = keep((bits & _const(0x7FFF, lanes)) << _const(13, lanes))
    # 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal.
    scaled = _bits(_f32(magnitude, lanes) * _f32(_const(0x77800000, lanes), lanes), lanes)
    special = magnitude | _const(0x7F800000, lanes)
    finite = magnitude < _const(0x0F800000, lanes)
    sign = (bits & _const(0x8000, lanes)) << _const(16, lanes)
    return _f32(T.Select(finite, scaled, special) | sign, lanes)


def _narrow_f16(value: Expr, lanes: int) -> Expr:
    bits = keep(_bits(value, lanes))
    sign = keep((bits >> _const(16, lanes)) & _const(0x8000, lanes))
    magnitude = keep(bits & _const(0x7FFFFFFF, lanes))
    odd = (magnitude >> _const(13, lanes)) & _const(1, lanes)
    normal = (magnitude + _const(0xC8000FFF, lanes) + odd) >> _const(13, lanes)
    # Adding 0.5 aligns a subnormal result's last bit with the float's last bit; the addition rounds it.
    aligned = _bits(_f32(magnitude, lanes) + _f32(_const(0x3F000000, lanes), lanes), lanes)
    subnormal = aligned - _const(0x3F000000, lanes)
    small = magnitude < _const(0x38800000, lanes)
    overflow = magnitude >= _const(0x477FF000, lanes)
    is_nan = magnitude > _const(0x7F800000, lanes)
    special = T.Select(is_nan, _const(0x7E00, lanes), _const(0x7C00, lanes))
    result = T.Select(overflow, special, T.Select(small, subnormal, normal)) | sign
    return T.reinterpret(_type("float16", lanes), T.cast(result, _type("uint16", lanes)))


def _type(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _floats(value: float, lanes: int) -> Expr:
    return T.float32(value) if lanes == 1 else T.Broadcast(T.float32(value), lanes)


def _const(value: int, lanes: int) -> Expr:
    return T.uint32(value) if lanes == 1 else T.Broadcast(T.uint32(value), lanes)


def _u32(value: Expr, lanes: int) -> Expr:
    return T.cast(value, _type("uint32", lanes))


def _f32(bits: Expr, lanes: int) -> Expr:
    return T.reinterpret(_type("float32", lanes), bits)


def _bits(value: Expr, lanes: int) -> Expr:
    return T.reinterpret(_type("uint32", lanes), value)

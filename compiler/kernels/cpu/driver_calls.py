"""Calls of the CUDA driver in a kernel for the CPU: by the addresses of its functions, which the host finds.

The functions that make them are LLVM text, as those of ``atomics.py`` are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.emit import keep

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Expr

FUNCTIONS = """
define i64 @moec_copy_in(i64 %function, i64 %target, i64 %source, i64 %size, i64 %stream) {
  call void asm sideeffect "", "~{memory}"()
  %entry = inttoptr i64 %function to ptr
  %from = inttoptr i64 %source to ptr
  %queue = inttoptr i64 %stream to ptr
  %status = call i32 %entry(i64 %target, ptr %from, i64 %size, ptr %queue)
  %result = zext i32 %status to i64
  ret i64 %result
}
define i64 @moec_write_value(i64 %function, i64 %stream, i64 %place, i64 %value) {
  %entry = inttoptr i64 %function to ptr
  %queue = inttoptr i64 %stream to ptr
  %low = trunc i64 %value to i32
  %status = call i32 %entry(ptr %queue, i64 %place, i32 %low, i32 0)
  %result = zext i32 %status to i64
  ret i64 %result
}
"""


def copy_in(function: Expr, target: Expr, source: Expr, size_bytes: Expr, stream: Expr) -> Expr:
    """``cuMemcpyHtoDAsync``: what it answers, 0 where all is well."""
    return keep(T.call_extern("int64", "moec_copy_in", function, target, source, size_bytes, stream))


def write_value(function: Expr, stream: Expr, place: Expr, value: Expr) -> Expr:
    """``cuStreamWriteValue32`` of the low half of ``value``, behind a barrier of memory."""
    return keep(T.call_extern("int64", "moec_write_value", function, stream, place, value))

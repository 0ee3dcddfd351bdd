"""``attention_<name>``: which kernels do it for a shape and a number of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.kernels.cpu.emit import build
from moec.compiler.kernels.cuda.attention.append import append
from moec.compiler.kernels.cuda.attention.operands import declare
from moec.compiler.kernels.cuda.attention.plain import plain

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import AttentionSpec


def attention(spec: AttentionSpec) -> tirx.PrimFunc:
    def body() -> None:
        operands = declare(spec, workspace=workspace(spec) != (0, 0))
        append(spec, operands)
        plain(spec, operands)

    return build(f"attention_{spec.name}", body)


def workspace(spec: AttentionSpec) -> tuple[int, int]:
    return 0, 0

"""``attention_<name>``: which kernels do it for a shape and a number of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.kernels.cpu.emit import build, either, i64
from moec.compiler.kernels.cuda.attention.append import append
from moec.compiler.kernels.cuda.attention.decode import decode
from moec.compiler.kernels.cuda.attention.decode_plan import WIDEST, plan
from moec.compiler.kernels.cuda.attention.operands import FEW_TOKENS, Operands, declare
from moec.compiler.kernels.cuda.attention.plain import plain
from moec.compiler.kernels.cuda.attention.prefill import prefill

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import AttentionSpec


def attention(spec: AttentionSpec) -> tirx.PrimFunc:
    """The function ``attention_<name>``: append the step's keys and values to the cache, then attend.

    Its arguments: ``q [1, T, Hq, Dk]``, ``k [1, T, Hkv, Dk]``, ``v [1, T, Hkv, Dv]`` (not where latent), all float32;
    ``k_cache [pages, Hkv, P, Dk]`` and ``v_cache [pages, Hkv, P, Dv]`` (not where latent) of the spec's dtype;
    ``page_table [B, M]``, ``token_sequence [T]``, ``token_position [T]``, int32; ``sinks [Hq]`` float32 (where the spec
    has them); ``workspace``, uint8 (where `workspace` is not 0); ``out [1, T, Hq, Dv]`` float32. P is ``PAGE_TOKENS``.
    A sequence's tokens are consecutive in a step, in order of position.
    """

    def body() -> None:
        operands = declare(spec, workspace=workspace(spec) != (0, 0))
        if not _on_tensor_cores(spec):
            _plainly(spec, operands)
            return
        either(
            operands.tokens <= i64(FEW_TOKENS),
            lambda: decode(plan(spec), operands),
            lambda: _prefill(spec, operands),
        )

    return build(f"attention_{spec.name}", body)


def workspace(spec: AttentionSpec) -> tuple[int, int]:
    """Bytes of ``workspace``: once, and for each token of a step; where both are 0 there is no such argument.

    Before the first call the workspace is zero, and nobody else writes to it: it holds counters of blocks.
    """
    return (plan(spec).workspace_bytes, 0) if _on_tensor_cores(spec) else (0, 0)


def _on_tensor_cores(spec: AttentionSpec) -> bool:
    dims = (spec.key_dim, spec.value_dim)
    return spec.dtype != "float32" and all(size % 8 == 0 and size <= WIDEST for size in dims)


def _prefill(spec: AttentionSpec, operands: Operands) -> None:
    append(spec, operands)
    prefill(spec, operands)


def _plainly(spec: AttentionSpec, operands: Operands) -> None:
    append(spec, operands)
    plain(spec, operands)

"""``attention_<name>``: which kernels do it for a shape and a number of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.program import HOPPER
from moec.compiler.kernels.cuda.attention.append import append
from moec.compiler.kernels.cuda.attention.decode.kernel import decode
from moec.compiler.kernels.cuda.attention.decode.plan import WIDEST, plan
from moec.compiler.kernels.cuda.attention.expanded.expand_hopper import fits_expand
from moec.compiler.kernels.cuda.attention.expanded.heads_hopper import fits_heads
from moec.compiler.kernels.cuda.attention.expanded.kernel import attend_heads, on_tensor_cores, room_of
from moec.compiler.kernels.cuda.attention.latents.block import WIDEST_KEY, WIDEST_VALUE
from moec.compiler.kernels.cuda.attention.latents.combine import latent_combine
from moec.compiler.kernels.cuda.attention.latents.decode import latent_decode
from moec.compiler.kernels.cuda.attention.latents.parts import LatentPlan
from moec.compiler.kernels.cuda.attention.latents.prefill import latent_prefill
from moec.compiler.kernels.cuda.attention.latents.selected import (
    decode_selected,
    prefill_selected,
    selected_workspace,
)
from moec.compiler.kernels.cuda.attention.operands import Operands, declare
from moec.compiler.kernels.cuda.attention.plain import plain
from moec.compiler.kernels.cuda.attention.prefill.hopper import prefill_hopper
from moec.compiler.kernels.cuda.attention.prefill.kernel import prefill
from moec.compiler.kernels.cuda.attention.prefill.warpgroups import fits
from moec.compiler.kernels.cuda.attention.ways import Way
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS
from moec.compiler.kernels.emit import build, either, i64

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import AttentionSpec


def attention(spec: AttentionSpec, *, hopper: bool = False) -> tirx.PrimFunc:
    """The function ``attention_<name>``: append the step's keys and values to the cache, then attend.

    With ``hopper`` the one for Hopper GPUs, if that is another (see `has_hopper`).

    Its arguments: ``q [1, T, Hq, Dq]``, ``k [1, T, Hkv, Dk]``, ``v [1, T, Hkv, Dv]`` (not where latent), all float32;
    ``k_cache [pages, Hkv, P, Dk]`` and ``v_cache [pages, Hkv, P, Dv]`` (not where latent) of the spec's dtype;
    ``page_table [B, M]``, ``token_sequence [T]``, ``token_position [T]``, int32; ``token_last [T]`` int32 (where
    neither causal nor cross); ``selection [T, S]`` int32 (where selected); ``sinks [Hq]`` float32 (where the spec has
    them); ``bias [Hq, 2 * bias_reach + 1]`` float32 (where it has one); where it has heads, their matrices (see
    `moec.artifacts.steps.LatentWeights`); ``workspace``, uint8 (where `workspace` is not 0); ``out [1, T, Hq, Dr]``
    float32. Dq and Dr are the spec's
    query_dim and result_dim, P is ``PAGE_TOKENS``. What is left out where cross, and what tokens are told there, is as
    in `moec.compiler.kernels.cpu.attention.attention`. A sequence's tokens are consecutive in a step, by position.
    No kernel of a step writes the page table, sequences or positions: they are read before the previous kernel is done.
    """

    def body() -> None:
        operands = declare(spec, workspace=workspace(spec) != (0, 0))
        way = _way(spec, hopper=hopper)
        if spec.heads is not None:
            attend_heads(room_of(spec, way), way, operands, hopper=hopper)
        else:
            _attend(spec, way, operands)

    return build(f"attention_{spec.name}{HOPPER if hopper else ''}", body)


def has_hopper(spec: AttentionSpec) -> bool:
    """Whether Hopper GPUs have kernels of their own for an attention."""
    way = _way(spec)
    if spec.selected:
        return False
    if spec.heads is not None:
        room = room_of(spec, way)
        return on_tensor_cores(room) and fits_heads(room) and fits_expand(room)
    return way.many is prefill and fits(spec) and not spec.bias_reach


def _attend(spec: AttentionSpec, way: Way, operands: Operands) -> None:
    def many() -> None:
        if not spec.cross:
            append(spec, operands)
        way.many(spec, operands)

    if way.few is None or not (spec.causal or spec.cross):
        many()
    else:
        few = way.few
        either(operands.tokens <= i64(FEW_TOKENS), lambda: few(spec, operands), many)


def workspace(spec: AttentionSpec) -> tuple[int, int]:
    """Bytes of ``workspace``: once, and for each token of a step; where both are 0 there is no such argument."""
    way = _way(spec)
    if spec.heads is None:
        return way.workspace_bytes, 0
    room = room_of(spec, way)
    return room.fixed_bytes, room.token_bytes


def _way(spec: AttentionSpec, *, hopper: bool = False) -> Way:
    """The kernels for keys and values, or latents, as they are cached."""
    key, size = spec.key_dim, spec.value_dim
    if spec.dtype == "float32" or key % 8 or size % 8:
        return Way(None, plain, 0)
    if spec.selected:
        return _selected_way(spec)
    if max(key, size) <= WIDEST:
        division = plan(spec)
        many = prefill_hopper if hopper and fits(spec) and not spec.bias_reach else prefill
        return Way(
            lambda _, operands: decode(division, operands), many, division.workspace_bytes, rounds=True
        )
    if spec.latent and key <= WIDEST_KEY and size <= WIDEST_VALUE:
        return Way(_decode_latents, latent_prefill, LatentPlan(spec).workspace_bytes, rounds=True)
    return Way(None, plain, 0)


def _selected_way(spec: AttentionSpec) -> Way:
    """The kernels that see selected positions alone."""
    fits = spec.latent and spec.kv_heads == 1 and not (spec.window or spec.chunk)
    if fits and spec.key_dim <= WIDEST_KEY and spec.value_dim <= WIDEST_VALUE:
        return Way(decode_selected, prefill_selected, selected_workspace(spec), rounds=True)
    return Way(None, plain, 0)


def _decode_latents(spec: AttentionSpec, operands: Operands) -> None:
    latent_decode(spec, operands)
    latent_combine(spec, operands)

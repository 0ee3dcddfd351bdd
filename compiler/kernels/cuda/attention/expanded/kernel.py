"""Attention of heads that a cached latent stands for: through the latent itself, or through expanded keys and values.

At most eight tokens: queries are absorbed, latents attended to, results projected. More tokens: a plan, made on the
device, says which of them see expanded keys (see `plan`), which are made and attended to in rounds of as many as
the workspace holds; all others go through latents. Nothing is expanded where less than a run's least tokens are there,
or where tokens see selected positions alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.attention.append import append
from moec.compiler.kernels.cuda.attention.expanded.absorb import (
    absorb_few,
    absorb_many,
    absorb_plain,
    latent_operands,
    project_few,
    project_many,
    project_plain,
)
from moec.compiler.kernels.cuda.attention.expanded.expand import emit_expand, emit_gather
from moec.compiler.kernels.cuda.attention.expanded.expand_hopper import emit_expand_hopper
from moec.compiler.kernels.cuda.attention.expanded.heads import emit_heads
from moec.compiler.kernels.cuda.attention.expanded.heads_hopper import emit_heads_hopper
from moec.compiler.kernels.cuda.attention.expanded.plan import (
    LEAST_TOKENS,
    MOST_TOKENS,
    emit_plan,
    rounds_of,
)
from moec.compiler.kernels.cuda.attention.expanded.room import Absorbed, Room, carve, carve_absorbed
from moec.compiler.kernels.cuda.attention.operands import Done, Rounded
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import either, i64

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cuda.attention.operands import Operands
    from moec.compiler.kernels.cuda.attention.ways import Way

MOST_ROUNDS = 4
"""Of expanded keys: launches of rounds that are not needed take time. Contexts beyond go through latents."""
WIDEST_HEAD = 256


def room_of(spec: AttentionSpec, way: Way) -> Room:
    """The workspace of an attention that has heads."""
    assert spec.heads is not None
    return Room(spec, spec.heads, way.workspace_bytes, way.rounds)


def attend_heads(room: Room, way: Way, operands: Operands, *, hopper: bool) -> None:
    """Emit all launches."""

    def few() -> None:
        _few(room, way, operands)

    def some() -> None:
        append(room.spec, operands)
        if on_tensor_cores(room):
            _through_latents(room, way, operands, _absorbed(room, operands))
        else:
            _plain(room, way, operands)

    def many() -> None:
        can_expand = T.And(operands.tokens >= i64(LEAST_TOKENS), operands.tokens <= i64(MOST_TOKENS))
        if on_tensor_cores(room) and not room.spec.selected:
            either(can_expand, lambda: _expanded(room, way, operands, hopper=hopper), some)
        else:
            some()

    assert room.spec.kv_heads == 1, "a latent stands for all heads"
    either(operands.tokens <= i64(FEW_TOKENS), few, many)


def on_tensor_cores(room: Room) -> bool:
    """Whether tensor cores take the heads' matrices, and the heads."""
    heads, spec = room.heads, room.spec
    sizes = (heads.nope_dim, heads.value_dim, room.rope_dim, spec.value_dim)
    return (
        "float32" not in (spec.dtype, heads.dtype)
        and not any(size % 8 for size in sizes)
        and max(spec.query_dim, spec.result_dim) <= WIDEST_HEAD
    )


def _absorbed(room: Room, operands: Operands) -> Absorbed:
    assert operands.workspace is not None
    return carve_absorbed(room, operands.workspace, operands.tokens)


def _few(room: Room, way: Way, operands: Operands) -> None:
    if way.few is None:
        append(room.spec, operands)
        _plain(room, way, operands)
        return
    absorbed = _absorbed(room, operands)
    absorb_few(room, operands, absorbed)
    way.few(room.spec, latent_operands(operands, absorbed))
    project_few(room, operands, absorbed)


def _plain(room: Room, way: Way, operands: Operands) -> None:
    absorbed = _absorbed(room, operands)
    absorb_plain(room, operands, absorbed)
    way.many(room.spec, latent_operands(operands, absorbed))
    project_plain(room, operands, absorbed)


def _through_latents(room: Room, way: Way, operands: Operands, absorbed: Absorbed) -> None:
    absorb_many(room, operands, absorbed)
    latents = latent_operands(operands, absorbed)
    if room.rounds:
        latents = replace(latents, rounded=Rounded(absorbed.rounded_results, room.heads.dtype))
    way.many(room.spec, latents)
    project_many(room, operands, absorbed)


def _expanded(room: Room, way: Way, operands: Operands, *, hopper: bool) -> None:
    """Chosen runs in rounds, then what is not chosen."""
    assert operands.workspace is not None
    expanded, absorbed = carve(room, operands.workspace, operands.tokens)
    rounds = rounds_of(operands, expanded, MOST_ROUNDS)
    append(room.spec, operands, lambda thread: emit_plan(room.spec, operands, expanded, rounds, thread))
    with T.serial(i32(0), i32(rounds)) as number:
        emit_gather(operands, expanded, number, panels=hopper)
        (emit_expand_hopper if hopper else emit_expand)(operands, expanded, number)
        (emit_heads_hopper if hopper else emit_heads)(operands, expanded, number)
    _through_latents(room, way, replace(operands, done=Done(expanded.chosen, expanded.head)), absorbed)

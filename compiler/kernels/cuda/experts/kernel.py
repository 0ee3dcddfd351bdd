"""The chosen experts of each token, read through a table of addresses: slots of the GPU, or mapped host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.program import HOPPER
from moec.artifacts.words.slots import CACHED
from moec.compiler.kernels.cuda.experts.call import ExpertCall
from moec.compiler.kernels.cuda.experts.down_few import emit_down_few
from moec.compiler.kernels.cuda.experts.few import emit_gate_up_few, middle_elements, runs_few
from moec.compiler.kernels.cuda.experts.layout import workspace_bytes as many_bytes
from moec.compiler.kernels.cuda.experts.many import (
    HOPPER_PACKED_TILES,
    HOPPER_TILES,
    TILES,
    Tiles,
    emit_experts_many,
)
from moec.compiler.kernels.cuda.experts.plain import emit_experts_plain, plain_bytes
from moec.compiler.kernels.cuda.experts.step import MOST_CHOSEN
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS
from moec.compiler.kernels.cuda.many.tiles import CHUNK
from moec.compiler.kernels.emit import Argument, arguments, build, either, i64, symbol

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import ExpertBody


def workspace_bytes(body: ExpertBody, top_k: int, experts: int) -> tuple[int, int]:
    """Bytes of workspace that ``experts_<body>`` wants: always, and for each token of a step.

    Args:
        body: one expert.
        top_k: the most experts that a token chooses.
        experts: the most that a layer has.
    """
    always, exact = plain_bytes(body, top_k)
    if runs_few(body):
        exact = max(exact, 2 * top_k * middle_elements(body))
    if not fits_many(body):
        return always, exact
    fixed, each = many_bytes(body, top_k, experts)
    return max(always, fixed), max(each, exact)


def fits_many(body: ExpertBody) -> bool:
    """Whether many tokens go through tensor cores."""
    return body.dtype != "float32" or body.format is not None


def fits_hopper(body: ExpertBody) -> bool:
    """Whether Hopper GPUs have kernels of their own for such experts."""
    aligned = body.hidden % CHUNK == 0 and body.intermediate % CHUNK == 0
    return fits_many(body) and (aligned or body.format is not None)


def _tiles(body: ExpertBody, *, hopper: bool) -> Tiles:
    if not hopper:
        return TILES
    return HOPPER_PACKED_TILES if body.format else HOPPER_TILES


def experts(body: ExpertBody, top_k: int, *, hopper: bool = False) -> tirx.PrimFunc:
    """The kernel ``experts_<body>(x, index, weight, table, workspace, out)``; with ``hopper`` that for Hopper GPUs.

    Arguments as in ``kernels/cpu/experts.py``, and a workspace (uint8) of at least ``workspace_bytes``. At most eight
    tokens stream each chosen expert's weights once; more tokens are grouped by expert and go through tensor cores.
    """

    def emit() -> None:
        tokens, chosen, count, size = symbol("T"), symbol("K"), symbol("E"), symbol("W")
        x, index, weight, table, workspace, out = arguments(
            Argument("x", (tokens, body.hidden), "float32"),
            Argument("index", (tokens, chosen), "int64"),
            Argument("weight", (tokens, chosen), "float32"),
            Argument("table", (count,), "int64"),
            Argument("workspace", (size,), "uint8"),
            Argument("out", (tokens, body.hidden), "float32"),
        )
        call = ExpertCall(x, index, weight, table, workspace, out, tokens, chosen, count)
        few = tokens <= i64(FEW_TOKENS)
        tiles = _tiles(body, hopper=hopper)
        if fits_many(body):
            either(few, lambda: _exact(body, call), lambda: emit_experts_many(body, call, top_k, tiles))
        else:
            emit_experts_plain(body, call)

    return build(f"experts_{body.name}{HOPPER if hopper else ''}", emit)


def experts_cached(body: ExpertBody) -> tirx.PrimFunc:
    """The kernel ``experts_cached_<body>(x, index, weight, table, state, workspace, out)`` for at most eight tokens.

    It is the first branch of ``experts``, bit for bit, for experts of which some may still be on their way: it runs
    after ``fetch_experts`` and beside it. Only for bodies that ``runs_few``, and at most ``MOST_CHOSEN`` choices.
    """

    def emit() -> None:
        tokens, chosen, count, size = symbol("T"), symbol("K"), symbol("E"), symbol("W")
        words = symbol("S")
        x, index, weight, table, state, workspace, out = arguments(
            Argument("x", (tokens, body.hidden), "float32"),
            Argument("index", (tokens, chosen), "int64"),
            Argument("weight", (tokens, chosen), "float32"),
            Argument("table", (count,), "int64"),
            Argument("state", (words,), "int64"),
            Argument("workspace", (size,), "uint8"),
            Argument("out", (tokens, body.hidden), "float32"),
        )
        call = ExpertCall(x, index, weight, table, workspace, out, tokens, chosen, count)
        middle = T.decl_buffer(workspace.shape, "uint16", data=workspace.data, align=64)
        emit_gate_up_few(body, call, middle, state=state)
        emit_down_few(body, call, middle, state=state)

    return build(f"{CACHED}{body.name}", emit)


def _exact(body: ExpertBody, call: ExpertCall) -> None:
    """Few tokens, in float32: streamed, or where the shape forbids that one thread a result."""
    if not runs_few(body):
        emit_experts_plain(body, call)
        return
    streams = call.chosen <= i64(MOST_CHOSEN)
    either(streams, lambda: _few(body, call), lambda: emit_experts_plain(body, call))


def _few(body: ExpertBody, call: ExpertCall) -> None:
    middle = T.decl_buffer(call.workspace.shape, "uint16", data=call.workspace.data, align=64)
    emit_gate_up_few(body, call, middle)
    emit_down_few(body, call, middle)

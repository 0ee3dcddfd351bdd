"""The functions ``selection_<name>``: an indexer's scores of positions, and the bits of the best ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS, SELECTION_PREFIX
from moec.compiler.kernels.cuda.attention.append import append
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS
from moec.compiler.kernels.cuda.primitives import LANES, i32, launch, launch_next, wait_previous
from moec.compiler.kernels.cuda.selection.best import select, select_all
from moec.compiler.kernels.cuda.selection.ranks import Ranks
from moec.compiler.kernels.cuda.selection.scores_plain import PlainScores
from moec.compiler.kernels.cuda.selection.scores_tiles import TileScores, fits
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import build, either, i64, load, when
from moec.compiler.kernels.selection_arguments import IndexKeys, declare

if TYPE_CHECKING:
    from moec.artifacts.model import SelectionSpec
    from moec.compiler.kernels.emit import Expr
    from moec.compiler.kernels.selection_arguments import SelectionOperands

MOST_ROWS = 264
"""Tokens whose ranks are in the workspace at once: two blocks for each of an H100's multiprocessors."""
FEW_THREADS, MANY_THREADS = 1024, 256
SCORE_THREADS = 128


def selection(spec: SelectionSpec) -> tirx.PrimFunc:
    """The function ``selection_<name>``: append the step's index keys to the cache, then select for each token.

    For its arguments see `moec.compiler.kernels.selection_arguments.declare`. At most eight tokens: blocks share a
    token's context, and another kernel selects. More tokens: a block scores and selects for one token after the other.
    """

    def body() -> None:
        operands = declare(spec, workspace=True)
        append(IndexKeys(spec.dim, spec.dtype), operands.appended)
        either(
            operands.tokens <= i64(FEW_TOKENS),
            lambda: _few(spec, operands),
            lambda: _many(spec, operands),
        )

    return build(f"{SELECTION_PREFIX}{spec.name}", body)


def workspace_bytes(words: int) -> int:
    """Of the workspace of a selection whose result has so many words a token."""
    return 4 * MOST_ROWS * words * PAGE_TOKENS


def _scores(
    spec: SelectionSpec, operands: SelectionOperands, thread: Expr, threads: int
) -> TileScores | PlainScores:
    if fits(spec):
        return TileScores(spec, operands, thread, threads)
    return PlainScores(spec, operands, thread)


def _seen(operands: SelectionOperands, token: Expr) -> Expr:
    """How many positions a token may see, int32."""
    return settle(load(operands.appended.position, token) + i32(1))


def _few(spec: SelectionSpec, operands: SelectionOperands) -> None:
    parts = T.bind(tirx.truncdiv(i64(MOST_ROWS), operands.tokens))
    with launch((parts, operands.tokens), SCORE_THREADS) as ((part, token), thread):
        launch_next()
        wait_previous()
        count = _seen(operands, token)
        with when(count > i32(spec.top_k)):
            scores = _scores(spec, operands, thread, SCORE_THREADS)
            scores.begin(token)
            warps = SCORE_THREADS // LANES
            first = settle(part * i32(warps) + tirx.truncdiv(thread, i32(LANES)))
            ranks = Ranks.of(operands, token)
            scores.rank(ranks, token, count, first, settle(i32(parts) * i32(warps)))
    with launch((operands.tokens,), FEW_THREADS) as ((token,), thread):
        launch_next()
        wait_previous()
        _select(spec, operands, Ranks.of(operands, token), token, thread, FEW_THREADS)


def _many(spec: SelectionSpec, operands: SelectionOperands) -> None:
    blocks = T.bind(T.min(operands.tokens, i64(MOST_ROWS)))
    with launch((blocks,), MANY_THREADS) as ((block,), thread):
        launch_next()
        wait_previous()
        scores = _scores(spec, operands, thread, MANY_THREADS)
        turns = tirx.truncdiv(operands.tokens - i64(block) + blocks - i64(1), blocks)
        with T.serial(i32(0), i32(turns)) as turn:
            token = settle(turn * i32(blocks) + block)
            count = _seen(operands, token)
            ranks = Ranks.of(operands, block)
            with when(count > i32(spec.top_k)):
                scores.begin(token)
                warp = settle(tirx.truncdiv(thread, i32(LANES)))
                scores.rank(ranks, token, count, warp, i32(MANY_THREADS // LANES))
            _select(spec, operands, ranks, token, thread, MANY_THREADS)


def _select(
    spec: SelectionSpec, operands: SelectionOperands, ranks: Ranks, token: Expr, thread: Expr, threads: int
) -> None:
    count = _seen(operands, token)
    either(
        count <= i32(spec.top_k),
        lambda: select_all(operands, token, count, thread, threads),
        lambda: select(spec, operands, ranks, token, count, thread, threads),
    )

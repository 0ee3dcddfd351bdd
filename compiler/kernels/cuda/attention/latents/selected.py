"""Attention over latents to selected positions alone: a block gathers the keys of one token's selection.

Where a token's selected keys lie in the cache is listed in shared memory, some of them at a time, in the order of their
positions; tiles are of keys that are neighbours in that list. So what is read does not grow with the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.compiler.kernels.cuda import block as blocks
from moec.compiler.kernels.cuda.attention.append import append
from moec.compiler.kernels.cuda.attention.latents.attend import attend
from moec.compiler.kernels.cuda.attention.latents.block import WIDTH, Block, Shape, begin
from moec.compiler.kernels.cuda.attention.latents.combine import latent_combine
from moec.compiler.kernels.cuda.attention.latents.decode import load_queries, write
from moec.compiler.kernels.cuda.attention.latents.parts import LatentPlan, Part
from moec.compiler.kernels.cuda.attention.latents.prefill import ROW_TILES
from moec.compiler.kernels.cuda.attention.latents.prefill import load_queries as load_rows
from moec.compiler.kernels.cuda.attention.latents.prefill import write as write_rows
from moec.compiler.kernels.cuda.attention.operands import Operands, settled
from moec.compiler.kernels.cuda.attention.rows import Place, Rows
from moec.compiler.kernels.cuda.attention.tiles import PIECE
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS
from moec.compiler.kernels.cuda.primitives import (
    LANES,
    call,
    element,
    i32,
    launch,
    launch_next,
    registers,
    shared,
    sync,
    value,
    wait_previous,
)
from moec.compiler.kernels.emit import Buffer, Expr, i64, load, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec

LISTED = 1024
"""Keys that are listed at a time, a multiple of a tile's."""


def selected_workspace(spec: AttentionSpec) -> int:
    """Bytes: partial results of few tokens, and how many blocks each of them had."""
    return LatentPlan(spec).workspace_bytes + 4 * FEW_TOKENS


def decode_selected(spec: AttentionSpec, operands: Operands) -> None:
    """Launch the kernels for few tokens: append, attend in blocks that share a selection, put results together."""
    append(spec, operands)
    plan = LatentPlan(spec)
    counts = _counts(plan, operands)
    parts = plan.parts(operands.tokens)
    grid = (T.cast(parts, "int64"), plan.head_tiles, operands.tokens)
    with launch(grid, plan.shape.threads) as ((number, unit, token), thread):
        parts = settled(parts)
        launch_next()
        wait_previous()
        selection = Selection.of(operands, token, thread, plan.shape.threads)
        tiles = settled((selection.count + i32(WIDTH - 1)) // i32(WIDTH))
        active = settled(T.max(T.min(tiles, parts), i32(1)))
        with when(number < active):
            with when(T.And(thread == i32(0), T.And(number == i32(0), unit == i32(0)))):
                store(counts, token, active)
            head = settled(unit * i32(plan.heads))
            heads = settled(T.min(i32(spec.query_heads) - head, i32(plan.heads)))
            part = Part(number, active, settled(token * parts + number), head, heads)
            block = begin(plan.shape, thread)
            load_queries(block, operands, token, part)
            first, end = (
                settled(tirx.truncdiv(each * tiles, active) * i32(WIDTH))
                for each in (number, number + i32(1))
            )
            _attend(block, operands, selection, first, settled(T.min(end, selection.count)))
            write(plan, block, operands, token, part)
    latent_combine(spec, operands, lambda token: settled(load(counts, token)))


def prefill_selected(spec: AttentionSpec, operands: Operands) -> None:
    """Launch the kernel for any number of tokens; the step has been appended."""
    shape = Shape(spec, ROW_TILES, exact=False)
    rows = Rows(spec, shape.rows)
    with launch((rows.head_tiles, operands.tokens), shape.threads) as ((unit, token), thread):
        wait_previous()
        place = Place(rows, token, T.bind(token + i32(1)), i32(0), T.bind(unit * i32(rows.heads)))
        selection = Selection.of(operands, token, thread, shape.threads)
        block = begin(shape, thread)
        load_rows(block, place, operands)
        _attend(block, operands, selection, i32(0), selection.count)
        launch_next()
        write_rows(block, place, operands)


def _counts(plan: LatentPlan, operands: Operands) -> Buffer:
    """int32 ``[FEW_TOKENS]``: how many blocks share each token's selection."""
    assert operands.workspace is not None
    start = T.address_of(tirx.BufferLoad(operands.workspace, [i64(plan.workspace_bytes)]))
    return T.decl_buffer((i64(FEW_TOKENS),), "int32", data=T.bind(start))


@dataclass(frozen=True)
class Selection:
    """One token's; every thread of a block has some words of it, one after the other (int32, but for the bits)."""

    operands: Operands
    token: Expr
    thread: Expr
    threads: int
    first: Expr
    """The thread's first word."""
    end: Expr
    before: Expr
    """Selected positions in the words of the threads before this one."""
    count: Expr
    """All selected positions."""
    rows: Buffer
    """Rows of the cache that hold the keys listed, shared."""

    @classmethod
    def of(cls, operands: Operands, token: Expr, thread: Expr, threads: int) -> Selection:
        """Count the positions; all threads of the block take part."""
        words = settled(load(operands.position, token) // i32(PAGE_TOKENS) + i32(1))
        each = settled((words + i32(threads - 1)) // i32(threads))
        first, end = settled(T.min(thread * each, words)), settled(T.min((thread + i32(1)) * each, words))
        own = registers(1, "int32")
        store(own, 0, i32(0))
        with T.serial(i32(0), end - first) as turn:
            bits = _bits(operands, token, first + turn)
            store(own, 0, load(own, 0) + value("int32", "count_bits", bits))
        before, total = blocks.Block(thread, threads).scan(T.cast(load(own, 0), "uint64"))
        return cls(
            operands,
            token,
            thread,
            threads,
            first,
            end,
            settled(T.cast(before, "int32")),
            settled(T.cast(total, "int32")),
            shared(LISTED, "int32"),
        )

    def list(self, start: Expr, end: Expr) -> None:
        """List the keys of selected positions number ``start .. end - 1``, at most `LISTED`; all threads take part."""
        operands = self.operands
        table = T.bind(T.cast(load(operands.sequence, self.token), "int64") * operands.width)
        place, left = registers(1, "int32"), registers(1, "uint32")
        store(place, 0, self.before)
        sync()
        with T.serial(i32(0), self.end - self.first) as turn:
            word = settled(self.first + turn)
            bits = _bits(operands, self.token, word)
            behind = settled(load(place, 0) + value("int32", "count_bits", bits))
            with when(T.And(load(place, 0) < end, behind > start)):
                page = settled(load(operands.table, table + T.cast(word, "int64")) * i32(PAGE_TOKENS))
                store(left, 0, bits)
                with T.While(load(left, 0) != T.uint32(0)):
                    lowest = load(left, 0) & (T.uint32(0) - load(left, 0))
                    slot = value("int32", "count_bits", lowest - T.uint32(1))
                    with when(T.And(load(place, 0) >= start, load(place, 0) < end)):
                        store(self.rows, load(place, 0) - start, page + slot)
                    store(place, 0, load(place, 0) + i32(1))
                    store(left, 0, load(left, 0) & (load(left, 0) - T.uint32(1)))
            store(place, 0, behind)
        sync()


def _bits(operands: Operands, token: Expr, word: Expr) -> Expr:
    assert operands.selected is not None
    place = T.cast(token, "int64") * operands.words + T.cast(word, "int64")
    return T.bind(T.reinterpret("uint32", load(operands.selected, place)))


def _attend(block: Block, operands: Operands, selection: Selection, first: Expr, end: Expr) -> None:
    """Attend to the selected positions number ``first .. end - 1``, listed in pieces."""
    begun = registers(1, "int32")
    store(begun, 0, first)
    with T.While(load(begun, 0) < end):
        start = settled(load(begun, 0))
        count = settled(T.min(end - start, i32(LISTED)))
        selection.list(start, settled(start + count))
        tiles = settled((count + i32(WIDTH - 1)) // i32(WIDTH))
        _gather(block, operands, selection, i32(0), i32(0), count)
        call("copy_commit")
        with T.serial(i32(0), tiles) as tile:
            call("copy_wait", i32(0))
            sync()
            following = settled(tile + i32(1))
            with when(following < tiles):
                _gather(block, operands, selection, T.bind(following % i32(2)), following, count)
            call("copy_commit")
            keys = block.keys(T.bind(tile % i32(2)))
            attend(block, keys, settled(tile * i32(WIDTH)), i32(0), settled(count - i32(1)))
        store(begun, 0, start + count)
    sync()


def _gather(
    block: Block, operands: Operands, selection: Selection, target: Expr, tile: Expr, count: Expr
) -> None:
    """Start to copy a tile of listed keys into one of the two tiles of keys; rows that do not exist are zero."""
    spec, keys = block.shape.spec, block.keys(target)
    turns, steps = -(-WIDTH // block.shape.warps), -(-keys.pieces // LANES)
    for turn in range(turns):
        row = settled(block.warp + i32(turn * block.shape.warps))
        number = settled(tile * i32(WIDTH) + row)
        held = settled(load(selection.rows, T.min(number, count - i32(1))))
        source = T.bind(T.cast(held, "int64") * i64(spec.key_dim))
        for step in range(steps):
            piece = settled(block.lane + i32(LANES * step))
            inside = T.min(piece, i32(spec.key_dim // PIECE - 1))
            valid = T.And(number < count, piece < i32(spec.key_dim // PIECE))
            with when(T.And(row < i32(WIDTH), piece < i32(keys.pieces))):
                call(
                    "copy_async_16_if",
                    element(keys.memory, T.bind(keys.at(row, piece))),
                    element(operands.k_cache, T.bind(source + T.cast(inside * i32(PIECE), "int64"))),
                    T.bind(valid),
                )

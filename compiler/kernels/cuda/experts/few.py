"""The chosen experts of at most eight tokens: each expert's weights are read once, however many tokens chose it.

Two launches. The first has a block for each tile of rows and each of the T * K choices; it goes on where no earlier
choice is of the same expert, and then for all tokens that chose it. It writes the values between the two products
already split in two numbers of 16 bits: ``[T * K, 2, I]``, or for quantized weights in the order of
``packed/order.py``. The second launch is in ``down_few.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.layout.experts import layout
from moec.compiler.kernels.cuda.activation import evaluate
from moec.compiler.kernels.cuda.dense.few_block import FewMemory, FewProduct, memory_for
from moec.compiler.kernels.cuda.experts.choice import Choice, find_tokens
from moec.compiler.kernels.cuda.experts.rings import EXPERTS_AT_ONCE, FIRST, first_tiling
from moec.compiler.kernels.cuda.experts.share import TileShare
from moec.compiler.kernels.cuda.few.lanes import Lane
from moec.compiler.kernels.cuda.few.multiply import multiply
from moec.compiler.kernels.cuda.few.ring import through_ring
from moec.compiler.kernels.cuda.few.stream import Stream
from moec.compiler.kernels.cuda.few.sums import FewSums
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS, TILE_ROWS, Tiling
from moec.compiler.kernels.cuda.few.tokens import (
    AT_ONCE_OF_EXPERTS,
    Block,
    SharedTokens,
    read_floats,
    split_activation,
)
from moec.compiler.kernels.cuda.packed.codes import TYPE
from moec.compiler.kernels.cuda.packed.operands import PackedStream
from moec.compiler.kernels.cuda.packed.order import OperandOrder
from moec.compiler.kernels.cuda.packed.rows import PackedRow
from moec.compiler.kernels.cuda.packed.stream import multiply_packed
from moec.compiler.kernels.cuda.packed.tiling import packed_tiling
from moec.compiler.kernels.cuda.packed.tokens import PackedTokens
from moec.compiler.kernels.cuda.primitives import (
    LINE_WORDS,
    blocks_at_once,
    call,
    element,
    i32,
    launch,
    launch_next,
    sync,
    wait_previous,
)
from moec.compiler.kernels.cuda.slots.arrivals import Arrivals
from moec.compiler.kernels.cuda.threads import read
from moec.compiler.kernels.emit import at_address, either, i64, load, store, when
from moec.compiler.kernels.linear_shape import VECTOR
from moec.formats import FORMATS, format_of

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cuda.experts.call import ExpertCall
    from moec.compiler.kernels.cuda.few.tokens import Reader
    from moec.compiler.kernels.emit import Buffer, Expr

FIRST_AHEAD = 2
"""Rounds of quantized weights that a block of the first launch has in flight."""


def runs_few(body: ExpertBody) -> bool:
    """Whether experts of this shape and type can go through tensor cores a few tokens at a time."""
    narrow = body.dtype != "float32" or body.format is not None
    return narrow and body.hidden % VECTOR == 0 and body.intermediate % VECTOR == 0


def part_at(body: ExpertBody, name: str, address: Expr) -> Buffer:
    """A matrix or bias of the expert at ``address`` as a flat buffer, of bytes where it is quantized."""
    part = layout(body).part(name)
    dtype = "uint8" if body.format and len(part.shape) > 1 else body.dtype
    return at_address(address + i64(part.offset_bytes), math.prod(part.shape), dtype)


def packed_row(body: ExpertBody, columns: int) -> PackedRow | None:
    """The rows of a matrix with so many columns, where experts are quantized."""
    kind = format_of(body.format)
    return None if kind is None else PackedRow(kind, columns)


def middle_elements(body: ExpertBody) -> int:
    """16-bit numbers between the two products, for each choice."""
    if body.format is None:
        return 2 * body.intermediate
    return OperandOrder.of(FORMATS[body.format]).elements(body.intermediate)


def names_of_first(body: ExpertBody) -> tuple[str, ...]:
    """The matrices that an expert's input meets."""
    return ("gate", "up") if body.gated else ("up",)


def gate_up_tiling(body: ExpertBody) -> Tiling:
    """How the first launch is cut."""
    streams, row = len(names_of_first(body)), packed_row(body, body.hidden)
    rows = streams * body.intermediate
    if row is not None:
        return packed_tiling(row, rows, batch=EXPERTS_AT_ONCE, streams=streams, ahead=FIRST_AHEAD)
    return first_tiling(body)


def emit_gate_up_few(
    body: ExpertBody,
    call_: ExpertCall,
    middle: Buffer,
    tiling: Tiling | None = None,
    state: Buffer | None = None,
    beside: FewProduct | None = None,
) -> None:
    """Emit the first launch.

    Args:
        body: the experts.
        call_: what the kernel was called with; 1 to 8 tokens.
        middle: uint16 ``[T * K, middle_elements]``; only the first of a token's choices of the same expert is written.
        tiling: instead of the one that ``choose_tiling`` finds.
        state: of the layer, int64, where experts may still be on their way. Then the kernel before is
            ``fetch_experts``, which lets this one begin when all before it is over.
        beside: a product that other blocks of the same launch compute; its blocks have as many threads. With ``state``
            what it reads must have been there before ``fetch_experts``.
    """
    tiling = tiling or gate_up_tiling(body)
    beside, blocks = _in_rings(tiling, beside)
    share = TileShare.of(body, call_, tiling)
    others = i64(0) if beside is None else T.truncdiv(i64(beside.blocks - 1) + share.blocks, share.blocks)
    with launch((share.blocks, others + call_.tokens * call_.chosen), tiling.threads) as (
        (block, line),
        thread,
    ):
        blocks_at_once(blocks)
        work = _FirstLaunch(body, call_, middle, tiling, share, None if state is None else Arrivals.of(state))
        room = tiling, body.hidden, share.most == 1
        if beside is None:
            work.emit(block, line, thread, memory_for(room) if tiling.ring else None)
            return
        memory = memory_for(room, beside.room)
        before = i32(others)

        def other() -> None:
            number = T.bind(line * i32(share.blocks) + block)
            with when(number < i32(beside.blocks)):
                beside.emit(number, i32(0), thread, memory, wait_first=state is None, ready=state is not None)

        either(line < before, other, lambda: work.emit(block, line - before, thread, memory))


def _in_rings(tiling: Tiling, beside: FewProduct | None) -> tuple[FewProduct | None, int]:
    """The product beside the experts, through a ring where theirs go through one, and the blocks at once."""
    if beside is None or not tiling.ring:
        return beside, tiling.blocks
    if beside.group.packed:
        return beside, min(tiling.blocks, beside.tiling.blocks)
    own = through_ring(beside.tiling, beside.group.columns, FIRST.bytes, registers_each=FIRST.registers)
    own = replace(own, shared_bytes=min(own.shared_bytes, tiling.shared_bytes))
    return replace(beside, tiling=own), tiling.blocks


@dataclass(frozen=True)
class _FirstLaunch:
    """What the blocks of the experts do."""

    body: ExpertBody
    call: ExpertCall
    middle: Buffer
    tiling: Tiling
    share: TileShare
    arrivals: Arrivals | None

    def emit(self, block: Expr, number: Expr, thread: Expr, memory: FewMemory | None = None) -> None:
        """Emit one of the blocks of one of the T * K choices."""
        call_, arrivals = self.call, self.arrivals
        with when(T.cast(thread, "int64") * i64(LINE_WORDS) < call_.count):
            call("prefetch_l2", element(call_.table, T.cast(thread, "int64") * i64(LINE_WORDS)))
        if arrivals is None:
            wait_previous()
        launch_next()
        entry = T.bind(number) if arrivals is None else arrivals.entry(number)
        choice = find_tokens(call_, thread, entry)
        with when(choice.first):
            if arrivals is not None:
                arrivals.wait(choice.expert, 0, thread)
            tiles = self.share.first(block), self.share.count(block)
            _GateUp(self.body, call_, self.middle, self.tiling, *tiles, choice, memory).emit(thread)


@dataclass(frozen=True)
class _GateUp:
    """What a block of the first launch does for its expert."""

    body: ExpertBody
    call: ExpertCall
    middle: Buffer
    tiling: Tiling
    first: Expr
    """Of its tiles, int32."""
    tiles: int | Expr
    """How many it has."""
    choice: Choice
    memory: FewMemory | None

    def emit(self, thread: Expr) -> None:
        body, tiling = self.body, self.tiling
        address = T.bind(load(self.call.table, self.choice.expert))
        lane = Lane.of(thread, tiling)
        shape = layout(body)
        offsets = [shape.part(name).offset_bytes for name in names_of_first(body)]
        packed = packed_row(body, body.hidden)
        row_bytes = packed.layout.row_bytes if packed else 2 * body.hidden

        def locate(tile: Expr, stream: int, half: int) -> Expr:
            local = lane.row_warp * i32(TILE_ROWS) + lane.group + i32(8 * half)
            row = T.bind(T.min(self._row(tile, local), i32(body.intermediate - 1)))
            return address + i64(offsets[stream]) + T.cast(row, "int64") * i64(row_bytes)

        block = Block(
            thread,
            tiling.threads,
            self.choice.count,
            body.hidden,
            i32(0),
            self.first,
            at_once=AT_ONCE_OF_EXPERTS,
        )
        pairs, partial = self.memory and self.memory.pairs, self.memory and self.memory.partial
        count = self.choice.count

        def finish(tile: Expr, local: Expr, token: Expr, sums: list[Expr]) -> None:
            row = T.bind(self._row(tile, local))
            with when(row < i32(body.intermediate)):
                self._store(address, row, load(self.choice.entries, token), sums)

        sums = FewSums(tiling, lane, count, finish, partial, one_tile=self.tiles == 1)
        if packed:
            packed_tokens = PackedTokens(packed, tiling, lane, block, self._reader, FEW_TOKENS, pairs=pairs)
            packed_stream = PackedStream(tiling, packed, count, self.tiles, locate)
            multiply_packed(packed_stream, lane, packed_tokens, sums)
            self._clear_beyond(thread)
            return
        activations = SharedTokens(body.dtype, body.hidden, tiling, lane, block, self._reader, pairs=pairs)
        stream = Stream(tiling, body.dtype, body.hidden, count, self.tiles, locate)
        ring = None if self.memory is None else self.memory.ring_of(tiling)
        multiply(stream, lane, activations, sums, ring)

    def _clear_beyond(self, thread: Expr) -> None:
        """Write the zeros between the last value and the end of a whole step, in the order of packed weights."""
        body = self.body
        elements = middle_elements(body)
        beyond = elements // 2 - body.intermediate
        last = -(-body.intermediate // (TILE_ROWS * self.tiling.row_warps)) - 1
        if not beyond:
            return
        with (
            when(self.first + i32(self.tiles) == i32(last + 1)),
            T.serial(i32(0), self.choice.count) as token,
        ):
            start = T.bind(i64(load(self.choice.entries, token)) * i64(elements))
            for first in range(0, beyond, self.tiling.threads):
                number = T.bind(thread + i32(first))
                with when(number < i32(beyond)):
                    for part in range(2):
                        place = OperandOrder.of(FORMATS[str(body.format)]).place(
                            number + i32(body.intermediate), part
                        )
                        store(self.middle, T.bind(start + i64(place)), T.uint16(0))

    def _row(self, tile: Expr, local: Expr) -> Expr:
        return (self.first + tile) * i32(TILE_ROWS * self.tiling.row_warps) + local

    def _reader(self, _: Block) -> Reader:
        sync()  # the entries are there

        def read_at(token: Expr, column: Expr, count: int) -> list[Expr]:
            row = T.truncdiv(load(self.choice.entries, token), T.cast(self.call.chosen, "int32"))
            start = T.cast(row, "int64") * i64(self.body.hidden)
            return read_floats(self.call.x, T.bind(start + T.cast(column, "int64")), count)

        return read_at

    def _store(self, address: Expr, row: Expr, entry: Expr, sums: list[Expr]) -> None:
        body = self.body
        values = {}
        for name, total in zip(names_of_first(body), sums, strict=True):
            values[name] = total
            if body.up_bias:
                bias = part_at(body, f"{name}_bias", address)
                values[name] = T.bind(total + read(bias, body.dtype, T.cast(row, "int64")))
        value_ = T.bind(evaluate(body.activation, values))
        start = T.bind(T.cast(entry, "int64") * i64(middle_elements(body)))
        if body.format is None:
            parts, places = split_activation(body.dtype, value_), (row, row + i32(body.intermediate))
        else:
            order = OperandOrder.of(FORMATS[body.format])
            parts, places = split_activation(TYPE, value_), (order.place(row, 0), order.place(row, 1))
        for part, place in zip(parts, places, strict=True):
            store(self.middle, T.bind(start + i64(place)), part)

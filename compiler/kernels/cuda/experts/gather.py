"""What the first product of ``many.py`` reads where tokens are across a tile: each, for all its experts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.experts.layout import rounding_of
from moec.compiler.kernels.cuda.many.panels import PANEL, PANEL_PIECES, in_panels, panel_element
from moec.compiler.kernels.cuda.many.rounding import BLOCK_THREADS, values_of_chunk
from moec.compiler.kernels.cuda.many.tiles import CHUNK
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import ceildiv, div, i64, load, mod, store, when

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cuda.experts.call import ExpertCall
    from moec.compiler.kernels.cuda.experts.layout import Parts
    from moec.compiler.kernels.cuda.experts.tile_list import TileList


def emit_gather(body: ExpertBody, call: ExpertCall, parts: Parts, tiles: TileList) -> None:
    """Emit ``gathered[place]``: the rounded token of each place, see `panels.PanelRows`.

    Zeros follow its columns up to the end of the last panel. One more block lists the tiles.
    """
    assert body.hidden % CHUNK == 0
    width = in_panels(body.hidden) // CHUNK
    blocks = ceildiv(call.tokens * i64(width), BLOCK_THREADS)
    rounding = rounding_of(body)
    with cuda.launch((blocks + i64(1),), BLOCK_THREADS) as ((block,), thread):
        number = T.bind(i64(block) * i64(BLOCK_THREADS) + i64(thread))
        cuda.wait_previous()
        with when(number < call.tokens * i64(width)):
            token, piece = T.bind(div(number, width)), T.bind(i32(mod(number, width)))
            words = cuda.registers(CHUNK // 2, "uint32")
            for word in range(CHUNK // 2):
                store(words, word, T.uint32(0))
            with when(piece < i32(body.hidden // CHUNK)) if body.hidden % PANEL else nullcontext():
                first = T.bind(i64(piece) * i64(CHUNK))
                found = values_of_chunk(call.x, token * i64(body.hidden), first, body.hidden)
                values = [rounding.scaled(value) for value in found]
                for word in range(CHUNK // 2):
                    store(words, word, cuda.pack(rounding.dtype, *values[2 * word : 2 * word + 2]))
            with T.serial(i32(0), i32(call.chosen)) as choice:
                pair = T.bind(token * call.chosen + i64(choice))
                expert = T.bind(load(call.index, pair))
                with when(call.has(expert)):
                    place = T.bind(load(parts.places, pair))
                    turn = (place - load(parts.spans, expert * i64(2))) % i32(PANEL_PIECES)
                    pairs, column = call.tokens * call.chosen, piece * i32(CHUNK)
                    target = panel_element(i64(place), column, pairs, turn)
                    cuda.call(
                        "store_16", cuda.element(parts.gathered, target), *(load(words, k) for k in range(4))
                    )
        with when(i64(block) == blocks):
            tiles.emit(thread, BLOCK_THREADS)
        cuda.launch_next()

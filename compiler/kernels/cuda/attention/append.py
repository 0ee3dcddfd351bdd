"""Write the keys and values of a step's tokens into their pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tvm.script.ir_builder import tirx as T

from moec.artifacts.program import APPEND
from moec.compiler.kernels.attention_arguments import declare_append
from moec.compiler.kernels.cpu.cache_append import Cached as Keys
from moec.compiler.kernels.cpu.numeric import saturate_f16
from moec.compiler.kernels.cuda.attention.convert import floats, stored
from moec.compiler.kernels.cuda.attention.operands import cache_row
from moec.compiler.kernels.cuda.primitives import call, element, i32, launch, launch_next, wait_previous
from moec.compiler.kernels.cuda.threads import write
from moec.compiler.kernels.emit import Buffer, Expr, build, ceildiv, div, either, i64, load, mod, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from tvm import tirx

    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.attention_arguments import Appended

BLOCK_THREADS = 256


class Cached(Keys, Protocol):
    """What is cached of a token, e.g. an ``AttentionSpec``."""

    @property
    def latent(self) -> bool:
        """Whether there are no values."""
        ...


def parts(spec: Cached, operands: Appended) -> list[tuple[Buffer, Buffer, int]]:
    """What is appended: source, cache, and the elements of a row."""
    keys = (operands.k, operands.k_cache, spec.key_dim)
    return [keys] if operands.v is None else [keys, (operands.v, operands.v_cache, spec.value_dim)]


def piece_size(spec: Cached) -> int:
    """Elements that a thread moves: 16 bytes of the cache where rows allow that."""
    aligned = spec.key_dim % 8 == 0 and (spec.latent or spec.value_dim % 8 == 0)
    return 8 if spec.dtype != "float32" and aligned else 1


def append_kernel(spec: AttentionSpec) -> tirx.PrimFunc:
    """The function ``append_<name>(k, v, k_cache, v_cache, page_table, token_sequence, token_position)``."""
    return build(f"{APPEND}{spec.name}", lambda: append(spec, declare_append(spec)))


def append(spec: Cached, operands: Appended, beside: Callable[[Expr], None] | None = None) -> None:
    """Launch a kernel that appends all tokens of the step.

    Args:
        spec: which attention.
        operands: its operands.
        beside: emits what one more block does, given its thread number; it waits for the previous kernel itself.
    """
    piece = piece_size(spec)
    total = sum(size for _, _, size in parts(spec, operands)) // piece
    count = operands.tokens * i64(spec.kv_heads * total)
    others = 0 if beside is None else 1
    with launch((ceildiv(count, BLOCK_THREADS) + i64(others),), BLOCK_THREADS) as ((block,), thread):

        def own() -> None:
            first = T.cast(block - i32(others), "int64") * i64(BLOCK_THREADS)
            number = T.bind(first + T.cast(thread, "int64"))
            wait_previous()
            with when(number < count):
                row, place = T.bind(div(number, total)), T.bind(mod(number, total))
                token, head = T.bind(div(row, spec.kv_heads)), T.bind(mod(row, spec.kv_heads))
                slot = cache_row(
                    operands, spec, load(operands.sequence, token), load(operands.position, token), head
                )
                move(spec, operands, row, slot, place)

        launch_next()
        if beside is None:
            own()
        else:
            either(block == i32(0), lambda: beside(thread), own)


def move(spec: Cached, operands: Appended, row: Expr, slot: Expr, place: Expr) -> None:
    """Piece number ``place`` of a token and head's key and value: row ``row`` of the step to row ``slot``."""
    piece = piece_size(spec)
    begin = 0
    for source, cache, size in parts(spec, operands):
        pieces = size // piece
        with when(T.And(place >= i64(begin), place < i64(begin + pieces))):
            offset = T.bind((place - i64(begin)) * i64(piece))
            start, end = T.bind(row * i64(size) + offset), T.bind(slot * i64(size) + offset)
            if piece == 1:
                value = load(source, start)
                write(cache, spec.dtype, end, saturate_f16(value, 1) if spec.dtype == "float16" else value)
            else:
                call("store_16", element(cache, end), *stored(spec.dtype, floats(source, start, piece)))
        begin += pieces


def append_token(
    spec: Cached, operands: Appended, token: Expr, head: Expr, thread: Expr, threads: int
) -> None:
    """Append one token's key and value of one head, with the threads of a block."""
    row = T.bind(T.cast(token, "int64") * i64(spec.kv_heads) + T.cast(head, "int64"))
    slot = cache_row(operands, spec, load(operands.sequence, token), load(operands.position, token), head)
    pieces = sum(size for _, _, size in parts(spec, operands)) // piece_size(spec)
    for start in range(0, pieces, threads):
        place = T.bind(T.cast(thread, "int64") + i64(start))
        with when(place < i64(pieces)):
            move(spec, operands, row, slot, place)

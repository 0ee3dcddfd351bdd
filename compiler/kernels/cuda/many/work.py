"""What the blocks of a launch share: pieces of products, each a tile of both operands and what stores its sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from moec.compiler.kernels.cuda.many.outbox import Outbox
    from moec.compiler.kernels.cuda.many.panels import PanelRows
    from moec.compiler.kernels.cuda.many.tiles import ResultRow, Rows
    from moec.compiler.kernels.cuda.packed.tiles import PackedRows
    from moec.compiler.kernels.emit import Buffer, Expr


@dataclass(frozen=True)
class Piece:
    """A tile of work."""

    a: Rows | PanelRows
    """``terms`` times ``a.depth`` elements, the last of them beyond ``w.depth`` zeros."""
    w: Rows | PackedRows | PanelRows
    """In panels only where blocks stay (see `pipeline`), as ``a`` where products are of four warps."""
    store: Callable[[Buffer, list[ResultRow]], None]
    """Emits what stores a thread's sums."""
    terms: int = 1
    """That meet the same elements of ``w``."""
    send: Callable[[Outbox, Buffer, list[ResultRow]], None] | None = None
    """Emits what lays a thread's sums out and sends them instead, where blocks stay and the work has an outbox."""


@dataclass(frozen=True)
class Work:
    """All pieces of a launch."""

    total: Expr
    """Pieces have numbers below it, int64."""
    piece: Callable[[Expr], AbstractContextManager[Piece]]
    """Emits what finds a piece by its number (int32); what is emitted inside runs only where it has any work."""
    dtype: str
    """The 16-bit type of both operands."""
    finds_early: bool
    """Whether no launch ahead of this one writes what pieces are found by, nor ``w``."""
    known: Callable[[], Expr] | None = None
    """Emits how many pieces there are of the ``total`` (int32), where only the GPU knows and blocks stay."""
    outbox_bytes: int = 0
    """Shared memory for results, where blocks stay; 0: each thread stores its own."""

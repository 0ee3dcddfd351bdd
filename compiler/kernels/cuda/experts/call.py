"""What a kernel of routed experts was called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx

from moec.compiler.kernels.emit import i64

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr


@dataclass(frozen=True)
class ExpertCall:
    """The arguments of ``experts_<body>``, flat, and its symbolic extents (int64)."""

    x: Buffer
    """float32 ``[T, H]``."""
    index: Buffer
    """int64 ``[T, K]``; what is not in 0 .. E-1 contributes nothing."""
    weight: Buffer
    """float32 ``[T, K]``."""
    table: Buffer
    """int64 ``[E]``: where each expert's bytes are."""
    workspace: Buffer
    """uint8, as ``experts.workspace_bytes`` says."""
    out: Buffer
    """float32 ``[T, H]``."""
    tokens: Expr
    chosen: Expr
    count: Expr
    """T, K and E."""

    def has(self, expert: Expr) -> Expr:
        """Whether an index (int64) is that of an expert."""
        return tirx.all(expert >= i64(0), expert < self.count)

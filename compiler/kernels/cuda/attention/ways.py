"""How a kernel is chosen for what is cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.model import AttentionSpec
    from moec.compiler.kernels.cuda.attention.operands import Operands


@dataclass(frozen=True)
class Way:
    """How to attend to keys and values, or to latents."""

    few: Callable[[AttentionSpec, Operands], None] | None
    """Launches for at most eight tokens, which append the step too; ``None``: as for many."""
    many: Callable[[AttentionSpec, Operands], None]
    """Launches for any number of tokens, after the step was appended."""
    workspace_bytes: int
    rounds: bool = False
    """Whether launches for many tokens can put rounded results where `Operands.rounded` says."""

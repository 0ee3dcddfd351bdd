"""What one patch is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MODELS = "transformers.models"
OUTSIDE = "its state is kept outside, for each sequence of a batch"


@dataclass(frozen=True)
class Patch:
    """Replace ``target`` (``function`` or ``Class.method``) while a model of ``module`` is traced."""

    module: str
    target: str
    replacement: Callable[..., Any]
    why: str

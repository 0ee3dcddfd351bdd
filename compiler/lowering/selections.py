"""Which targets can select positions of the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    from moec.artifacts.model import ModelRecord


def check_selections(model: ModelRecord, kind: str) -> None:
    """Refuse a model with selections for a target that has no kernels for them.

    Raises:
        UnsupportedModelError: as it says.
    """
    if model.selections and kind != "cpu":
        selected = min(spec.top_k for spec in model.selections)
        raise UnsupportedModelError(
            f"{model.class_name} attends to {selected} positions of a context of {model.max_context}.",
            "Only the CPU has kernels that select positions. Contexts that are selected whole are dense attention.",
            f"Compile for the CPU alone, or with --max-context {selected} or less.",
        )

"""What is wrong with the parts of a quantized weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.errors import CheckpointError

if TYPE_CHECKING:
    from moec.compiler.checkpoint.record import TensorEntry


def misfit(name: str, weight: TensorEntry, scale: TensorEntry, expected: str) -> CheckpointError:
    """The scales of ``name`` are not ``expected``."""
    return CheckpointError(
        f"The scales of {name} do not fit it: weight {weight.dtype} {list(weight.shape)}, "
        f"scales {scale.dtype} {list(scale.shape)}.",
        f"Expected {expected}.",
        "Download the checkpoint again, or use the unquantized one.",
    )

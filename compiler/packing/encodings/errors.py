"""What is wrong with the parts of a quantized weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.errors import CheckpointError, UnsupportedModelError

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


def missing(part: str, of: str) -> CheckpointError:
    """There is ``of`` and no ``part``."""
    return CheckpointError(
        f"Tensor {part} is missing in the checkpoint.",
        f"{of} is there, and means nothing without it.",
        "Download the checkpoint again, or use the unquantized one.",
    )


def contradicts(name: str, what: str, key: str, value: str) -> CheckpointError:
    """The config says something else of ``name`` than its tensors."""
    return CheckpointError(
        f"{name} is not quantized as the checkpoint's config says: {key} is not {value} there.",
        what,
        f"Set {key} to {value} in quantization_config of config.json, or use --quantization none.",
    )


def unreadable(how: str, why: str) -> UnsupportedModelError:
    """The checkpoint is quantized in a way that moec does not read."""
    return UnsupportedModelError(
        f"The checkpoint is quantized {how}.",
        why,
        "Use the unquantized checkpoint of this model, with --quantization for fewer bits.",
    )

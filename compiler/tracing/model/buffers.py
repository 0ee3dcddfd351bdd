"""Values of the buffers that no checkpoint has, such as rotary frequencies."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing.model.text_half import used_modules
from moec.errors import UnsupportedModelError


def rebuild_buffers(model: Any) -> dict[str, torch.Tensor]:
    """Compute the non-persistent buffers of a model that lies on the meta device, on the CPU.

    The model itself is left on the meta device.

    Returns:
        Values by the path of the buffer.

    Raises:
        UnsupportedModelError: transformers' initialisation leaves a buffer unset.
    """
    values: dict[str, torch.Tensor] = {}
    for path, module in used_modules(model):
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if not names:
            continue
        meta = {name: module._buffers[name] for name in names}
        for name in names:
            module._buffers[name] = _unset(meta[name])
        model._init_weights(module)
        for name in names:
            value = module._buffers[name]
            module._buffers[name] = meta[name]
            if _is_unset(value):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: the value of buffer {path}.{name} is unknown.",
                    f"No checkpoint has it, and {type(model).__name__}._init_weights does not set it.",
                )
            values[f"{path}.{name}" if path else name] = value
    return values


def _unset(meta: torch.Tensor) -> torch.Tensor:
    fill = float("nan") if meta.is_floating_point() else 0
    return torch.full(meta.shape, fill, dtype=meta.dtype, device="cpu")


def _is_unset(value: torch.Tensor) -> bool:
    # An unset table of integers reads as zeros, which no table of more than one entry is.
    unset = value.isnan() if value.is_floating_point() else value == 0
    return bool(unset.any() if value.is_floating_point() else unset.all() and value.numel() > 1)

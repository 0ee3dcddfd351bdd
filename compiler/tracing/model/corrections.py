"""What transformers makes of a ``config.json`` that the published model does not mean, set right before it reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def _dbrx(fields: dict[str, Any]) -> None:
    """Transformers 5.23 reads ``attn_config.rope_theta`` (500000) and then rotates with its own default, 10000."""
    base = (fields.get("attn_config") or {}).get("rope_theta")
    if base is not None:
        fields.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": float(base)})


CORRECTIONS: dict[str, Callable[[dict[str, Any]], None]] = {"dbrx": _dbrx}
"""``model_type`` -> what changes the config's keys in place."""

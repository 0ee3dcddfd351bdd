"""A fingerprint of a config: the same model has the same one whoever saved it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

VOLATILE_KEYS = frozenset({"transformers_version", "_name_or_path", "torch_dtype", "dtype"})
"""Keys that differ between two copies of one model."""


def config_sha256(config: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of ``config`` without ``VOLATILE_KEYS``."""
    text = json.dumps(_stable(config), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in VOLATILE_KEYS}
    return [_stable(item) for item in value] if isinstance(value, list) else value

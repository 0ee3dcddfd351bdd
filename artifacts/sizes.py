"""Amounts of memory for people to read."""

from __future__ import annotations


def human_bytes(count: int) -> str:
    """``1536`` as ``1.5 KiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def exact_bytes(count: int) -> str:
    """``1536`` as ``1536 bytes (1.5 KiB)``: to copy, and to read."""
    return f"{count} bytes" if count < 1024 else f"{count} bytes ({human_bytes(count)})"

"""How a GPU is told which dense weights come next: the function ``prefetch(ranges [RANGES, 2] int64)`` of a module."""

from __future__ import annotations

PREFETCH = "prefetch"
"""The function's name in a CUDA target's module; see ``compiler/kernels/cuda/prefetch.py``."""
RANGES = 8
"""Pieces of memory in one call: an address, a multiple of 16, and bytes, a multiple of 16; 0 bytes for none."""
RANGE_MULTIPLE = 16
FEW_TOKENS = 8
"""Steps of so many tokens at most are bound by reading weights once."""

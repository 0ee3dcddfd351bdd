"""Distinct names for the ids that the records use, so that they cannot be mixed up."""

from __future__ import annotations

from typing import NewType

LayerId = NewType("LayerId", int)
"""Ordinal of a layer within its own kind: the n-th MoE layer, or the n-th attention layer, from 0."""

ValueId = NewType("ValueId", str)
"""Name of a tensor that flows between two steps of the chain."""

TensorName = NewType("TensorName", str)
"""Name of a weight in ``weights/dense.safetensors``."""

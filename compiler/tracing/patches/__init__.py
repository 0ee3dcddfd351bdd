"""The patch table: code of transformers that cannot be traced, and what stands in for it. A file a family."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moec.compiler.tracing.patches import (
    beam,
    dbrx,
    deepseek_v2,
    delta_rule,
    ernie4_5_vl_moe,
    glm5_next,
    indexers,
    jetmoe,
    lfm2_moe,
    llama4,
    mamba,
    minimax,
    multimodal_rotation,
    nllb_moe,
    phimoe,
    switch_transformers,
    zaya,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.tracing.patches.record import Patch

FAMILIES = (
    beam,
    dbrx,
    deepseek_v2,
    delta_rule,
    ernie4_5_vl_moe,
    glm5_next,
    indexers,
    jetmoe,
    lfm2_moe,
    llama4,
    mamba,
    minimax,
    multimodal_rotation,
    nllb_moe,
    phimoe,
    switch_transformers,
    zaya,
)
PATCHES: tuple[Patch, ...] = tuple(patch for family in FAMILIES for patch in family.PATCHES)
"""Every patch there is."""


@contextmanager
def patched(modeling_module: str) -> Iterator[None]:
    """Apply the patches of one modelling module, e.g. ``transformers.models.phimoe.modeling_phimoe``."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for patch in PATCHES:
            if patch.module != modeling_module:
                continue
            owner: Any = importlib.import_module(patch.module)
            *path, name = patch.target.split(".")
            for part in path:
                owner = getattr(owner, part)
            undo.append((owner, name, getattr(owner, name)))
            setattr(owner, name, patch.replacement)
        yield
    finally:
        for owner, name, original in reversed(undo):
            setattr(owner, name, original)

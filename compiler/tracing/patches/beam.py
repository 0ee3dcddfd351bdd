"""BEAM: residuals scaled by depth, with scales that are data, so that equal layers stay equal."""

from __future__ import annotations

import math

import torch

from moec.compiler.tracing.patches.record import MODELS, Patch


def _residual_add(hidden_states: torch.Tensor, residual: torch.Tensor, residual_add_idx: int) -> torch.Tensor:
    """What the sublayer of this number adds, with the sum of those before it: of one variance throughout."""
    new = torch.tensor([math.sqrt(1 / residual_add_idx)])
    old = torch.tensor([math.sqrt((residual_add_idx - 1) / residual_add_idx)])
    return hidden_states * new + residual * old


PATCHES = (
    Patch(
        f"{MODELS}.beam.modeling_beam",
        "depth_scaled_residual_add",
        _residual_add,
        "numbers that differ from layer to layer make every layer a function of its own",
    ),
)

"""The patch table: code of transformers that cannot be traced, and what stands in for it."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODELS = "transformers.models"


@dataclass(frozen=True)
class Patch:
    """Replace ``target`` (``function`` or ``Class.method``) while a model of ``module`` is traced."""

    module: str
    target: str
    replacement: Callable[..., Any]
    why: str


def _rotation_table(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Cosine and sine side by side ``[1, T, D/2, 2]``, instead of one complex number."""
    angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
    table: torch.Tensor = torch.stack([angles.cos(), angles.sin()], -1) * self.attention_scaling
    return table


def _rotate_pairs(
    xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate pairs of neighbours of ``[1, heads, T, D]`` in real arithmetic."""
    cos, sin = freqs_cis[..., 0].unsqueeze(1), freqs_cis[..., 1].unsqueeze(1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return turned.flatten(-2).type_as(x)

    return rotate(xq), rotate(xk)


def _phimoe_rotation(
    self: Any, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Phi-3.5-MoE's tables, each token with the scale that its own position asks for.

    transformers takes the largest position of a call for all its tokens; the two agree in every decode step,
    and for every prompt within the original context.
    """
    angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
    table = torch.cat((angles, angles), dim=-1)
    scale: Any = self.attention_scaling
    parameters = self.config.rope_parameters
    if parameters["rope_type"] != "default":
        beyond = (position_ids >= parameters["original_max_position_embeddings"])[..., None].float()
        short, long = float(parameters["short_mscale"]), float(parameters["long_mscale"])
        scale = short if short == long else short + beyond * (long - short)
    return (table.cos() * scale).to(x.dtype), (table.sin() * scale).to(x.dtype)


PATCHES: tuple[Patch, ...] = (
    Patch(
        f"{MODELS}.deepseek_v2.modeling_deepseek_v2",
        "DeepseekV2RotaryEmbedding.forward",
        _rotation_table,
        "complex numbers have no kernels",
    ),
    Patch(
        f"{MODELS}.deepseek_v2.modeling_deepseek_v2",
        "apply_rotary_emb",
        _rotate_pairs,
        "complex numbers have no kernels",
    ),
    Patch(
        f"{MODELS}.phimoe.modeling_phimoe",
        "PhimoeRotaryEmbedding.forward",
        _phimoe_rotation,
        "it chooses a scale by the largest position of the call",
    ),
)
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

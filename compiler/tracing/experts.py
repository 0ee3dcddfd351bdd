"""What one expert computes and where its weights are, by the flags of transformers' experts modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.compiler.tracing.activation import read_activation
from moec.compiler.tracing.model.build import DTYPES
from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from moec.artifacts.activation import Expression
    from moec.artifacts.model import DType


@dataclass(frozen=True)
class ExpertsFacts:
    """One experts module: E experts of H hidden and I intermediate values."""

    module: str
    experts: int
    hidden: int
    intermediate: int
    gated: bool
    bias: bool
    transposed: bool
    interleaved: bool
    activation: Expression
    dtype: DType


def read_experts(path: str, module: Any) -> ExpertsFacts:
    """Derive the body of the experts at ``path``.

    Raises:
        UnsupportedModelError: an expert does more than ``down(activation(gate_up(x)))``.
    """
    owner = type(module).__name__
    if module.has_post_expert_norm:
        raise UnsupportedModelError(f"{owner} normalises the output of each expert, and no kernel does that.")
    up = module.gate_up_proj if module.has_gate else module.up_proj
    rows, columns = up.shape[1:] if not module.is_transposed else up.shape[:0:-1]
    gated, interleaved = bool(module.has_gate), bool(module.has_gate and not module.is_concatenated)
    intermediate = rows // 2 if gated else rows
    expected = (
        (up.shape[0], intermediate, columns) if module.is_transposed else (up.shape[0], columns, intermediate)
    )
    if tuple(module.down_proj.shape) != expected:
        raise UnsupportedModelError(
            f"{owner} at {path} has a down_proj of shape {tuple(module.down_proj.shape)}",
            f"Expected {expected} beside an up projection of shape {tuple(up.shape)}.",
        )
    return ExpertsFacts(
        module=path,
        experts=int(up.shape[0]),
        hidden=int(columns),
        intermediate=int(intermediate),
        gated=gated,
        bias=bool(module.has_bias),
        transposed=bool(module.is_transposed),
        interleaved=interleaved,
        activation=read_activation(_middle(module), gated, interleaved, owner),
        dtype=dtype_name(up.dtype),
    )


def dtype_name(dtype: torch.dtype) -> DType:
    """``torch.float32`` as ``"float32"``."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def _middle(module: Any) -> Any:
    return module._apply_gate if module.has_gate else module.act_fn

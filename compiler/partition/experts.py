"""What tracing noted of routed experts, as records: what one computes, and where its parameters are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.model import ExpertBody
from moec.artifacts.packing import ExpertSource

if TYPE_CHECKING:
    from moec.artifacts.ids import LayerId
    from moec.compiler.tracing.experts import ExpertsFacts


def expert_body(facts: ExpertsFacts) -> ExpertBody:
    """What an expert computes, without a name."""
    return ExpertBody(
        name="",
        hidden=facts.hidden,
        intermediate=facts.intermediate,
        gated=facts.gated,
        up_bias=facts.bias,
        down_bias=facts.bias,
        activation=facts.activation,
        dtype=facts.dtype,
    )


def expert_source(layer: LayerId, facts: ExpertsFacts) -> ExpertSource:
    """Parameter names, as transformers' experts interface fixes them."""
    up = "gate_up_proj" if facts.gated else "up_proj"
    return ExpertSource(
        layer=layer,
        up=f"{facts.module}.{up}",
        down=f"{facts.module}.down_proj",
        up_bias=f"{facts.module}.{up}_bias" if facts.bias else None,
        down_bias=f"{facts.module}.down_proj_bias" if facts.bias else None,
        transposed=facts.transposed,
        interleaved=facts.interleaved,
    )

"""Mamba layers: Mamba-2 of Granite 4 and Nemotron-H, Mamba of Jamba."""

from __future__ import annotations

from typing import Any

import torch

from moec.compiler.tracing import state_markers as markers
from moec.compiler.tracing.patches.record import MODELS, OUTSIDE, Patch
from moec.compiler.tracing.patches.recurrences import causal_convolution, chunk_scan


def _jamba_mixer(self: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Jamba's mixer with tokens before channels throughout: all channels are columns of one head."""
    x, gate = self.in_proj(hidden_states).chunk(2, -1)
    taps = self.conv1d.weight.squeeze(1).transpose(0, 1)
    x = self.act(markers.convolution(x, taps, self.conv1d.bias))
    sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
    step, key, query = torch.split(self.x_proj(x), sizes, -1)
    step = torch.nn.functional.softplus(self.dt_proj(self.dt_layernorm(step)))
    key, query = self.b_layernorm(key), self.c_layernorm(query)
    rates = -torch.exp(self.A_log.float()).transpose(0, 1).unsqueeze(0)
    operands = (each.unsqueeze(2) for each in (query, key, x * step, step))
    out: torch.Tensor = markers.recurrence(*operands, None, rates, "rates").squeeze(2)
    mixed: torch.Tensor = self.out_proj((out + x * self.D) * torch.nn.functional.silu(gate))
    return mixed


PATCHES = (
    *(
        Patch(f"{MODELS}.{name}.modeling_{name}", target, replacement, OUTSIDE)
        for name in ("granitemoehybrid", "nemotron_h")
        for target, replacement in (
            ("causal_conv1d_fn", causal_convolution),
            ("mamba2_chunk_scan", chunk_scan),
        )
    ),
    Patch(f"{MODELS}.jamba.modeling_jamba", "JambaMambaMixer.forward", _jamba_mixer, OUTSIDE),
)

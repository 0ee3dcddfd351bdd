"""How fast this CPU computes a bundle's experts, without a GPU: what plans are made with before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.sharing import TeamSpeed
from moec.artifacts.words.mailbox import mailbox_layout
from moec.runtime.machine.libraries import host_cpu_features, load_runtime
from moec.runtime.machine.limits import available_memory
from moec.runtime.sharing.loading import cpu_side
from moec.runtime.sharing.mailbox import Mailbox
from moec.runtime.sharing.rehearsal import Rehearsal
from moec.runtime.sharing.team import Team, shared_layers
from moec.runtime.tensors import aligned_empty, aligned_zeros

if TYPE_CHECKING:
    from moec.artifacts.files.bundle import Bundle

MAILBOX_ALIGNMENT = 256
MOST_BYTES = 1 << 30
"""Of experts that are brought to memory for it: beyond any cache."""
MEMORY_SHARE = 0.25
"""Of the available memory, at most."""


def team_speed(bundle: Bundle, threads: int) -> TeamSpeed | None:
    """Let a team compute some experts of the first MoE layer, as it does beside a GPU.

    ``None`` where there is nothing to measure: no module for this CPU, no MoE layer, or no memory for the experts of a
    token.

    Args:
        bundle: with its weights.
        threads: of the team, at least 1.

    Raises:
        DeviceError: a thread did not start, or the CPU does not answer.
    """
    if not bundle.model.experts:
        return None
    layer = bundle.model.experts[0]
    stride = bundle.expert_layout(layer.layer).stride_bytes
    room = min(MOST_BYTES, int(MEMORY_SHARE * available_memory()))
    count = min(layer.experts, max(room // stride, layer.top_k))
    if count * stride > MEMORY_SHARE * available_memory():
        return None
    load_runtime(None)
    serve = cpu_side(bundle, host_cpu_features(), threads).serve
    if serve is None:
        return None
    experts = aligned_empty((count, stride), np.uint8)
    for number in range(count):
        experts[number] = bundle.expert_view(layer.layer, number)
    table = aligned_zeros((layer.experts,), np.int64)
    table[:count] = experts.ctypes.data + stride * np.arange(count)
    layout = mailbox_layout(bundle.model.hidden_size, layer.top_k)
    memory = aligned_zeros((layout.size_bytes + MAILBOX_ALIGNMENT,), np.uint8)
    box = Mailbox(-(-memory.ctypes.data // MAILBOX_ALIGNMENT) * MAILBOX_ALIGNMENT, layout)
    tables = [table.ctypes.data] * len(bundle.model.experts)
    team = Team(serve, box, shared_layers(bundle.model, tables), threads)
    try:
        known = list(range(count))
        return TeamSpeed.of(Rehearsal(box, team, [(0, layer.top_k, known)]).microseconds(), stride)
    finally:
        team.close()

"""Threads that serve experts through a mailbox in plain memory; the benchmark asks in a GPU's place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.support.random_experts import random_experts
from moec.artifacts.layout.experts import layout
from moec.artifacts.words import mailbox
from moec.artifacts.words.mailbox import mailbox_layout
from moec.runtime.machine.threads import usable_cpus
from moec.runtime.sharing.mailbox import Mailbox
from moec.runtime.sharing.team import SharedLayer, Team
from moec.runtime.tensors import aligned_zeros, array_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.artifacts.model import ExpertBody

CHOSEN = 6


class MailboxTeam:
    """A team on all CPUs but the asking one, with a layer of random experts for each body.

    Args:
        serve: the kernel.
        bodies: of one hidden size.
        pool_bytes: of experts for each body.
    """

    def __init__(
        self,
        serve: Callable[..., Any],
        bodies: Sequence[ExpertBody],
        pool_bytes: int,
    ) -> None:
        self.threads = max(1, usable_cpus() - 1)
        place = mailbox_layout(bodies[0].hidden, CHOSEN)
        self._memory = aligned_zeros((place.size_bytes + 256,), np.uint8)
        self._box = Mailbox(-(-self._memory.ctypes.data // 256) * 256, place)
        self._index = array_at(*self._box.view(place.index))
        self._random, self._asked = np.random.default_rng(0), 0
        x = array_at(*self._box.view(place.x))
        x[:] = self._random.standard_normal(x.shape)
        array_at(*self._box.view(place.weight))[:] = 0.5
        self._pools, layers = [], []
        for number, body in enumerate(bodies):
            memory, table = random_experts(body, pool_bytes // layout(body).stride_bytes)
            self._pools.append((memory, table))
            layers.append(SharedLayer(table.data_ptr(), len(table), CHOSEN, number, body.intermediate))
        self._team = Team(serve, self._box, layers, self.threads)

    def ask(self, layer: int, requests: int, tokens: int) -> None:
        """Requests one after the other, each for other experts, which all of its tokens choose."""
        words, experts = self._box.words, len(self._pools[layer][1])
        self._team.begin()
        for _ in range(requests):
            chosen = self._random.choice(experts, CHOSEN, replace=False)
            self._index[: tokens * CHOSEN] = np.tile(chosen, tokens)
            words[mailbox.LAYER], words[mailbox.COUNT] = layer, tokens
            self._asked += 1
            words[mailbox.POSTED] = self._asked
            while words[mailbox.DONE] != self._asked:
                pass
        self._team.end()
        self._team.check()

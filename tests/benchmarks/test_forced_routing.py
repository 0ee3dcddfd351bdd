from __future__ import annotations

import inspect

from benchmarks.forced_routing import ForcedRouting
from moec.runtime.devices.cuda.offload.calls import OffloadedExperts
from moec.runtime.devices.cuda.weights import ResidentExperts


def test_forced_routing_is_called_as_what_it_stands_in_for() -> None:
    """It takes the place of their method, which no type checker sees."""
    own = inspect.signature(ForcedRouting._calls)
    assert own == inspect.signature(OffloadedExperts.calls) == inspect.signature(ResidentExperts.calls)

"""Host memory filled with experts once, for all models of a process that measures many budgets."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from moec.runtime.devices.cuda.driver.resources import Resources
from moec.runtime.devices.cuda.offload import loading
from moec.runtime.devices.cuda.offload.host_tier import HostTier

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def shared_host_tier() -> Iterator[None]:
    """Every model loaded inside whose plan hosts as many experts as the first one's gets that one's host memory."""
    own = Resources(NvidiaDriver(), 0)
    tiers: dict[Any, HostTier] = {}

    def tier(_: Resources, bundle: Any, plan: Any, *options: Any) -> HostTier:
        key = bundle.path, tuple(layer.hosted for layer in plan.layers)
        if key not in tiers:
            tiers.clear()
            tiers[key] = HostTier(own, bundle, plan, *options)
        return tiers[key]

    module: Any = loading
    module.HostTier = tier
    try:
        yield
    finally:
        module.HostTier = HostTier
        tiers.clear()
        own.close()

"""Values of a chain in a file each, so that they take no memory while nobody looks at them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from moec.artifacts.ids import ValueId


class ValueFiles:
    """What steps made, in files of a folder that are mapped into memory: pages that the system may drop.

    Args:
        folder: is there, and somebody else's to remove.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._values: dict[ValueId, torch.Tensor] = {}

    def __setitem__(self, name: ValueId, value: torch.Tensor) -> None:
        path = self._folder / f"{len(self._values)}.values"
        kept = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype)
        self._values[name] = kept.view(value.shape).copy_(value.detach())

    def __getitem__(self, name: ValueId) -> torch.Tensor:
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

"""Values of a chain in a file each, so that they take no memory while nobody looks at them."""

from __future__ import annotations

from itertools import count
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
        self._paths: dict[ValueId, Path] = {}
        self._numbers = count()

    def __setitem__(self, name: ValueId, value: torch.Tensor) -> None:
        path = self._paths[name] = self._folder / f"{next(self._numbers)}.values"
        kept = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype)
        self._values[name] = kept.view(value.shape).copy_(value.detach())

    def __delitem__(self, name: ValueId) -> None:
        del self._values[name]
        self._paths.pop(name).unlink()

    def __getitem__(self, name: ValueId) -> torch.Tensor:
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

"""Whether a bundle's machine code and this runtime agree on what they share in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.words.interface import interface
from moec.errors import BundleError

if TYPE_CHECKING:
    from moec.artifacts.files.manifest import TargetRecord


def check_interface(target: TargetRecord) -> TargetRecord:
    """``target``, if this runtime knows what its kernels read and write.

    Raises:
        BundleError: it was compiled by another moec, whose kernels and runtime share other words.
    """
    if target.interface != interface():
        raise BundleError(
            f"The bundle's module {target.name} was compiled by another moec than this one.",
            f"Its kernels expect interface {target.interface}, this runtime has {interface()}.",
            "Compile the model again, or use the moec that compiled it.",
        )
    return target

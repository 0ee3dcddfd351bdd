"""What ``--fit`` cannot do without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.errors import UsageError

if TYPE_CHECKING:
    from moec.compiler.request import Calibration


def check_calibration(calibration: Calibration) -> None:
    """Refuse to choose formats with nothing to measure them on.

    Raises:
        UsageError: there are no prompts, by the person's own wish.
    """
    if not calibration.enabled:
        raise UsageError(
            "--fit needs calibration prompts.",
            "It measures on them what each format costs, and --calibration none says that there are none.",
            "Leave --calibration out, or give it a file of prompts.",
        )

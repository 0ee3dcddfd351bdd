"""Whether this is still the process in which something was made."""

from __future__ import annotations

import os


class OwnProcess:
    """Made where threads, or a GPU's resources, are taken: a fork of the process has neither."""

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is the process that made it, and not a fork of that."""
        return os.getpid() == self._id

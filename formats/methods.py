"""The methods that quantize, by name: each a function from a matrix of values to codes, scales and zero points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from moec.formats.nearest import round_to_nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moec.formats.record import Format
    from moec.formats.rows import Quantized


class Method(Protocol):
    """A way to quantize. It may run in several threads at once, on some rows of a matrix at a time."""

    def __call__(
        self,
        kind: Format,
        matrix: NDArray[np.float32],
        importance: NDArray[np.float32] | None = None,
        /,
    ) -> Quantized:
        """Quantize finite values ``[N, K]``; ``importance`` ``[K]`` is what a squared error of a column counts."""


METHODS: dict[str, Method] = {"nearest": round_to_nearest, "feedback": round_to_nearest}
"""By name: what makes codes of a matrix by itself."""

CALIBRATED = frozenset({"feedback"})
"""Methods that round routed experts by what enters them (`moec.formats.feedback`), and only all else by itself."""

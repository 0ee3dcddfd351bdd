"""Models in plain numpy, written from published descriptions: judges where transformers has no model, or a wrong one.

Nothing here imports moec's compiler or transformers' models. They compute in float64, the whole sequence each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.references.arctic import Arctic
from tests.support.references.grok import Grok

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.references.model import ReferenceModel

REFERENCES: dict[str, Callable[[Path], ReferenceModel]] = {
    "arctic": Arctic,
    "arctic-mixed": Arctic,
    "grok": Grok,
    "grok-1": Grok,
}
"""Name of a tiny model -> its reference, made from the checkpoint's folder."""

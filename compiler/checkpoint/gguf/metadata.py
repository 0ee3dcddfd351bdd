"""The metadata of a GGUF model, read with types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Metadata:
    """Keys and values; those of the architecture are asked for without its prefix."""

    path: Path
    """The file, for messages."""
    values: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """What ``general.architecture`` says.

        Raises:
            CheckpointError: it says nothing.
        """
        return str(self._typed("general.architecture", str, None))

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of the architecture; ``default`` where the file has none.

        Raises:
            CheckpointError: there is none and no default.
            UnsupportedModelError: there is one for each layer.
        """
        return int(self._typed(f"{self.architecture}.{key}", int, default))

    def number(self, key: str, default: float | None = None) -> float:
        """A number of the architecture: the shortest decimal one that is the file's float32."""
        return float(str(np.float32(self._typed(f"{self.architecture}.{key}", (int, float), default))))

    def text(self, key: str, default: str | None = None) -> str:
        """A string of the architecture."""
        return str(self._typed(f"{self.architecture}.{key}", str, default))

    def flag(self, key: str, default: bool) -> bool:
        """A truth value of the architecture."""
        return bool(self._typed(f"{self.architecture}.{key}", (bool, int), default))

    def has(self, key: str) -> bool:
        """Whether the file has this key of the architecture."""
        return f"{self.architecture}.{key}" in self.values

    def _typed(self, key: str, kind: Any, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(
                f"{self.path} does not say its {key}.",
                "A GGUF file of this architecture has this key.",
                "Convert the model again with a current llama.cpp, or use another file.",
            )
        if isinstance(value, list):
            raise UnsupportedModelError(
                f"{self.path} has another {key} for each layer.",
                "The models that moec reads from GGUF have one for all.",
                "Use the checkpoint in transformers' layout.",
            )
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{self.path} has a {key} of the wrong kind: {value!r}."[:300], "", "Download it again."
            )
        return value

"""What moec knows of one GGUF architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moec.compiler.checkpoint.gguf.metadata import Metadata
    from moec.compiler.checkpoint.record import TensorEntry

Heads: TypeAlias = Literal["num_attention_heads", "num_key_value_heads"]

Tensors: TypeAlias = "Mapping[str, TensorEntry]"


@dataclass(frozen=True)
class Place:
    """What a GGUF tensor is in a checkpoint of transformers."""

    names: tuple[str, ...]
    """Several where it is these tensors one below the other. ``{layer}`` and ``{expert}`` stand for numbers; with
    ``{expert}`` the tensor's first dimension is the experts, unless its own name has one."""
    rotated: Heads | None = None
    """The key of the config that says how many heads there are, where the rows of a head are ordered for rotary
    embeddings of neighbouring pairs; transformers rotates its first half with its second."""


def place(*names: str, rotated: Heads | None = None) -> Place:
    """A ``Place`` from names."""
    return Place(names, rotated)


@dataclass(frozen=True)
class GgufArchitecture:
    """How a model of one ``general.architecture`` is read."""

    config: Callable[[Metadata, Tensors], dict[str, Any]]
    """``config.json`` as transformers would have it, but for what all architectures have in common."""
    places: Mapping[str, Place]
    """GGUF's names -> what they are; ``{layer}`` and ``{expert}`` stand for numbers."""
    notes: Callable[[Metadata], tuple[str, ...]] = lambda _: ()
    """What a person should know of the file."""

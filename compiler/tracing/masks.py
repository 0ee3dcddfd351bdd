"""Masks as descriptions: transformers composes mask functions; here they are read, not run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CAUSAL = "causal_mask_function"
BIDIRECTIONAL = "bidirectional_mask_function"
WINDOW = "sliding_window_overlay.<locals>.inner_mask"
CHUNK = "chunked_overlay.<locals>.inner_mask"
AND = "and_masks.<locals>.and_mask"


@dataclass(frozen=True)
class MaskSpec:
    """A causal mask, perhaps narrowed, or none: what is passed through a model instead of a mask tensor."""

    window: int = 0
    """Positions seen, the own one included; 0: all."""
    chunk: int = 0
    """Positions a chunk has; 0: no chunks."""
    causal: bool = True
    """Whether a token sees nothing after itself."""

    def __getitem__(self, _: Any) -> MaskSpec:
        """Of one head or one sequence the description is the same."""
        return self


def describe_mask(mask_function: Callable[..., Any], class_name: str) -> MaskSpec:
    """Read what ``mask_function`` composes.

    Raises:
        UnsupportedModelError: it has a part other than causal, sliding window and chunk, or than bidirectional.
    """
    if mask_function.__qualname__ == BIDIRECTIONAL:
        return MaskSpec(causal=False)
    window, chunk, causal = 0, 0, False
    for part in _parts(mask_function, class_name):
        name = part.__qualname__
        if name == CAUSAL:
            causal = True
        elif name == WINDOW:
            window = int(_captured(part)["sliding_window"])
        elif name == CHUNK and "left_padding" in _captured(part):
            chunk = int(_captured(part)["chunk_size"])
        else:
            raise _unknown(name, class_name)
    if not causal:
        raise _unknown(mask_function.__qualname__, class_name)
    return MaskSpec(window, chunk)


def _parts(function: Callable[..., Any], class_name: str) -> Iterator[Callable[..., Any]]:
    if function.__qualname__ != AND:
        yield function
        return
    for part in _captured(function)["mask_functions"]:
        yield from _parts(part, class_name)


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _unknown(kind: str, class_name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{class_name} uses an attention mask that moec does not know: {kind}",
        "Only causal masks, sliding windows, chunks and no mask at all have attention kernels.",
        "See `moec models` for the types that compile.",
    )

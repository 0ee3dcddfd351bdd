"""``modules/<target>/program.json``: which packed functions of a target's module make up each dense segment.

A program has no control flow: each segment is a list of calls on contiguous tensors, results last, and a reader of the
chain in ``model.json`` needs no more than this to run it. T is the number of tokens of a step.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from moec.artifacts.model import DTYPE_BYTES, DType, ExpertsLayer
from moec.artifacts.words.slots import CACHED

Shape: TypeAlias = tuple[int | str, ...]
"""Extents: an integer, ``"T"``, or n times the tokens of a step, such as ``"16T"``."""

HOPPER = "_sm_90a"
"""Ends the name of a function that takes the place of the one without it on Hopper GPUs (compute capability 9.0)."""

APPEND = "append_"
"""Begins the name of the function of an ``append`` step; the attention's follows."""

Source: TypeAlias = Literal["input", "weight", "output", "local"]


@dataclass(frozen=True)
class LocalSpec:
    """A tensor that lives only while its segment runs."""

    dtype: DType
    shape: Shape


@dataclass(frozen=True)
class Operand:
    """A tensor as one call sees it: views of another shape share the memory of what they are views of."""

    source: Source
    number: int
    """Among the segment's inputs, weights, outputs or locals."""
    dtype: DType
    shape: Shape


@dataclass(frozen=True)
class Call:
    """``function(operands...)``: a packed function of the target's module; what it writes comes last."""

    function: str
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class SegmentProgram:
    """One dense segment: the function of this name in ``model.json``."""

    name: str
    locals: tuple[LocalSpec, ...]
    calls: tuple[Call, ...]
    outputs: tuple[Operand, ...]
    """Where each output lies: in memory of its own (output i itself), or as a view of an input or of an output that
    has."""


@dataclass(frozen=True)
class Workspace:
    """Memory that a function needs beside its tensors: uint8 ``[fixed_bytes + token_bytes * T]``.

    It is an argument before the last one, in every call of the function, and holds nothing between two calls.
    """

    function: str
    fixed_bytes: int
    token_bytes: int

    def at(self, tokens: int) -> int:
        """Its bytes for so many tokens."""
        return self.fixed_bytes + self.token_bytes * tokens


@dataclass(frozen=True)
class Beside:
    """A function that runs routed experts and the side segment in front of them together.

    ``function(hidden, index, weight, table, workspace, operands of the segment's calls..., out)``, for steps of at most
    ``most_tokens``: it does what ``experts_<body>`` and the segment's calls do, whose workspace and locals it uses.
    """

    function: str
    body: str
    segment: str
    most_tokens: int


def cached_beside_name(beside: Beside) -> str:
    """The function that does the same for experts of which some may still be on their way to the GPU.

    Beside ``beside.function``'s arguments it takes the layer's state, before the workspace.
    """
    return f"{CACHED}{beside.body}_{beside.segment}"


@dataclass(frozen=True)
class ProgramRecord:
    """The whole of ``program.json``."""

    segments: tuple[SegmentProgram, ...]
    workspaces: tuple[Workspace, ...]
    beside: tuple[Beside, ...] = ()

    def beside_experts(self, body: str, segment: str) -> Beside | None:
        """The function for experts of ``body`` with ``segment`` in front of them, where there is one."""
        found = (each for each in self.beside if (each.body, each.segment) == (body, segment))
        return next(found, None)


@dataclass(frozen=True)
class Size:
    """Bytes or elements: ``each * T ** power``."""

    each: int
    power: int

    def at(self, tokens: int) -> int:
        """Their number for a step of so many tokens."""
        return self.each * int(tokens**self.power)


def capacity_name(layer: ExpertsLayer) -> str:
    """The function of the ``capacity`` step of an MoE layer."""
    most = str(layer.capacity) if layer.capacity else f"of_{layer.capacity_share.hex()[2:]}"
    return f"capacity_{layer.experts}_{layer.top_k}_{re.sub('[^0-9a-z]', '_', most)}"


def resolve(shape: Shape, tokens: int) -> tuple[int, ...]:
    """``shape`` with T = ``tokens``."""
    return tuple(extent if isinstance(extent, int) else _times(extent) * tokens for extent in shape)


def size_bytes(dtype: str, shape: Shape) -> Size:
    """Bytes of a tensor."""
    each = math.prod(extent if isinstance(extent, int) else _times(extent) for extent in shape)
    return Size(DTYPE_BYTES[dtype] * each, sum(isinstance(extent, str) for extent in shape))


def _times(extent: str) -> int:
    return int(extent[:-1] or "1")

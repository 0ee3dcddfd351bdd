"""What is found in a function: its tensors, how they are computed, and its products."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moec.compiler.lowering.rows.stages import View

if TYPE_CHECKING:
    from moec.compiler.lowering.passes.dispatch_linear import LinearShape
    from moec.compiler.lowering.rows.region import Region
    from moec.compiler.lowering.rows.stages import Item, Key, Tensor

VIEWS = frozenset(f"relax.{name}" for name in ("reshape", "expand_dims", "squeeze", "flatten"))
VECTOR = 8
"""Columns that kernels of products take at a time."""
MOST_ROWS = 8192
"""Of products whose every block computes the region before it: with more there are too many blocks."""
KEPT = (*VIEWS, "relax.topk")
"""Operators that this pass takes as they are, before they are loops."""


def rounded_columns(columns: int) -> int:
    """16-bit numbers of one term of so many columns."""
    return -(-columns // VECTOR) * VECTOR


@dataclass(frozen=True)
class Activation:
    """What the only reader of products computes of them, place by place; the reader is a product itself."""

    region: Region
    source: Key
    """What the reader multiplies."""
    results: tuple[Key, ...]
    """Of the products: what the region reads."""
    columns: int
    """Of the reader, and rows of each of the products."""
    dtype: str
    """Of the reader's weight."""


@dataclass(frozen=True)
class Product:
    """Products that share their input, and what the input is computed from."""

    shapes: tuple[LinearShape, ...]
    region: Region | None
    """What the kernel computes ``source`` from; ``None``: it reads it."""
    source: Key
    keeps: bool = False
    """Whether the region's outputs, the source among them, are results of the kernel."""
    activation: Activation | None = None
    """What the kernel writes instead of its results where tokens are many, rounded for the product that reads it."""
    given: bool = False
    """Whether the rounded input is there where tokens are many: the kernel of an `activation` has written it."""

    @property
    def terms(self) -> int:
        """The most that one of the products takes."""
        return max(shape.terms for shape in self.shapes)

    @property
    def rounded_columns(self) -> int:
        """16-bit numbers of one token's input: all of the first terms, then of the second."""
        return self.terms * rounded_columns(self.shapes[0].columns)


@dataclass
class Barrier:
    """A call that is left as it is: a product, or an operator without rows."""

    variable: Any
    call: Any
    operands: list[Key]
    results: list[Item]
    level: int
    shape: LinearShape | None
    """Of a product."""


@dataclass
class Group:
    """Products of one level that share their input."""

    barriers: list[Barrier]
    fused: bool = False
    """Whether the input is computed by the kernel itself, from what lies before it."""
    reader: Group | None = None
    """The group whose input is computed from this one's results, place by place, and which alone reads them."""

    @property
    def source(self) -> Key:
        """The input."""
        return self.barriers[0].operands[0]


@dataclass
class Reading:
    """A function, read."""

    inputs: dict[Key, Any] = field(default_factory=dict)
    """Its parameters: what is in memory from the beginning."""
    results: list[Key] = field(default_factory=list)
    weights: frozenset[Key] = frozenset()
    names: dict[Any, Any] = field(default_factory=dict)
    """Relax variable to key, or tuple of keys."""
    tensors: dict[Key, Tensor] = field(default_factory=dict)
    types: dict[Key, Any] = field(default_factory=dict)
    definitions: dict[Key, Any] = field(default_factory=dict)
    levels: dict[Key, int] = field(default_factory=dict)
    barriers: list[Barrier] = field(default_factory=list)
    aliases: dict[Key, Key] = field(default_factory=dict)
    """Views with a shape that is no row: only their memory can be looked at in another shape."""

    def root(self, key: Key) -> Key:
        """The tensor whose memory ``key`` looks at."""
        while True:
            definition = self.definitions.get(key)
            if key in self.aliases:
                key = self.aliases[key]
            elif isinstance(definition, View):
                key = definition.source
            else:
                return key

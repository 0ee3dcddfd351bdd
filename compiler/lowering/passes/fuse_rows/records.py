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
MOST_ROWS_BEHIND = 1024
"""Of products with a region behind them: so many are few blocks, and the last of them computes it."""
MOST_VALUES_BEHIND = 4096
"""Of a tensor of such a region: one block computes all of it."""
KEPT = (*VIEWS, "relax.topk")
"""Operators that this pass takes as they are, before they are loops."""


@dataclass(frozen=True)
class Behind:
    """What the first products of a kernel are for: a region that reads their results, as routers choose experts."""

    region: Region
    results: tuple[Key, ...]
    """Of the products that it reads, in their order: the kernel's first ones."""

    @property
    def inputs(self) -> tuple[Key, ...]:
        """What the region reads beside these."""
        return tuple(key for key in self.region.inputs if key not in self.results)


@dataclass(frozen=True)
class Product:
    """Products that share their input, and what the input is computed from."""

    shapes: tuple[LinearShape, ...]
    region: Region | None
    """What the kernel computes ``source`` from; ``None``: it reads it."""
    source: Key
    keeps: bool = False
    """Whether the region's outputs, the source among them, are results of the kernel."""
    behind: Behind | None = None
    """Only where the kernel keeps the region before it."""
    beside: Product | None = None
    """Products of the same input with weights of another type, which read what the kernel keeps."""

    @property
    def terms(self) -> int:
        """The most that one of the products takes."""
        return max(shape.terms for shape in self.shapes)

    @property
    def read_behind(self) -> tuple[Key, ...]:
        """What the region behind reads that is neither made by the kernel nor read by it anyway."""
        if self.behind is None or self.region is None:
            return ()
        known = {*self.region.inputs, *self.region.outputs}
        return tuple(key for key in self.behind.inputs if key not in known)

    @property
    def rounded_columns(self) -> int:
        """16-bit numbers of one token's input: all of the first terms, then of the second."""
        return self.terms * (-(-self.shapes[0].columns // VECTOR) * VECTOR)


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

    @property
    def source(self) -> Key:
        """The input."""
        return self.barriers[0].operands[0]

    @property
    def shapes(self) -> tuple[LinearShape, ...]:
        """Of its products."""
        return tuple(barrier.shape for barrier in self.barriers if barrier.shape is not None)

    def begin_with(self, results: tuple[Key, ...]) -> None:
        """Put the products that make ``results`` first."""
        self.barriers.sort(key=lambda barrier: barrier.results[0] not in results)


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

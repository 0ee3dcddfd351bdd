"""What is found in a function: its tensors, how they are computed, and its products."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moec.compiler.kernels.rows.region import sources
from moec.compiler.kernels.rows.stages import View

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from moec.compiler.kernels.linear_shape import LinearShape
    from moec.compiler.kernels.rows.product import Activation
    from moec.compiler.kernels.rows.stages import Item, Key, Tensor

VIEWS = frozenset(f"relax.{name}" for name in ("reshape", "expand_dims", "squeeze", "flatten"))
MOST_ROWS = 8192
"""Of products whose every block computes the region before it: with more there are too many blocks."""
MOST_ROWS_BEHIND = 1024
"""Of products with a region behind them: so many are few blocks, and the last of them computes it."""
MOST_VALUES_BEHIND = 4096
"""Of a tensor of such a region: one block computes all of it."""
KEPT = (*VIEWS, "relax.topk")
"""Operators that this pass takes as they are, before they are loops."""


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


@dataclass(frozen=True)
class Beyond:
    """What the only reader of results, a group of another function, computes of them."""

    activation: Activation
    """Its tensors are those of the other function; its ``places`` are not known yet."""
    results: tuple[Key, ...]
    """In this function, in the order of the activation's."""


@dataclass
class Group:
    """Products of one level that share their input."""

    barriers: list[Barrier]
    fused: bool = False
    """Whether the input is computed by the kernel itself, from what lies before it."""
    reader: Group | None = None
    """The group whose input is computed from this one's results, place by place, and which alone reads them."""
    beyond: Beyond | None = None
    """Such a reader in another function."""
    held: Key | None = None
    """The input that holds what another function's kernel has made of it for this group where tokens are many."""

    @property
    def source(self) -> Key:
        """The input."""
        return self.barriers[0].operands[0]

    @property
    def shapes(self) -> tuple[LinearShape, ...]:
        """Of its products."""
        return tuple(barrier.shape for barrier in self.barriers if barrier.shape is not None)

    @property
    def rows(self) -> int:
        """Of all its products."""
        return sum(shape.rows for shape in self.shapes)

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

    def read_elsewhere(self, roots: Container[Key], readers: Container[Barrier]) -> bool:
        """Whether another than ``readers`` reads one of these tensors, or the caller does."""
        others = (key for barrier in self.barriers if barrier not in readers for key in barrier.operands)
        return any(self.root(key) in roots for key in (*others, *self.results))

    def only_multiplied(self, root: Key, groups: Iterable[Group]) -> bool:
        """Whether nobody but products of these groups reads a tensor."""
        own = [barrier for group in groups for barrier in group.barriers]
        return not self.read_by_stages({root}) and not self.read_elsewhere({root}, own)

    def read_by_stages(self, roots: Container[Key]) -> bool:
        """Whether one of these tensors is read between operators, and not only looked at in another shape."""
        stages = (each for each in self.definitions.values() if not isinstance(each, View))
        return any(self.root(key) in roots for each in stages for key in sources(each))

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

"""Products of a segment as one kernel computes them, together with the rows that lie before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.compiler.kernels.linear_shape import padded

if TYPE_CHECKING:
    from moec.compiler.kernels.linear_shape import LinearShape
    from moec.compiler.kernels.rows.region import Region
    from moec.compiler.kernels.rows.stages import Key


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
class Activation:
    """What the only reader of products computes of them, place by place; the reader is a product itself."""

    region: Region
    source: Key
    """What the reader multiplies."""
    results: tuple[Key, ...]
    """Of the products: what the region reads."""
    places: tuple[int, ...]
    """Of these products among those of the kernel."""
    reader: LinearShape
    """It has as many columns as each of the products has rows."""
    beyond: bool = False
    """Whether the reader is another segment's: what is written for it lies in the memory of the first result."""

    @property
    def rounded_columns(self) -> int:
        """16-bit numbers of one token's input of the reader."""
        return self.reader.terms * padded(self.reader.columns)


@dataclass(frozen=True)
class Product:
    """Products that share their input, and what the input is computed from."""

    shapes: tuple[LinearShape, ...]
    region: Region | None
    """What the kernel computes ``source`` from; ``None``: it reads it."""
    source: Key
    keeps: bool = False
    """Whether the region's outputs, the source among them, are results of the kernel."""
    alone: bool = False
    """Whether nobody but the kernel's products reads the source: where tokens are many it is kept rounded only."""
    behind: Behind | None = None
    """Only where the kernel keeps the region before it."""
    beside: Product | None = None
    """Products of the same input with weights of another type, which read what the kernel keeps."""
    activation: Activation | None = None
    """What the kernel writes instead of some results where tokens are many, rounded for the product that reads it."""
    given: bool = False
    """Whether the rounded input is there where tokens are many: the kernel of an `activation` has written it."""
    held: Key | None = None
    """What the region reads whose memory has the rounded input instead where tokens are many, written so by the kernel
    of an `activation` whose reader this is from `Activation.beyond` it."""

    @property
    def terms(self) -> int:
        """The most that one of the products takes."""
        return max(shape.terms for shape in self.shapes)

    @property
    def reads(self) -> tuple[Key, ...]:
        """What the kernel computes its input from, or the input; then what is read behind and not there anyway."""
        if self.region is None:
            return (self.source,)
        known = {*self.region.inputs, *self.region.outputs}
        behind = () if self.behind is None else self.behind.inputs
        return (*self.region.inputs, *(key for key in behind if key not in known))

    @property
    def kept(self) -> tuple[Key, ...]:
        """What the kernel keeps of the regions before and behind its products."""
        if self.region is None or not self.keeps:
            return ()
        return (*self.region.outputs, *(self.behind.region.outputs if self.behind else ()))

    @property
    def has_rounded(self) -> bool:
        """Whether the rounded input has memory of its own."""
        return self.shapes[0].dtype != "float32" and self.held is None

    @property
    def has_activated(self) -> bool:
        """Whether what the kernel writes for the reader of results has memory of its own."""
        return self.activation is not None and not self.activation.beyond

    @property
    def rounded_columns(self) -> int:
        """16-bit numbers of one token's input: all of the first terms, then of the second."""
        return self.terms * padded(self.shapes[0].columns)

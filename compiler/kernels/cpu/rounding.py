"""Activations rounded to 16 bits, with a scale for each group of the weights' columns.

The scale is the power of two with which a group's largest magnitude takes all bits: rounding moves a value by at most
2^-15 of that, and numbers that came from bfloat16 not at all, down to 2^-7 of it. It is 2^-100 at least, also of a
group of zeros: times any float16 that is no subnormal number, which Intel's processors are slow with. What is no
finite number makes its group's scale NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.dot import add_lanes, add_vectors, filled_up, fold_lanes
from moec.compiler.kernels.cpu.packed_codes import HALF_BLOCK, as_float
from moec.compiler.kernels.cpu.short_codes import Steps, has_offsets, steps_of
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    div,
    either,
    i64,
    keep,
    load,
    loop,
    mod,
    scratch,
    splat,
    store,
)
from moec.formats import format_of
from moec.formats.rows import BLOCK, row_layout

if TYPE_CHECKING:
    from moec.compiler.kernels.cpu.machine import Machine
    from moec.formats.record import Format

BITS = 14
"""The largest magnitude's highest bit is worth 2^14."""
MOST = 32767.0
SERIAL_VECTORS = 32
"""That are not worth waking other threads for."""
LEAST_EXPONENT = -100
"""Of a scale, which is a power of two."""
_EXPONENT, _NAN = 0x7F800000, 0x7FC00000
_LEAST_BITS = 127 + LEAST_EXPONENT + BITS << 23
"""Of the largest magnitude that has the least scale."""
_ROUNDER = 1.5 * 2.0**23
"""Added to a float32 of less than 2^22, its last bit is worth one; its own bits are those below."""
_ROUNDER_BITS = 0x4B400000


@dataclass(frozen=True)
class GroupVectors:
    """How vectors of G numbers, one for each group of a row, are gone over: the last moves up so as to stay inside."""

    groups: int
    lanes: int

    @property
    def whole(self) -> int:
        """Vectors that hold what no other does."""
        return self.groups // self.lanes

    @property
    def again(self) -> int:
        """Numbers that the last vector has a second time."""
        return -self.groups % self.lanes


def group_vectors(kind: Format, depth: int, machine: Machine) -> GroupVectors:
    """Of a row's groups."""
    groups = row_layout(kind, depth).groups
    return GroupVectors(groups, min(machine.lanes, 1 << (groups.bit_length() - 1)))


@dataclass(frozen=True)
class Rounded:
    """V vectors: the value of an element is its code times its group's scale."""

    steps: Steps
    codes: Buffer
    """int16 ``[V, padded]``, in the order in which codes of weights meet them (``steps``); zeros beyond the columns."""
    scales: Buffer
    """``[V, G]``."""
    sums: Buffer | None
    """``[V, G + again]``: of the values of each group, for weights with zero points or minima. Before those of the last
    of ``GroupVectors`` there are zeros for what it has again."""


def round_vectors(
    name: str,
    depth: int,
    machine: Machine,
    vectors: Buffer,
    count: Expr,
    *,
    first: Expr | int = 0,
    together: bool = False,
) -> Rounded | None:
    """Emit the rounding of ``count`` float32 vectors for products with weights of a format.

    Args:
        name: of the format, or of a plain type.
        depth: elements of a vector.
        machine: the processor.
        vectors: ``[first + count, depth]``.
        count: int64.
        first: element of the first of them.
        together: whether other threads of the pool may help.

    Returns:
        The rounded vectors, in the workspace of this scope; None where such products take float32.
    """
    kind = format_of(name)
    steps = None if kind is None else steps_of(kind, machine)
    if kind is None or steps is None:
        return None
    rounding = _Rounding(kind, depth, machine, steps, vectors, i64(first), count)
    if together:
        either(count <= i64(SERIAL_VECTORS), rounding.emit, lambda: rounding.emit(parallel=True))
    else:
        rounding.emit()
    return rounding.target


class _Rounding:
    """The rounding of vectors of one length while it is emitted."""

    def __init__(
        self,
        kind: Format,
        depth: int,
        machine: Machine,
        steps: Steps,
        vectors: Buffer,
        first: Expr,
        count: Expr,
    ) -> None:
        self.kind, self.depth, self.lanes, self.steps = kind, depth, machine.lanes, steps
        self.source, self.first, self.count = vectors, first, count
        self.layout = row_layout(kind, depth)
        self.chunks = group_vectors(kind, depth, machine)
        self.stride = self.chunks.groups + self.chunks.again
        self.target = Rounded(
            steps,
            scratch(count * i64(self.layout.padded), "int16"),
            scratch(count * i64(self.layout.groups)),
            scratch(count * i64(self.stride)) if has_offsets(kind) else None,
        )

    def emit(self, *, parallel: bool = False) -> None:
        with loop(self.count, parallel=parallel) as number:
            self._vector(number)

    def _vector(self, number: Expr) -> None:
        group = self.kind.group
        if self.target.sums is not None:
            with loop(self.chunks.again) as place:
                gap = i64(self.chunks.whole * self.chunks.lanes)
                store(self.target.sums, number * i64(self.stride) + gap + place, splat(0.0, 1))
        blocks = self.layout.padded // BLOCK
        paired = blocks // 2 * 2 if self.steps.paired else blocks
        whole = min(self.depth // group, paired * BLOCK // group)
        with loop(whole) as place:
            first = keep(place * i64(group))
            begin = keep(self.first + number * i64(self.depth) + first)
            values = [load(self.source, begin + i64(k), self.lanes) for k in range(0, group, self.lanes)]
            self._group(number, place, values, paired)
        if whole < self.layout.groups:
            self._group(number, i64(whole), self._rest(number, whole * group), paired)

    def _rest(self, number: Expr, first: int) -> list[Expr]:
        """The elements from ``first`` on, filled up with zeros."""
        start = self.first + number * i64(self.depth) + i64(first)
        return filled_up(self.source, start, self.depth - first, self.layout.padded - first, self.lanes)

    def _group(self, number: Expr, group: Expr, values: list[Expr], paired: int) -> None:
        lanes = self.lanes
        values = [keep(value) for value in values]
        largest = T.reinterpret("int32", _largest_bits(values, lanes))
        scale, single = scale_of(largest, 1)
        inverse = keep(splat(single, lanes))
        store(self.target.scales, number * i64(self.layout.groups) + group, scale)
        rounded = []
        for vector, value in enumerate(values):
            code = keep(round_to_codes(value, inverse, lanes))
            place = number * i64(self.layout.padded) + self._place(group, vector * lanes, paired)
            store(self.target.codes, place, T.cast(code, f"int16x{lanes}"), lanes)
            rounded.append(as_float(code, lanes))
        if self.target.sums is not None:
            whole = i64(self.chunks.whole * self.chunks.lanes)
            place = group + T.Select(group >= whole, i64(self.chunks.again), i64(0))
            total = add_lanes(add_vectors(rounded), lanes)
            store(self.target.sums, number * i64(self.stride) + place, total * scale)

    def _place(self, group: Expr, column: int, paired: int) -> Expr:
        """Where the codes from a column of a group on lie."""
        block = group * i64(self.kind.group // BLOCK) + i64(column // BLOCK)
        half, within = divmod(column % BLOCK, HALF_BLOCK)
        if not self.steps.paired:
            return block * i64(BLOCK) + i64(column % BLOCK)
        pair = div(block, 2) * i64(2 * BLOCK)
        together = mod(block, 2) * i64(HALF_BLOCK) + i64(half * BLOCK + within)
        alone = i64(column % BLOCK)
        return pair + T.Select(block < i64(paired), together, alone)


def scale_of(largest: Expr, lanes: int) -> tuple[Expr, Expr]:
    """A group's scale and its inverse, by its largest magnitude as the bits (int32) of a float32; in vectors."""

    def constant(value: int) -> Expr:
        return T.uint32(value) if lanes == 1 else T.Broadcast(T.uint32(value), lanes)

    def number(bits: Expr) -> Expr:
        return keep(T.reinterpret("float32" if lanes == 1 else f"float32x{lanes}", bits))

    bits = T.reinterpret("uint32" if lanes == 1 else f"uint32x{lanes}", largest)
    exponent = keep(T.max(bits & constant(_EXPONENT), constant(_LEAST_BITS)))
    finite = exponent - constant(BITS << 23)
    scale = number(T.Select(exponent == constant(_EXPONENT), constant(_NAN), finite))
    return scale, number(constant(254 + BITS << 23) - exponent)


def round_to_codes(value: Expr, inverse: Expr, lanes: int) -> Expr:
    """Codes of a vector of values, int32."""
    scaled, most = keep(value * inverse), splat(MOST, lanes)
    moved = T.Select(scaled < most, scaled, most) + splat(_ROUNDER, lanes)
    return T.reinterpret(f"int32x{lanes}", moved) - T.Broadcast(T.int32(_ROUNDER_BITS), lanes)


def _largest_bits(values: list[Expr], lanes: int) -> Expr:
    """The largest magnitude, as a float32 whose bits are compared: infinity is above all numbers, NaN above it."""

    def larger(a: Expr, b: Expr) -> Expr:
        suffix = str(a.ty.dtype).removeprefix("float32")
        bits = [T.reinterpret(f"int32{suffix}", value) for value in (a, b)]
        return T.reinterpret(f"float32{suffix}", T.max(*bits))

    mask = T.Broadcast(T.int32(0x7FFFFFFF), lanes)
    largest = T.reinterpret(f"int32x{lanes}", values[0]) & mask
    for value in values[1:]:
        largest = T.max(largest, T.reinterpret(f"int32x{lanes}", value) & mask)
    return fold_lanes(T.reinterpret(f"float32x{lanes}", largest), lanes, larger)

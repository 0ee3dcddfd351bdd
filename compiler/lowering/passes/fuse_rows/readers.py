"""Finds products that only one other product reads, through operators that take every place for itself.

That is what a gated network is: ``down(act(gate x) * up x)``. The sums of both products of one place are in one thread
where their rows take turns in a tile, so the kernel of the first can write what the second one multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moec.compiler.kernels.rows.product import Activation
from moec.compiler.kernels.rows.region import build_region, loads, sources
from moec.compiler.kernels.rows.stages import Stage, View
from moec.compiler.lowering.passes.fuse_rows.records import Beyond

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moec.compiler.kernels.rows.stages import Key
    from moec.compiler.lowering.passes.fuse_rows.records import Group, Reading

MOST_PRODUCTS = 2
FLOAT_BYTES, ROUNDED_BYTES = 4, 2


def find_readers(read: Reading, groups: list[Group]) -> None:
    """Tell each group of its reader where there is one."""
    by_result = {key: group for group in groups for barrier in group.barriers for key in barrier.results}
    for reader in groups:
        if not reader.fused:
            continue
        path = _path(read, reader.source)
        if path is None:
            continue
        first = by_result.get(next(iter(path.results)))
        if first is None or first.barriers[0].level + 1 != reader.barriers[0].level:
            continue
        if _fits(first, reader, path.results) and _alone(read, path, reader):
            first.reader = reader


def find_readers_beyond(
    first: tuple[Reading, list[Group]], reader: tuple[Reading, list[Group]], passed: Mapping[Key, Key]
) -> None:
    """Tell groups of one function of readers in another one, and these of what they get.

    Args:
        first: a function and its groups.
        reader: the other one, which alone reads what is passed to it.
        passed: by the other's input the result of the first.
    """
    (read, groups), (own, others) = first, reader
    by_result = {key: group for group in groups for barrier in group.barriers for key in barrier.results}
    for group in others:
        path = _path(own, group.source) if group.fused else None
        if path is None or not all(key in passed for key in path.results) or not _alone(own, path, group):
            continue
        made = {read.root(passed[key]): key for key in path.results}
        maker = by_result.get(next(iter(made)))
        if maker is None or len(made) != len(path.results) or not _fits(maker, group, dict.fromkeys(made)):
            continue
        results = tuple(barrier.results[0] for barrier in maker.barriers if barrier.results[0] in made)
        keys = tuple(made[result] for result in results)
        region = build_region(own.definitions, own.tensors, [group.source], own.weights)
        activation = Activation(region, group.source, keys, (), group.shapes[0], beyond=True)
        fits = FLOAT_BYTES * group.shapes[0].columns >= ROUNDED_BYTES * activation.rounded_columns
        if fits and maker.beyond is None and not _read_inside(read, set(made)):
            maker.beyond, group.held = Beyond(activation, results), keys[0]


@dataclass
class _Path:
    between: set[Key] = field(default_factory=set)
    results: dict[Key, None] = field(default_factory=dict)


def _path(read: Reading, source: Key) -> _Path | None:
    """What lies between products and ``source``; ``None`` where an operator looks at another place than its own."""
    path, waiting = _Path(), [source]
    while waiting:
        key = waiting.pop()
        definition = read.definitions.get(key)
        if definition is None:
            path.results[key] = None
        elif isinstance(definition, View) or (isinstance(definition, Stage) and _in_place(read, definition)):
            if key not in path.between:
                path.between.add(key)
                waiting += sources(definition)
        else:
            return None
    return path if path.results else None


def _in_place(read: Reading, stage: Stage) -> bool:
    if stage.reduction is not None:
        return False
    for element in loads(stage.value):
        shape = read.tensors[stage.sources[element.source]].shape
        if not shape:
            continue
        if shape != stage.tensor.shape:
            return False
        for extent, index, axis in zip(shape, element.indices, stage.axes, strict=True):
            if extent != 1 and not index.same_as(axis):
                return False
    return True


def _fits(first: Group, reader: Group, results: dict[Key, None]) -> bool:
    read = [barrier for barrier in first.barriers if barrier.results[0] in results]
    shape = reader.shapes[0]
    if len(read) != len(results) or len(read) > MOST_PRODUCTS or len(reader.barriers) != 1:
        return False
    fits = shape.batch is None and shape.on_tensor_cores
    for own in (barrier.shape for barrier in read):
        assert own is not None
        fits &= own.rows == shape.columns and own.batch is None and own.on_tensor_cores
    return fits


def _read_inside(read: Reading, results: set[Key]) -> bool:
    """Whether any of the results of products is read in their own function, or is more than one of its results."""
    operands = (key for barrier in read.barriers for key in barrier.operands)
    inside = read.read_by_stages(results) or any(read.root(key) in results for key in operands)
    given = [root for root in map(read.root, read.results) if root in results]
    return inside or len(given) != len(results)


def _alone(read: Reading, path: _Path, reader: Group) -> bool:
    """Whether nobody else reads the products."""
    results = set(path.results)
    return not read.read_elsewhere(results, reader.barriers) and not any(
        results.intersection(map(read.root, sources(definition)))
        for key, definition in read.definitions.items()
        if key not in path.between
    )

"""Finds products that only one other product reads, through operators that take every place for itself.

That is what a gated network is: ``down(act(gate x) * up x)``. The sums of both products of one place are in one thread
where their rows take turns in a tile, so the kernel of the first can write what the second one multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moec.compiler.kernels.rows.region import loads, sources
from moec.compiler.kernels.rows.stages import Stage, View

if TYPE_CHECKING:
    from moec.compiler.kernels.rows.stages import Key
    from moec.compiler.lowering.passes.fuse_rows.records import Group, Reading

MOST_PRODUCTS = 2


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
        if first is not None and _fits(first, reader, path.results) and _alone(read, path, reader):
            first.reader = reader


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
    return fits and reader.barriers[0].level == first.barriers[0].level + 1


def _alone(read: Reading, path: _Path, reader: Group) -> bool:
    """Whether nobody else reads the products."""
    results = set(path.results)
    return not read.read_elsewhere(results, reader.barriers) and not any(
        results.intersection(map(read.root, sources(definition)))
        for key, definition in read.definitions.items()
        if key not in path.between
    )

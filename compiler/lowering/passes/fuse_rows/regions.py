"""Decides which operators go together: products that share their input, and what lies before each level of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moec.compiler.kernels.rows.product import Behind
from moec.compiler.kernels.rows.region import Region, for_every_block, is_costly, must_be_stored, sources
from moec.compiler.lowering.passes.fuse_rows.readers import find_readers
from moec.compiler.lowering.passes.fuse_rows.records import (
    MOST_ROWS,
    MOST_ROWS_BEHIND,
    MOST_VALUES_BEHIND,
    Group,
    Reading,
)

if TYPE_CHECKING:
    from collections.abc import Container

    from moec.compiler.kernels.rows.stages import Key


class Regions:
    """Of one function. Nothing is changed but what `groups` says of each group."""

    def __init__(self, read: Reading) -> None:
        self.read = read

    def groups(self) -> list[Group]:
        """Products by what they share; a product of a batch is a group of its own."""
        found: dict[Any, Group] = {}
        for number, barrier in enumerate(self.read.barriers):
            shape = barrier.shape
            if shape is None:
                continue
            alike = (self.read.root(barrier.operands[0]), barrier.level, shape.columns, shape.dtype)
            key = alike if shape.batch is None else number
            found.setdefault(key, Group([])).barriers.append(barrier)
        groups = list(found.values())
        for group in groups:
            group.fused = self._can_fuse(group)
        find_readers(self.read, groups)
        return groups

    def _can_fuse(self, group: Group) -> bool:
        """Whether nobody else wants the group's input, and each of its elements stands for itself."""
        shape, root = group.barriers[0].shape, self.read.root(group.source)
        assert shape is not None
        if not shape.on_tensor_cores or root not in self.read.definitions:
            return False
        if self.read.read_elsewhere({root}, group.barriers) or group.source not in self.read.tensors:
            return False
        return self._stands_alone(root, group.barriers[0].level)

    def _stands_alone(self, key: Key, level: int) -> bool:
        definition = self.read.definitions.get(key)
        if definition is None or self._kept_earlier(key, level):
            return True
        if must_be_stored(definition):
            return False
        return all(self._stands_alone(source, level) for source in sources(definition))

    def needed(self, groups: list[Group]) -> dict[int, dict[Key, None]]:
        """By level, what regions must put into memory: for barriers, for the result, for later regions."""
        needed: dict[int, dict[Key, None]] = {}

        def need(key: Key) -> None:
            root = self.read.root(key)
            if root in self.read.definitions:
                needed.setdefault(self.read.levels[root], {})[root] = None

        fused = [group for group in groups if group.fused]
        computed = {id(barrier) for group in fused for barrier in group.barriers}
        for barrier in self.read.barriers:
            for key in barrier.operands[1 if id(barrier) in computed else 0 :]:
                need(key)
        for group in fused:
            for earlier in self._read_from_earlier(self.read.root(group.source), group.barriers[0].level):
                need(earlier)
        self._need_results(needed)
        for level in range(max(needed, default=0), -1, -1):
            for key in list(needed.get(level, ())):
                for earlier in self._read_from_earlier(key, self.read.levels[key]):
                    need(earlier)
        return _once(needed)

    def _need_results(self, needed: dict[int, dict[Key, None]]) -> None:
        """What only the caller wants waits for the next region that there is anyway, or for the last one."""
        roots = [self.read.root(key) for key in self.read.results]
        levels = sorted({*needed, max((self.read.levels[root] for root in roots), default=0)})
        for root in roots:
            if root in self.read.definitions:
                level = next(level for level in levels if level >= self.read.levels[root])
                needed.setdefault(level, {})[root] = None

    def _read_from_earlier(self, key: Key, level: int) -> list[Key]:
        """What a region of ``level`` reads that an earlier one has to keep."""
        found: dict[Key, None] = {}
        seen: set[Key] = set()

        def visit(key: Key) -> None:
            if key in seen or key not in self.read.definitions:
                return
            seen.add(key)
            if self._kept_earlier(key, level):
                found[key] = None
                return
            for source in sources(self.read.definitions[key]):
                visit(source)

        visit(key)
        return list(found)

    def _kept_earlier(self, key: Key, level: int) -> bool:
        definition = self.read.definitions[key]
        return self.read.levels[key] < level and (must_be_stored(definition) or is_costly(definition))

    def keeper(self, groups: list[Group], region: Region) -> tuple[Group, Region] | None:
        """Products that can compute the region before them, and what they compute."""
        for group in groups:
            shape, source = group.barriers[0].shape, self.read.root(group.source)
            assert shape is not None
            fast = shape.on_tensor_cores and shape.batch is None and group.rows <= MOST_ROWS
            if not fast or group.fused or source not in region.outputs:
                continue
            if math.prod(region.tensors[source].row) != shape.columns:
                continue
            whole = for_every_block(region, source)
            if whole is not None:
                return group, whole
        return None

    def beside(self, group: Group, others: list[Group]) -> Group | None:
        """Products with weights of another type that can be made with a group which keeps what both read."""
        source = self.read.root(group.source)
        for other in others:
            shape = other.barriers[0].shape
            assert shape is not None
            fast = shape.on_tensor_cores and shape.batch is None
            alike = self.read.root(other.source) == source and not other.fused
            if other is not group and fast and alike and group.rows + other.rows <= MOST_ROWS:
                return other
        return None


def behind_of(group: Group, region: Region, memory: Container[Key]) -> Behind | None:
    """``region`` as what is behind a group's products, where few of their rows are all that it waits for.

    Args:
        group: products that keep the region before them.
        region: of the next level.
        memory: what is in memory before the products' results are.
    """
    made = [barrier for barrier in group.barriers if barrier.results[0] in region.inputs]
    rows = sum(barrier.shape.rows for barrier in made if barrier.shape)
    results = tuple(barrier.results[0] for barrier in made)
    waits = [key for key in region.inputs if key not in results and key not in memory]
    largest = max(math.prod(region.tensors[key].row) for key in region.order)
    if not made or waits or rows > MOST_ROWS_BEHIND or largest > MOST_VALUES_BEHIND:
        return None
    return Behind(region, results)


def _once(needed: dict[int, dict[Key, None]]) -> dict[int, dict[Key, None]]:
    """Each key where it is needed first: a result that waited for a later region may be read before that."""
    known: set[Key] = set()
    first: dict[int, dict[Key, None]] = {}
    for level in sorted(needed):
        keys = [key for key in needed[level] if key not in known]
        known.update(keys)
        if keys:
            first[level] = dict.fromkeys(keys)
    return first

"""Regions: what one kernel computes for each token, and which of it must be in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import tvm
from tvm.ir.prim import expr as prim

from moec.compiler.kernels.rows.stages import Key, Stage, Tensor, TopK, View

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

Definition = Stage | View | TopK

COSTLY = frozenset(("exp", "tanh", "erf", "sigmoid", "sqrt", "rsqrt", "pow", "cos", "sin", "log"))
"""Intrinsics that are not computed twice without need."""
SHARED_BYTES = 40 << 10
"""Of shared memory that a region's rows may take."""
FLOATS = ("float32", "float16", "bfloat16")
WEIGHT_BYTES = 16 << 10
"""Of a weight, as float32, that is read to shared memory ahead of use."""
EVERY_BLOCK_BYTES = 40 << 10
"""Of shared memory where every block of another kernel computes a region."""


@dataclass(frozen=True)
class Region:
    """What one kernel makes of one token's rows."""

    definitions: Mapping[Key, Definition]
    """Everything that may be computed here."""
    tensors: Mapping[Key, Tensor]
    inputs: tuple[Key, ...]
    """Tensors that are read from global memory."""
    outputs: tuple[Key, ...]
    """Tensors that are written to global memory."""
    order: tuple[Key, ...]
    """What is put into memory, global or shared, one after the other."""
    shared: frozenset[Key]
    """Those of them that are kept in shared memory."""
    preloaded: tuple[Key, ...] = ()
    """Small weights among the inputs, which can be read before the tokens' rows are there."""

    @property
    def shared_bytes(self) -> int:
        """What is kept in shared memory, small weights among it."""
        return sum(4 * math.prod(self.tensors[key].row) for key in (*self.shared, *self.preloaded))


def sources(definition: Definition) -> list[Key]:
    """The tensors that a definition reads."""
    if isinstance(definition, Stage):
        found: dict[Key, None] = {}
        for load in loads(definition.value):
            found[definition.sources[load.source]] = None
        return list(found)
    return [definition.source]


def loads(value: Any) -> Iterable[Any]:
    """Every load in an expression."""
    return [node for node in nodes(value) if isinstance(node, tvm.ir.expr.TensorLoad)]


def nodes(value: Any) -> Iterable[Any]:
    """An expression and everything below it."""
    yield value
    if isinstance(value, tvm.ir.expr.TensorLoad):
        children = list(value.indices)
    elif isinstance(value, tvm.ir.Call):
        children = list(value.args)
    elif isinstance(value, prim.Cast):
        children = [value.value]
    elif isinstance(value, prim.Select):
        children = [value.condition, value.true_value, value.false_value]
    else:
        children = [getattr(value, name) for name in ("a", "b") if hasattr(value, name)]
    for child in children:
        yield from nodes(child)


def is_costly(definition: Definition) -> bool:
    """Whether computing an element twice is to be avoided."""
    if not isinstance(definition, Stage):
        return False
    return any(
        (isinstance(node, tvm.ir.Call) and str(node.op.name).rpartition(".")[2] in COSTLY)
        or isinstance(node, prim.Div)
        for node in nodes(definition.value)
    )


def must_be_stored(definition: Definition) -> bool:
    """Whether others can only read it from memory."""
    return isinstance(definition, TopK) or (
        isinstance(definition, Stage) and definition.reduction is not None
    )


def build_region(
    definitions: Mapping[Key, Definition],
    tensors: Mapping[Key, Tensor],
    outputs: Iterable[Key],
    weights: Container[Key] = (),
) -> Region:
    """The region that makes ``outputs``; what ``definitions`` does not have is an input, or one of ``weights``."""
    order: dict[Key, None] = {}
    inputs: dict[Key, None] = {}
    users: dict[Key, set[Key]] = {}
    chosen = tuple(dict.fromkeys(outputs))
    assert all(key in definitions for key in chosen), "what is in memory already is no output"

    def visit(key: Key) -> None:
        if key not in definitions:
            inputs[key] = None
            return
        if key in order:
            return
        for source in sources(definitions[key]):
            users.setdefault(source, set()).add(key)
            visit(source)
        order[key] = None

    for key in chosen:
        visit(key)
    stored = [
        key
        for key in order
        if key in chosen or _worth_storing(definitions[key], tensors[key], users.get(key, set()), definitions)
    ]
    stored = _without_second_keys(stored, definitions)
    shared = _shared(stored, chosen, definitions, tensors, users)
    spilled = tuple(key for key in stored if key not in shared and key not in chosen)
    small = tuple(key for key in inputs if key in weights and _is_small(tensors[key]))
    return Region(definitions, tensors, tuple(inputs), (*chosen, *spilled), tuple(stored), shared, small)


def sections(region: Region) -> tuple[Region, ...]:
    """Parts of ``region`` that share nothing which is put into memory: different blocks can compute them."""
    owner = {key: key for key in region.order}
    for definition in map(region.definitions.get, region.order):
        if isinstance(definition, TopK):
            owner |= dict.fromkeys(definition.keys, definition.key)

    def find(key: Key) -> Key:
        while owner[key] != key:
            key = owner[key]
        return key

    for key in region.order:
        for source in _stored_sources(region, key, owner):
            owner[find(source)] = find(key)
    groups: dict[Key, list[Key]] = {}
    for key in region.order:
        groups.setdefault(find(key), []).append(key)
    return tuple(_section(region, tuple(keys)) for keys in groups.values())


def _section(region: Region, order: tuple[Key, ...]) -> Region:
    read = {source for key in order for source in _stored_sources(region, key, region.preloaded)}
    return replace(region, order=order, preloaded=tuple(key for key in region.preloaded if key in read))


def _is_small(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATS and 1 < math.prod(tensor.row) <= WEIGHT_BYTES // 4


def for_every_block(region: Region, source: Key) -> Region | None:
    """The region for blocks that all compute the whole of it and then read ``source``; ``None``: it takes too much.

    Blocks cannot see what another one has written: what is read again must be in shared memory.
    """
    whole = replace(region, shared=region.shared | {source})
    read = {
        other for key in region.order for other in _stored_sources(region, key, dict.fromkeys(region.order))
    }
    small = whole.shared_bytes <= EVERY_BLOCK_BYTES and len(sections(region)) == 1
    return whole if small and read <= whole.shared and source in region.outputs else None


def is_flat(region: Region) -> bool:
    """Whether every element stands for itself: any thread of any block can compute it."""
    return len(region.order) == 1 and not must_be_stored(region.definitions[region.order[0]])


def _stored_sources(region: Region, key: Key, stored: Container[Key]) -> set[Key]:
    """Which of ``stored`` are read to compute ``key``."""
    found: set[Key] = set()
    seen: set[Key] = set()

    def visit(inner: Key) -> None:
        for source in sources(region.definitions[inner]) if inner in region.definitions else ():
            if source in seen:
                continue
            seen.add(source)
            if source in stored:
                found.add(source)
            else:
                visit(source)

    visit(key)
    return found


def _worth_storing(
    definition: Definition, tensor: Tensor, users: set[Key], definitions: Mapping[Key, Definition]
) -> bool:
    if must_be_stored(definition):
        return True
    if not is_costly(definition) or math.prod(tensor.row) == 1:
        return False
    repeated = any(must_be_stored(definitions[user]) for user in users)
    return repeated or len(users) > 1


def _without_second_keys(stored: list[Key], definitions: Mapping[Key, Definition]) -> list[Key]:
    """A top-k makes two tensors at once: it is computed where the first of them stands."""
    seen: set[int] = set()
    result = []
    for key in stored:
        definition = definitions[key]
        if isinstance(definition, TopK):
            if id(definition) in seen:
                continue
            seen.add(id(definition))
        result.append(key)
    return result


def _shared(
    stored: list[Key],
    outputs: tuple[Key, ...],
    definitions: Mapping[Key, Definition],
    tensors: Mapping[Key, Tensor],
    users: Mapping[Key, set[Key]],
) -> frozenset[Key]:
    """What is kept in shared memory: as much as fits, of what others of the region read."""
    left, shared = SHARED_BYTES, set()
    for key in stored:
        definition = definitions[key]
        keys = definition.keys if isinstance(definition, TopK) else (key,)
        for each in keys:
            size = 4 * math.prod(tensors[each].row)
            read = bool(users.get(each))
            if size <= left and (read or each not in outputs):
                shared.add(each)
                left -= size
    return frozenset(shared)

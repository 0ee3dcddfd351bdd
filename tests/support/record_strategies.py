"""Hypothesis strategies for any record of `moec.artifacts`, drawn from its field types."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any

from hypothesis import strategies as st

from moec.artifacts.activation import ARITY, VARIABLES

FINITE = st.floats(allow_nan=False, allow_infinity=False)
NATURAL = st.integers(0, 1 << 60)
POSITIVE = st.integers(1, 1 << 60)
NOT_NEGATIVE = st.floats(0, 1e300)
TEXT = st.text(max_size=8)
SHA256 = st.text("0123456789abcdef", min_size=64, max_size=64)
PATH = st.lists(st.from_regex(r"[a-z0-9_-][a-z0-9_.-]{0,5}", fullmatch=True), min_size=1, max_size=3).map(
    "/".join
)

EXPRESSION: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(VARIABLES) | FINITE,
    lambda inner: st.sampled_from(sorted(ARITY)).flatmap(
        lambda operator: st.tuples(st.just(operator), *[inner] * ARITY[operator])
    ),
    max_leaves=4,
)
ARGUMENT: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | FINITE
    | TEXT
    | st.builds(lambda n: {"ref": n}, st.integers(0, 9)),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)

SHAPE = st.lists(NATURAL | st.from_regex(r"([1-9][0-9]{0,3})?T", fullmatch=True), max_size=3).map(tuple)

ALIASES = {"Expression": EXPRESSION, "tuple[RecipeArgument, ...]": st.lists(ARGUMENT, max_size=3).map(tuple)}
"""By how a field spells its type."""


def _fields(strategy: st.SearchStrategy[Any], names: str) -> dict[str, st.SearchStrategy[Any]]:
    return dict.fromkeys(names.split(), strategy)


CONSTRAINED: dict[str, st.SearchStrategy[Any]] = {
    **_fields(
        SHA256, "FileRecord.sha256 Manifest.fingerprint Manifest.manifest_sha256 PackingRecord.config_sha256"
    ),
    **_fields(st.just(1), "Manifest.format_version"),
    **_fields(st.from_regex(r"[A-Za-z0-9_.+-]+", fullmatch=True), "TargetRecord.name"),
    **_fields(st.text("0123456789abcdef", min_size=16, max_size=16), "TargetRecord.interface"),
    **_fields(st.lists(PATH, max_size=3).map(tuple), "TargetRecord.files TokenizerRecord.files"),
    **_fields(NOT_NEGATIVE, "AttentionSpec.softcap GenerationDefaults.temperature"),
    **_fields(
        st.lists(NOT_NEGATIVE, max_size=3).map(tuple), "LayerProfile.use_share LayerProfile.slot_value"
    ),
    **_fields(
        st.floats(0, 1),
        "Prediction.hit_rate Prediction.optimal_hit_rate PolicyFigures.hit_rate BudgetPoint.hit_rate "
        "BudgetPoint.optimal_hit_rate PrefetchFigures.recall PrefetchFigures.exact_match",
    ),
    **_fields(st.integers(2, 1 << 60), "ConvolutionSpec.width"),
    **_fields(SHAPE, "LocalSpec.shape Operand.shape"),
    **_fields(
        POSITIVE,
        "ModelRecord.vocab_size ModelRecord.hidden_size ModelRecord.max_context ExpertBody.hidden "
        "ExpertBody.intermediate ExpertsLayer.experts ExpertsLayer.top_k AttentionSpec.query_heads "
        "AttentionSpec.kv_heads AttentionSpec.key_dim AttentionSpec.value_dim LatentHeads.nope_dim "
        "LatentHeads.value_dim MachineRecord.cpu_threads Budgets.context_tokens Budgets.step_tokens "
        "Beside.most_tokens ConvolutionSpec.channels RecurrenceSpec.key_heads RecurrenceSpec.value_heads "
        "RecurrenceSpec.key_dim RecurrenceSpec.value_dim SelectionSpec.heads SelectionSpec.dim SelectionSpec.top_k",
    ),
    **_fields(
        st.floats(1e-9, 1e9),
        "MachineRecord.host_bandwidth_gb_s MachineRecord.disk_gb_s MachineRecord.gpu_efficiency "
        "MachineRecord.link_efficiency MachineRecord.host_efficiency",
    ),
}
"""Fields that the schema constrains more than their type does."""


@functools.cache
def record(kind: type) -> st.SearchStrategy[Any]:
    """Any instance of the record ``kind`` that its schema allows."""
    hints = typing.get_type_hints(kind)
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in dataclasses.fields(kind):
        known = CONSTRAINED.get(f"{kind.__name__}.{field.name}", ALIASES.get(str(field.type)))
        if known is None and (kind.__name__, field.name) == ("Manifest", "files"):
            known = st.dictionaries(PATH, record(typing.get_args(hints[field.name])[1]), max_size=3)
        fields[field.name] = _of(hints[field.name], kind.__name__) if known is None else known
    return st.builds(kind, **fields)


def _of(kind: Any, owner: str) -> st.SearchStrategy[Any]:
    if hasattr(kind, "__supertype__"):
        return _of(kind.__supertype__, owner)
    if dataclasses.is_dataclass(kind):
        return record(typing.cast("type", kind))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([_of(option, owner) for option in arguments])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(_of(arguments[0], owner), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT, _of(arguments[1], owner), max_size=2)
    if kind is int:
        return NATURAL
    if kind is float:
        return FINITE if owner in ("AttentionSpec", "GenerationDefaults") else NOT_NEGATIVE
    return {str: TEXT, bool: st.booleans(), type(None): st.none()}[kind]

"""The paged key-value cache, as kernels and their callers must agree on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.steps import AppendStep, AttentionStep

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec, ModelRecord

PAGE_TOKENS = 32
"""Token positions in one page of the cache."""

SELECTION_PREFIX = "selection_"
"""Before the name of a selection of positions: its kernel."""


def selection_words(max_context: int) -> int:
    """Words of 32 bits, one a page, that say which positions of a sequence are selected."""
    return -(-max_context // PAGE_TOKENS)


def cache_layers(model: ModelRecord) -> tuple[AttentionSpec, ...]:
    """For each attention layer, in order, an attention that uses its cache; all of them cache the same."""
    attentions = {spec.name: spec for spec in model.attentions}
    steps = [step for step in model.all_steps if isinstance(step, (AttentionStep, AppendStep))]
    layers = {int(step.layer): attentions[step.attention] for step in reversed(steps)}
    return tuple(layers[number] for number in sorted(layers))


def cached_form(spec: AttentionSpec) -> tuple[object, ...]:
    """What decides how keys and values lie in pages."""
    return spec.kv_heads, spec.key_dim, spec.value_dim, spec.latent, spec.dtype


def sequence_tokens(model: ModelRecord) -> int:
    """Positions that the longest sequence takes in the cache: a context, and one for its source behind an encoder."""
    context = -(-model.max_context // PAGE_TOKENS) * PAGE_TOKENS
    return 2 * context if model.encoder else model.max_context

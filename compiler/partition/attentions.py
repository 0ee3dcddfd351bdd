"""What the markers of attention and selection say: their records, and the caches that they use."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from moec.artifacts.ids import LayerId
from moec.artifacts.layout.cache import cached_form
from moec.artifacts.model import AttentionSpec, DType, LatentHeads, SelectionSpec
from moec.compiler.partition.nodes import DTYPE_NAMES, marker_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import fx


def attention_spec(node: fx.Node, dtype: DType) -> AttentionSpec:
    """The attention of a marker, without a name; ``dtype`` is that of cached keys and values."""
    given = marker_arguments(node)
    query, key, bias = (given[name] for name in ("query", "key", "bias"))
    kv_heads, key_dim = (int(size) for size in key.meta["val"].shape[2:])
    return AttentionSpec(
        name="",
        query_heads=int(query.meta["val"].shape[2]),
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=int(given["value_dim"]),
        scaling=float(given["scaling"]),
        window=int(given["window"]),
        chunk=int(given["chunk"]),
        softcap=float(given["softcap"]),
        sinks=given["sinks"] is not None,
        latent=given["value"] is None,
        dtype=dtype,
        heads=_latent_heads(given["expand"], given["project"]),
        selected=given["selection"] is not None,
        causal=bool(given["causal"]),
        cross=bool(given["cross"]),
        bias_reach=0 if bias is None else int(bias.meta["val"].shape[1]) // 2,
    )


def selection_spec(node: fx.Node, dtype: DType) -> SelectionSpec:
    """The selection of a marker, without a name; ``dtype`` is that of cached keys."""
    given = marker_arguments(node)
    heads, dim = (int(size) for size in given["query"].meta["val"].shape[2:])
    return SelectionSpec("", heads, dim, float(given["scaling"]), int(given["top_k"]), dtype)


def _latent_heads(expand: fx.Node | None, project: fx.Node | None) -> LatentHeads | None:
    """What the matrices of a latent's heads say."""
    if expand is None or project is None:
        return None
    nope, value = (int(matrix.meta["val"].shape[1]) for matrix in (expand, project))
    return LatentHeads(nope, value, DTYPE_NAMES[expand.meta["val"].dtype])


def cache_numbers(
    markers: Iterable[fx.Node], spec_of: Callable[[fx.Node], AttentionSpec]
) -> dict[fx.Node, LayerId]:
    """The attention layer, which is a cache, of each attention marker in order.

    A page has room in all layers, for positions of one sequence. A decoder's own keys and those of its source are in
    different pages, so a cross-attention shares the layer of a self-attention that caches the same. So does an
    encoder's self-attention, whose keys nobody wants after it, with any layer: the encoder's last results come after.
    """
    specs = {node: spec_of(node) for node in markers}
    lasting = [node for node, spec in specs.items() if spec.causal]
    numbers = {node: LayerId(number) for number, node in enumerate(lasting)}
    layers: dict[tuple[object, ...], list[LayerId]] = defaultdict(list)
    for node in lasting:
        layers[cached_form(specs[node])].append(numbers[node])
    unused = _counter(len(lasting))
    free = {form: list(found) for form, found in layers.items()}
    for node, spec in specs.items():
        form = cached_form(spec)
        if spec.cross:
            left = free.get(form)
            numbers[node] = left.pop(0) if left else next(unused)
            layers[form].append(numbers[node])
    for node, spec in specs.items():
        if node not in numbers:
            found = layers[cached_form(spec)]
            if not found:
                found.append(next(unused))
            numbers[node] = found[0]
    return numbers


def _counter(first: int) -> Iterator[LayerId]:
    while True:
        yield LayerId(first)
        first += 1

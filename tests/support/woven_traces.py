"""Traced routing woven into that of a model with more experts.

Dimension names: N tokens, K chosen experts, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.traces import Traces, layer_trace

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from moec.artifacts.traces import LayerTrace

STRETCH = 64
"""Tokens after which woven traces change the layer that comes first."""


def woven_traces(traces: Traces, shapes: Sequence[tuple[int, int]], tokens: int, seed: int = 0) -> Traces:
    """Traces of a model with more experts, which keep the skew and the locality of traced ones.

    The experts of a new layer are those of several traced layers side by side. At any time a token takes what it chose
    in one of these, and as many more as are wanted from the next; which comes first changes every `STRETCH` tokens.
    Where more tokens are wanted than were generated, they begin anew.

    Args:
        traces: whose layers all have the same number of experts.
        shapes: (E, K) of each new layer; E a multiple of the traced layers' experts.
        tokens: N.
        seed: decides which traced layers are put side by side, and where in the traces each new layer begins.

    Raises:
        ValueError: a shape cannot be made of the traced layers.
    """
    random = np.random.default_rng(seed)
    decoded = np.flatnonzero(~traces.prefill)
    own = traces.layers[0].experts
    layers = []
    for experts, top_k in shapes:
        width = sum(layer.chosen.shape[1] for layer in traces.layers[: experts // own])
        if experts % own or top_k > width or any(layer.experts != own for layer in traces.layers):
            raise ValueError(f"{top_k} of {experts} experts cannot be woven of layers with {own}")
        numbers = random.permutation(np.arange(experts // own) % len(traces.layers)).tolist()
        rows = decoded[(random.integers(len(decoded)) + np.arange(tokens)) % len(decoded)]
        layers.append(_woven([traces.layers[number] for number in numbers], rows, top_k))
    return Traces(tuple(layers), np.zeros(1 if tokens else 0, np.int64), np.zeros(tokens, np.bool_))


def _woven(sources: Sequence[LayerTrace], rows: npt.NDArray[np.int64], top_k: int) -> LayerTrace:
    """One new layer of ``sources`` side by side, its tokens the traced tokens ``rows``."""
    own, count = sources[0].experts, len(sources)
    chosen = np.stack(
        [source.chosen[rows].astype(np.int64) + own * place for place, source in enumerate(sources)], axis=1
    )
    first = np.arange(len(rows)) // STRETCH % count
    turned = (first[:, None] + np.arange(count)[None]) % count
    joined = np.take_along_axis(chosen, turned[:, :, None], axis=1).reshape(len(rows), -1)
    return layer_trace(own * count, joined[:, :top_k])

"""The custom ops in graphs: two markers, where graphs are cut, and the one form of a weight product.

T tokens of a step, K chosen experts, H hidden, Hq query heads, Hkv key heads, Dk and Dv head sizes.
"""

from __future__ import annotations

import torch

LINEAR = "moec.linear.default"
ATTENTION = "moec.attention.default"
EXPERTS = "moec.experts.default"
SELECTION = "moec.selection.default"
MARKERS = (ATTENTION, EXPERTS, SELECTION)
MATRICES = ("absorb", "expand", "project")
"""Arguments of attention that are only multiplied with."""


@torch.library.custom_op("moec::linear", mutates_args=())
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight^T + bias`` in float32, whatever the storage type of ``weight``.

    Args:
        x: ``[..., K]``, or ``[B, T, K]`` where the weight is batched.
        weight: ``[N, K]``, or batched ``[B, N, K]``; K is contiguous.
        bias: ``[N]`` or ``[B, 1, N]``.
    """
    product = torch.matmul(x, weight.float().transpose(-1, -2))
    return product if bias is None else product + bias


@linear.register_fake
def _linear_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    del bias
    return x.new_empty([*x.shape[:-1], weight.shape[-2]])


@torch.library.custom_op("moec::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    sinks: torch.Tensor | None,
    selection: torch.Tensor | None,
    absorb: torch.Tensor | None,
    expand: torch.Tensor | None,
    project: torch.Tensor | None,
    module: str,
    scaling: float,
    window: int,
    chunk: int,
    softcap: float,
    value_dim: int,
) -> torch.Tensor:
    """Where the cache is appended to and attended. It has a shape and no meaning of its own.

    Args:
        query: ``[1, T, Hq, Dq]``.
        key: ``[1, T, Hkv, Dk]``.
        value: ``[1, T, Hkv, Dv]``, or ``None`` where it is the first ``value_dim`` entries of the key.
        sinks: ``[Hq]`` or ``None``.
        selection: of the marker ``selection``, or ``None`` where a token sees all that its mask lets it see.
        absorb: ``[Hq, rank, nope]``, the first of three matrices (see `moec.artifacts.model.LatentWeights`), or none.
        expand: ``[Hq, nope, rank]``.
        project: ``[Hq, Dr, rank]``.
        module: path of the attention module.
        scaling: see ``AttentionSpec``, as for the other numbers.
        window: 0 for none.
        chunk: 0 for none.
        softcap: 0 for none.
        value_dim: Dv.

    Returns:
        ``[1, T, Hq, Dr]``, where Dr is Dv if there are no matrices.
    """
    raise NotImplementedError("moec::attention is a marker: it is replaced by a kernel")


@attention.register_fake
def _attention_shape(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    sinks: torch.Tensor | None,
    selection: torch.Tensor | None,
    absorb: torch.Tensor | None,
    expand: torch.Tensor | None,
    project: torch.Tensor | None,
    module: str,
    scaling: float,
    window: int,
    chunk: int,
    softcap: float,
    value_dim: int,
) -> torch.Tensor:
    del key, value, sinks, selection, absorb, expand, module, scaling, window, chunk, softcap
    return query.new_empty([*query.shape[:3], value_dim if project is None else project.shape[1]])


@torch.library.custom_op("moec::experts", mutates_args=())
def experts(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, module: str) -> torch.Tensor:
    """Where the chosen experts run. It has a shape and no meaning of its own.

    Args:
        x: ``[T, H]``.
        index: ``[T, K]`` int64, the chosen experts.
        weight: ``[T, K]``, their weights.
        module: path of the experts module.

    Returns:
        ``[T, H]``.
    """
    raise NotImplementedError("moec::experts is a marker: it is replaced by a kernel")


@experts.register_fake
def _experts_shape(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, module: str) -> torch.Tensor:
    del index, weight, module
    return torch.empty_like(x)


@torch.library.custom_op("moec::selection", mutates_args=())
def selection(
    query: torch.Tensor, weight: torch.Tensor, key: torch.Tensor, scaling: float, top_k: int, words: int
) -> torch.Tensor:
    """Where an indexer's cache is appended to, and positions are selected. It has a shape and no meaning of its own.

    Args:
        query: ``[1, T, Hi, Di]``.
        weight: ``[1, T, Hi]``.
        key: ``[1, T, Di]``.
        scaling: see `moec.artifacts.model.SelectionSpec`.
        top_k: positions of a token.
        words: W, of 32 positions each.

    Returns:
        ``[T, W]`` int32.
    """
    raise NotImplementedError("moec::selection is a marker: it is replaced by a kernel")


@selection.register_fake
def _selection_shape(
    query: torch.Tensor, weight: torch.Tensor, key: torch.Tensor, scaling: float, top_k: int, words: int
) -> torch.Tensor:
    del weight, key, scaling, top_k
    return query.new_empty([query.shape[1], words], dtype=torch.int32)

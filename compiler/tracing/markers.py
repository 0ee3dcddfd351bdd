"""The custom ops in graphs: markers, where graphs are cut, and the one form of a weight product.

T tokens of a step, K chosen experts, H hidden, Hq query heads, Hkv key heads, Dk and Dv head sizes.
"""

from __future__ import annotations

import torch

from moec.formats import FORMATS, dequantize_rows

LINEAR = "moec.linear.default"
ATTENTION = "moec.attention.default"
CAPACITY = "moec.capacity.default"
EXPERTS = "moec.experts.default"
SELECTION = "moec.selection.default"
MARKERS = (ATTENTION, CAPACITY, EXPERTS, SELECTION)
MATRICES = ("absorb", "expand", "project")
"""Arguments of attention that are only multiplied with."""


@torch.library.custom_op("moec::linear", mutates_args=())
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    format: str = "",  # noqa: A002
) -> torch.Tensor:
    """``x @ weight^T + bias`` in float32, whatever the storage type of ``weight``.

    Args:
        x: ``[..., K]``, or ``[B, T, K]`` where the weight is batched.
        weight: ``[N, K]``, or batched ``[B, N, K]``, K is contiguous; quantized: bytes ``[N, row_bytes]``.
        bias: ``[N]`` or ``[B, 1, N]``.
        format: of a quantized weight: in ``moec.formats.FORMATS``.
    """
    matrix = _dequantized(weight, x.shape[-1], format) if format else weight.float()
    product = torch.matmul(x, matrix.transpose(-1, -2))
    return product if bias is None else product + bias


@linear.register_fake
def _linear_shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    format: str = "",  # noqa: A002
) -> torch.Tensor:
    del bias, format
    return x.new_empty([*x.shape[:-1], weight.shape[-2]])


@torch.library.custom_op("moec::lookup", mutates_args=())
def lookup(table: torch.Tensor, ids: torch.Tensor, columns: int, format: str) -> torch.Tensor:  # noqa: A002
    """Rows of a quantized table, in float32.

    Args:
        table: bytes ``[V, row_bytes]``.
        ids: ``[...]`` int64.
        columns: H, of the table.
        format: in ``moec.formats.FORMATS``.

    Returns:
        ``[..., H]``.
    """
    rows = _dequantized(table[ids.reshape(-1)], columns, format)
    return rows.reshape(*ids.shape, columns)


@lookup.register_fake
def _lookup_shape(table: torch.Tensor, ids: torch.Tensor, columns: int, format: str) -> torch.Tensor:  # noqa: A002
    del format
    return table.new_empty([*ids.shape, columns], dtype=torch.float32)


def _dequantized(rows: torch.Tensor, columns: int, name: str) -> torch.Tensor:
    return torch.from_numpy(dequantize_rows(FORMATS[name], rows.numpy(), columns))


@torch.library.custom_op("moec::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    sinks: torch.Tensor | None,
    selection: torch.Tensor | None,
    bias: torch.Tensor | None,
    absorb: torch.Tensor | None,
    expand: torch.Tensor | None,
    project: torch.Tensor | None,
    module: str,
    scaling: float,
    window: int,
    chunk: int,
    softcap: float,
    value_dim: int,
    causal: bool,
    cross: bool,
) -> torch.Tensor:
    """Where the cache is appended to and attended. It has a shape and no meaning of its own.

    Args:
        query: ``[1, T, Hq, Dq]``.
        key: ``[1, T, Hkv, Dk]``; where ``cross``, of the S tokens of another sequence ``[1, S, Hkv, Dk]``.
        value: ``[1, T, Hkv, Dv]``, or ``None`` where it is the first ``value_dim`` entries of the key.
        sinks: ``[Hq]`` or ``None``.
        selection: of the marker ``selection``, or ``None`` where a token sees all that its mask lets it see.
        bias: ``[Hq, 2 * bias_reach + 1]`` or ``None``, see ``AttentionSpec``.
        absorb: ``[Hq, rank, nope]``, the first of three matrices (see `moec.artifacts.steps.LatentWeights`), or none.
        expand: ``[Hq, nope, rank]``.
        project: ``[Hq, Dr, rank]``.
        module: path of the attention module.
        scaling: see ``AttentionSpec``, as for the other numbers.
        window: 0 for none.
        chunk: 0 for none.
        softcap: 0 for none.
        value_dim: Dv.
        causal: whether a token sees nothing after itself.
        cross: whether keys are those of another sequence.

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
    bias: torch.Tensor | None,
    absorb: torch.Tensor | None,
    expand: torch.Tensor | None,
    project: torch.Tensor | None,
    module: str,
    scaling: float,
    window: int,
    chunk: int,
    softcap: float,
    value_dim: int,
    causal: bool,
    cross: bool,
) -> torch.Tensor:
    del (
        key,
        value,
        sinks,
        selection,
        bias,
        absorb,
        expand,
        module,
        scaling,
        window,
        chunk,
        softcap,
        causal,
        cross,
    )
    return query.new_empty([*query.shape[:3], value_dim if project is None else project.shape[1]])


@torch.library.custom_op("moec::capacity", mutates_args=())
def capacity(index: torch.Tensor, weight: torch.Tensor, tokens: int, share: float) -> torch.Tensor:
    """Where tokens beyond an expert's capacity are dropped. It has a shape and no meaning of its own.

    Args:
        index: ``[T, K]`` int64, the chosen experts.
        weight: ``[T, K]``, their weights.
        tokens: of one call that an expert takes; 0: see ``share``.
        share: of a call's tokens that an expert takes, rounded up.

    Returns:
        ``weight``, or 0 for choices that are dropped; see `moec.artifacts.steps.CapacityStep`.
    """
    raise NotImplementedError("moec::capacity is a marker: it is replaced by a kernel")


@capacity.register_fake
def _capacity_shape(index: torch.Tensor, weight: torch.Tensor, tokens: int, share: float) -> torch.Tensor:
    del index, tokens, share
    return torch.empty_like(weight)


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

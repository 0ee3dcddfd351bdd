"""ATen operators whose import in TVM is wrong, missing or slow, and how we import them instead."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from tvm import relax

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


QUANTIZED_LINEAR = "moec.linear."
QUANTIZED_LOOKUP = "moec.lookup."
"""Before a format's name: what a call of an operation on a weight in that format is called until it is a kernel."""


def _dtype(value: Any) -> str:
    return str(value.ty.dtype.dtype)


def _product(importer: Any, left: Any, right: Any, bias: Any = None) -> Any:
    """``left @ right (+ bias)`` in float32; only ``right`` may be of a narrower type."""
    emit = importer.block_builder.emit
    result = emit(relax.op.matmul(left, right, out_dtype="float32"))
    return result if bias is None else emit(relax.op.add(result, bias))


def _transposed(importer: Any, value: Any) -> Any:
    rank = len(value.ty.shape)
    return importer.block_builder.emit(relax.op.permute_dims(value, [*range(rank - 2), rank - 1, rank - 2]))


def _linear(node: Any, importer: Any) -> Any:
    """A product with a quantized weight stays a call by name: only a kernel of ours knows what its bytes mean."""
    x, weight, bias, name = [*importer.retrieve_args(node), None, None][:4]
    if not name:
        return _product(importer, x, _transposed(importer, weight), bias)
    emit = importer.block_builder.emit
    out = relax.TensorType([*list(x.ty.shape)[:-1], weight.ty.shape[0]], "float32")
    result = emit(relax.call_dps_packed(QUANTIZED_LINEAR + name, (x, weight), out))
    return result if bias is None else emit(relax.op.add(result, bias))


def _lookup(node: Any, importer: Any) -> Any:
    """Rows of a quantized table, by name as well."""
    table, ids, columns, name = importer.retrieve_args(node)
    out = relax.TensorType([*list(ids.ty.shape), columns], "float32")
    return importer.block_builder.emit(relax.call_dps_packed(QUANTIZED_LOOKUP + name, (table, ids), out))


def _matmul(node: Any, importer: Any) -> Any:
    left, right = importer.retrieve_args(node)
    return _product(importer, left, right)


def _addmm(node: Any, importer: Any) -> Any:
    bias, left, right = importer.retrieve_args(node)
    return _product(importer, left, right, bias)


def _transpose(node: Any, importer: Any) -> Any:
    return _transposed(importer, importer.retrieve_args(node)[0])


def _view(node: Any, importer: Any) -> Any:
    value, shape = importer.retrieve_args(node)
    return importer.block_builder.emit(relax.op.reshape(value, shape))


def _masked_fill(node: Any, importer: Any) -> Any:
    value, mask, fill = importer.retrieve_args(node)
    if not isinstance(fill, relax.Expr):
        fill = relax.const(float(fill), _dtype(value))
    return importer.block_builder.emit(relax.op.where(mask, fill, value))


def _topk(node: Any, importer: Any) -> Any:
    """Sorted also where the model does not ask for it: any order is right then, and one order is reproducible."""
    value, count, *rest = importer.retrieve_args(node)
    axis = rest[0] if rest else -1
    largest = rest[1] if len(rest) > 1 else True
    return importer.block_builder.emit(
        relax.op.topk(value, k=count, axis=axis, largest=largest, ret_type="both", dtype="int64")
    )


def _scatter_value(node: Any, importer: Any) -> Any:
    """One value to the indexed places of the last axis: a comparison with each index instead of random writes."""
    value, axis, index, fill = importer.retrieve_args(node)
    rank, emit = len(value.ty.shape), importer.block_builder.emit
    assert axis in (-1, rank - 1), "scatter of a value is imported along the last axis only"
    places = emit(relax.op.arange(0, value.ty.shape[rank - 1], 1, "int64"))
    equal = emit(relax.op.equal(emit(relax.op.expand_dims(index, -1)), places))
    hits = emit(relax.op.max(emit(relax.op.astype(equal, "int32")), axis=-2))
    hit = emit(relax.op.astype(hits, "bool"))
    return emit(relax.op.where(hit, relax.const(float(fill), _dtype(value)), value))


def _layer_norm(node: Any, importer: Any) -> Any:
    """Layer normalisation over the last axis, in two passes: TVM's takes the difference of two large sums."""
    value, shape, weight, bias, epsilon = importer.retrieve_args(node)[:5]
    assert len(shape) == 1, "layer normalisation is imported over the last axis only"
    emit = importer.block_builder.emit
    centred = emit(relax.op.subtract(value, emit(relax.op.mean(value, -1, keepdims=True))))
    variance = emit(relax.op.mean(emit(relax.op.multiply(centred, centred)), -1, keepdims=True))
    shifted = emit(relax.op.add(variance, relax.const(float(epsilon), "float32")))
    result = emit(relax.op.multiply(centred, emit(relax.op.rsqrt(shifted))))
    if weight is not None:
        result = emit(relax.op.multiply(result, weight))
    if bias is not None:
        result = emit(relax.op.add(result, bias))
    return result


def _native_layer_norm(node: Any, importer: Any) -> Any:
    """Only the normalised value exists: mean and scale are for training."""
    return (_layer_norm(node, importer),)


def _embedding(node: Any, importer: Any) -> Any:
    """Rows of a table; ids are clipped, so that a wrong one cannot read outside it."""
    table, ids = importer.retrieve_args(node)[:2]
    return importer.block_builder.emit(relax.op.take(table, ids, axis=0, mode="clip"))


def _select(node: Any, importer: Any) -> Any:
    """One place along an axis, as a slice: TVM's importer gathers it, which does not fuse."""
    value, axis, index = importer.retrieve_args(node)
    place = index if index >= 0 else value.ty.shape[axis] + index
    emit = importer.block_builder.emit
    return emit(relax.op.squeeze(emit(relax.op.strided_slice(value, [axis], [place], [place + 1])), [axis]))


def _pow_scalar(node: Any, importer: Any) -> Any:
    """Squares are products: the general power calls the C library for each element."""
    value, exponent = importer.retrieve_args(node)
    if exponent == 2:
        return importer.block_builder.emit(relax.op.multiply(value, value))
    return importer.block_builder.emit(relax.op.power(value, relax.const(float(exponent), _dtype(value))))


def _divide(node: Any, importer: Any) -> Any:
    """True division: of integers too, which TVM's importer divides to an integer."""
    left, right = (
        importer.block_builder.emit(relax.op.astype(value, "float32"))
        if isinstance(value, relax.Expr) and "int" in _dtype(value)
        else value
        for value in importer.retrieve_args(node)
    )
    if not isinstance(right, relax.Expr):
        right = relax.const(float(right), _dtype(left))
    return importer.block_builder.emit(relax.op.divide(left, right))


def _repeat_interleave(node: Any, importer: Any) -> Any:
    value, repeats = importer.retrieve_args(node)[:2]
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    return importer.block_builder.emit(relax.op.repeat(value, repeats, axis))


def _log_sigmoid(node: Any, importer: Any) -> Any:
    emit = importer.block_builder.emit
    return emit(relax.op.log(emit(relax.op.sigmoid(importer.retrieve_args(node)[0]))))


def _amin(node: Any, importer: Any) -> Any:
    value, axes, *keep = importer.retrieve_args(node)
    return importer.block_builder.emit(relax.op.min(value, axes, keepdims=bool(keep and keep[0])))


def _logsumexp(node: Any, importer: Any) -> Any:
    value, axes = importer.retrieve_args(node)[:2]
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    emit = importer.block_builder.emit
    largest = emit(relax.op.max(value, axes, keepdims=True))
    total = emit(
        relax.op.sum(emit(relax.op.exp(emit(relax.op.subtract(value, largest)))), axes, keepdims=True)
    )
    result = emit(relax.op.add(emit(relax.op.log(total)), largest))
    return result if keep else emit(relax.op.squeeze(result, axes))


def _scalar_of(node: Any, importer: Any) -> Any:
    """A 0-dimensional constant such as ``-inf`` or a limit of the element type."""
    value = importer.retrieve_args(node)[0]
    dtype = node.kwargs.get("dtype") or torch.float32
    return relax.const(float(value) if math.isinf(value) else value, str(dtype).removeprefix("torch."))


CONVERTERS: Mapping[str, Callable[[Any, Any], Any]] = {
    "linear.default": _linear,
    "mm.default": _matmul,
    "bmm.default": _matmul,
    "matmul.default": _matmul,
    "addmm.default": _addmm,
    "t.default": _transpose,
    "_unsafe_view.default": _view,
    "masked_fill.Scalar": _masked_fill,
    "masked_fill.Tensor": _masked_fill,
    "topk.default": _topk,
    "scatter.value": _scatter_value,
    "layer_norm.default": _layer_norm,
    "native_layer_norm.default": _native_layer_norm,
    "embedding.default": _embedding,
    "lookup.default": _lookup,
    "select.int": _select,
    "pow.Tensor_Scalar": _pow_scalar,
    "amin.default": _amin,
    "div.Tensor": _divide,
    "repeat_interleave.self_int": _repeat_interleave,
    "log_sigmoid.default": _log_sigmoid,
    "logsumexp.default": _logsumexp,
    "scalar_tensor.default": _scalar_of,
}
"""fx target name (as TVM's importer forms it) to converter ``(node, importer) -> relax.Var``."""

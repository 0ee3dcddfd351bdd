"""``profile/traces.npz``: which experts each token of the calibration prompts chose, compactly.

A token meets all MoE layers of a decoder. Behind an encoder the tokens of sources meet the encoder's: those are traces
of their own, whose arrays have names that begin with ``encoder_``.

Dimension names: N traced tokens (all sequences, one after the other), K chosen experts, E experts, S
sequences.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

TRACES_NAME = "profile/traces.npz"
ENCODER = "encoder_"

WEIGHT_STEPS = 255
"""Routing weights are kept as ``round(255 * weight / largest weight of the token)``, 8 bits each."""

_ARCHIVE = b"PK"
"""What a ZIP file begins with."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    MemoryError,
    OverflowError,
    SyntaxError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
"""What zipfile and numpy raise on damaged files."""


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """One MoE layer's choices."""

    experts: int
    """E; every chosen expert is below it."""
    chosen: npt.NDArray[Any]
    """``[N, K]`` uint8, or uint16 where E is above 256. In a row an expert comes more than once only where one at most
    has a routing weight: the others stand for experts that compute nothing, such as LongCat-Flash's; see `repeats`."""
    weights: npt.NDArray[np.uint8] | None
    """``[N, K]``, see ``WEIGHT_STEPS``; ``None`` where they were not recorded."""
    early: npt.NDArray[Any] | None = None
    """``[M, K]``, as ``chosen``, of the first M tokens: what the layer's router says of the hidden state that the MoE
    layer before was given, likeliest first; ``None`` where it was not asked, as of what is recorded while it runs."""


@dataclass(frozen=True, eq=False)
class Traces:
    """Routing traces of all MoE layers, over the same tokens."""

    layers: tuple[LayerTrace, ...]
    sequence_starts: npt.NDArray[np.int64]
    """``[S]``: where each sequence begins among the N tokens; the first is 0."""
    prefill: npt.NDArray[np.bool_]
    """``[N]``: the token was part of a prompt (and not generated)."""
    encoder: Traces | None = None
    """Of the encoder's MoE layers over the tokens of sources; then ``layers`` are the decoder's."""

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.prefill)


def index_dtype(experts: int) -> type[np.unsignedinteger[Any]]:
    """The smallest element type that holds an expert's index."""
    return np.uint8 if experts <= 256 else np.uint16


def quantize_weights(weights: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Routing weights ``[N, K]`` to 8 bits, relative to the largest of each token; negative ones become 0."""
    values = np.clip(np.asarray(weights, np.float32), 0, None)
    largest = values.max(axis=1, keepdims=True, initial=0)
    scaled = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)
    quantized: npt.NDArray[np.uint8] = np.round(scaled * WEIGHT_STEPS).astype(np.uint8)
    return quantized


def repeats(chosen: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which choices ``[.., K]`` are an expert that comes before in the same row: nothing is fetched for them."""
    same = chosen[..., :, None] == chosen[..., None, :]
    again: npt.NDArray[np.bool_] = np.tril(same, -1).any(axis=-1)
    return again


def layer_trace(
    experts: int,
    chosen: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    early: npt.ArrayLike | None = None,
) -> LayerTrace:
    """A layer's trace from indices ``[N, K]`` of any integer type, weights ``[N, K]``, and see `LayerTrace.early`."""
    index = np.asarray(chosen)
    assert index.ndim == 2, f"choices are [N, K], not {index.shape}"
    assert index.size == 0 or (index.min() >= 0 and index.max() < experts), "a chosen expert is out of range"
    quantized = None if weights is None else quantize_weights(np.asarray(weights))
    dtype = index_dtype(experts)
    named = None if early is None else np.ascontiguousarray(np.asarray(early).astype(dtype))
    return LayerTrace(experts, np.ascontiguousarray(index.astype(dtype)), quantized, named)


def join_traces(first: Traces, second: Traces) -> Traces:
    """The tokens of both, of the same model; where only one has routing weights they are left out."""
    layers = tuple(
        LayerTrace(
            one.experts,
            np.concatenate([one.chosen, other.chosen]),
            None
            if one.weights is None or other.weights is None
            else np.concatenate([one.weights, other.weights]),
            _joined_early(one, other),
        )
        for one, other in zip(first.layers, second.layers, strict=True)
    )
    starts = np.concatenate([first.sequence_starts, second.sequence_starts + first.tokens])
    encoder = None
    if first.encoder is not None and second.encoder is not None:
        encoder = join_traces(first.encoder, second.encoder)
    return Traces(layers, starts, np.concatenate([first.prefill, second.prefill]), encoder)


def _joined_early(one: LayerTrace, other: LayerTrace) -> npt.NDArray[Any] | None:
    """What routers said early of the tokens of ``one``, and of ``other`` as far as nothing lies between."""
    if one.early is None or other.early is None or len(one.early) < len(one.chosen):
        return one.early
    return np.concatenate([one.early, other.early])


def last_tokens(traces: Traces, most: int) -> Traces:
    """The last sequences of ``traces``, at most ``most`` tokens of each side; of a longer last sequence its end."""
    begin = max(0, traces.tokens - most)
    later = traces.sequence_starts[traces.sequence_starts >= begin]
    begin = int(later[0]) if later.size else begin
    starts = later - begin if later.size else np.zeros(1 if traces.tokens > begin else 0, np.int64)
    layers = tuple(
        LayerTrace(
            layer.experts,
            layer.chosen[begin:],
            None if layer.weights is None else layer.weights[begin:],
            None if layer.early is None or len(layer.early) <= begin else layer.early[begin:],
        )
        for layer in traces.layers
    )
    encoder = None if traces.encoder is None else last_tokens(traces.encoder, most)
    return Traces(layers, starts, traces.prefill[begin:], encoder)


def ends_with(traces: Traces, part: Traces) -> bool:
    """Whether the last tokens of ``traces`` are those of ``part``, of the same model."""
    begin = traces.tokens - part.tokens
    if (
        traces.encoder is not None
        and part.encoder is not None
        and not ends_with(traces.encoder, part.encoder)
    ):
        return False
    return begin >= 0 and all(
        np.array_equal(layer.chosen[begin:], other.chosen)
        for layer, other in zip(traces.layers, part.layers, strict=True)
    )


def save_traces(traces: Traces, path: Path) -> None:
    """Write ``traces`` so that equal traces give equal bytes (``numpy.savez`` writes the time of day)."""
    arrays = _arrays(traces)
    if traces.encoder is not None:
        arrays |= {f"{ENCODER}{name}": array for name, array in _arrays(traces.encoder).items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(
                    file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False
                )


def _arrays(traces: Traces) -> dict[str, npt.NDArray[Any]]:
    """Of one side."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "sequence_starts": traces.sequence_starts.astype(np.int64),
        "prefill": traces.prefill.astype(np.bool_),
        "experts": np.array([layer.experts for layer in traces.layers], np.int64),
    }
    for number, layer in enumerate(traces.layers):
        arrays[f"chosen_{number:05d}"] = layer.chosen
        if layer.weights is not None:
            arrays[f"weights_{number:05d}"] = layer.weights
        if layer.early is not None:
            arrays[f"early_{number:05d}"] = layer.early
    return arrays


def load_traces(path: Path) -> Traces:
    """Read and check traces.

    Raises:
        BundleError: the file is damaged, or its arrays do not belong together.
    """
    try:
        content = path.read_bytes()
        if not content.startswith(_ARCHIVE):
            raise _error(path, "it is no archive of arrays")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except _UNREADABLE as error:
        raise _error(path, f"it cannot be read ({getattr(error, 'strerror', None) or error})") from error
    sources = {
        name.removeprefix(ENCODER): arrays.pop(name) for name in list(arrays) if name.startswith(ENCODER)
    }
    encoder = _side(path, sources) if sources else None
    return replace(_side(path, arrays), encoder=encoder)


def _side(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> Traces:
    problem = _first_problem(arrays)
    if problem:
        raise _error(path, problem)
    layers = tuple(
        LayerTrace(
            int(experts),
            arrays[f"chosen_{number:05d}"],
            arrays.get(f"weights_{number:05d}"),
            arrays.get(f"early_{number:05d}"),
        )
        for number, experts in enumerate(arrays["experts"])
    )
    return Traces(layers, arrays["sequence_starts"], arrays["prefill"])


def _first_problem(arrays: dict[str, npt.NDArray[Any]]) -> str | None:
    """What is wrong with the arrays of a trace file, or ``None``."""
    common = {"sequence_starts": np.int64, "prefill": np.bool_, "experts": np.int64}
    for name, dtype in common.items():
        if name not in arrays or arrays[name].dtype != dtype or arrays[name].ndim != 1:
            return f"the array {name} is missing or of the wrong type"
    tokens, starts = len(arrays["prefill"]), arrays["sequence_starts"]
    if (len(starts) == 0) != (tokens == 0) or (len(starts) and starts[0] != 0):
        return "its sequences do not begin at token 0"
    if np.any(np.diff(starts) <= 0) or (len(starts) and starts[-1] >= tokens):
        return "its sequences are not in order"
    names = set(common)
    for number, experts in enumerate(arrays["experts"].tolist()):
        problem = _layer_problem(arrays, number, experts, tokens)
        if problem:
            return f"MoE layer {number}: {problem}"
        names |= {f"{what}_{number:05d}" for what in ("chosen", "weights", "early")}
    return f"it has the unknown array {sorted(set(arrays) - names)[0]}" if set(arrays) - names else None


def _layer_problem(arrays: dict[str, npt.NDArray[Any]], number: int, experts: int, tokens: int) -> str | None:
    chosen, weights = arrays.get(f"chosen_{number:05d}"), arrays.get(f"weights_{number:05d}")
    if not 1 <= experts <= 1 << 16:
        return f"{experts} experts"
    if chosen is None or chosen.dtype != index_dtype(experts) or chosen.ndim != 2 or len(chosen) != tokens:
        return "its choices are missing or of the wrong type"
    if chosen.size and int(chosen.max()) >= experts:
        return f"expert {int(chosen.max())} of {experts}"
    early = arrays.get(f"early_{number:05d}")
    if early is not None and (
        early.dtype != chosen.dtype or early.shape[1:] != chosen.shape[1:] or len(early) > tokens
    ):
        return "what its router said early is of the wrong type"
    if early is not None and early.size and int(early.max()) >= experts:
        return f"expert {int(early.max())} of {experts}"
    if weights is not None and (weights.dtype != np.uint8 or weights.shape != chosen.shape):
        return "its weights are of the wrong type"
    if _chosen_twice(chosen, weights):
        return "a token chose an expert twice"
    return None


def _chosen_twice(chosen: npt.NDArray[Any], weights: npt.NDArray[np.uint8] | None) -> bool:
    """Whether some token has two choices of one expert that both count."""
    counts = np.ones_like(chosen, np.bool_) if weights is None else weights > 0
    pairs = np.sort(2 * chosen.astype(np.int64) + counts, axis=1)
    return bool(np.any((np.diff(pairs, axis=1) == 0) & (pairs[:, 1:] % 2 == 1)))


def _error(path: Path, why: str) -> BundleError:
    return BundleError(
        f"{path} is not a file of routing traces.",
        f"{why}."[0].upper() + f"{why}."[1:],
        "Name one that trace_path made; where it is the bundle's own, compile again.",
    )

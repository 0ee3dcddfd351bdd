"""``profile/traces.npz``, and files that ``trace_path`` makes: routing traces as arrays of one archive.

Those of an encoder have names that begin with ``encoder_``.

Dimension names: N traced tokens, K chosen experts, E experts, S sequences.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.traces import LayerTrace, Traces, index_dtype
from moec.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

TRACES_NAME = "profile/traces.npz"
ENCODER = "encoder_"

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

"""Checkpoints of compressed-tensors (llm-compressor): its library says what each weight's scheme is.

What is rounded besides weights (activations, keys and values) is left as it is: results are nearer to the unquantized
model's.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moec.compiler.packing.encodings.compressed_integers import CompressedIntegers
from moec.compiler.packing.encodings.errors import misfit, missing, unreadable
from moec.compiler.packing.encodings.fp8 import fp8_in_blocks
from moec.compiler.packing.encodings.integers import BITS, SCALE_TYPES, WORD
from moec.compiler.packing.encodings.mxfp4 import BLOCK as MX_BLOCK
from moec.compiler.packing.encodings.mxfp4 import mxfp4
from moec.compiler.packing.encodings.record import Encoded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    from moec.compiler.checkpoint.record import TensorEntry
    from moec.compiler.packing.encodings.record import Encoding

    Maker = Callable[[str, Mapping[str, TensorEntry], QuantizationArgs], tuple[Encoding, tuple[int, ...]]]

WEIGHT, PACKED = ".weight", ".weight_packed"
SCALE, ZERO = ".weight_scale", ".weight_zero_point"
BESIDE = (".weight_shape", ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale")
"""Parts that say nothing about the weight's values that its other parts do not."""


def find_compressed(index: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> dict[str, Encoded]:
    """Every quantized weight of the checkpoint.

    Raises:
        UnsupportedModelError: a format is not read, or weights are rotated or sparse besides.
        CheckpointError: parts are missing or do not fit.
    """
    config = _config(quantization)
    found: dict[str, Encoded] = {}
    for name, entry in index.items():
        base = name.removesuffix(PACKED)
        if base == name:
            base = name.removesuffix(WEIGHT)
            if base == name or (f"{base}{SCALE}" not in index and entry.dtype not in ("I8", "F8_E4M3")):
                continue
        scheme = _scheme(base, config)
        layout = str(getattr(scheme.format, "value", scheme.format) or config.format)
        if layout not in FORMATS or scheme.weights is None:
            raise unreadable(
                f"by compressed-tensors in the format {layout}", f"moec reads {', '.join(FORMATS)}."
            )
        if f"{base}{SCALE}" not in index:
            raise missing(f"{base}{SCALE}", name)
        encoding, shape = FORMATS[layout](base, index, scheme.weights)
        names = (name, *(f"{base}{part}" for part in (SCALE, ZERO, *BESIDE)))
        found[f"{base}{WEIGHT}"] = Encoded(encoding, shape, tuple(part for part in names if part in index))
    return found


def _config(quantization: Mapping[str, Any]) -> QuantizationConfig:
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise unreadable(f"by compressed-tensors, and sparse ({sparsity})", "moec reads dense weights.")
    if (quantization.get("transform_config") or {}).get("config_groups"):
        raise unreadable(
            "by compressed-tensors, and rotated (transform_config)",
            "moec applies no rotations to activations.",
        )
    try:
        return QuantizationConfig.model_validate(dict(quantization))
    except (ValidationError, ValueError, NotImplementedError) as error:
        why = f"The library compressed-tensors does not understand its quantization_config: {error}"
        raise unreadable("by compressed-tensors", why[:600]) from error


def _scheme(base: str, config: QuantizationConfig) -> QuantizationScheme:
    """The scheme whose targets name the module, or else the first with its class among them."""
    from compressed_tensors.utils.match import match_name

    schemes: list[Any] = list(config.config_groups.values())
    for scheme in schemes:
        if any(match_name(base, target) for target in scheme.targets):
            return scheme
    for scheme in schemes:
        if any(not target.startswith("re:") and "." not in target for target in scheme.targets):
            return scheme
    raise unreadable(
        "by compressed-tensors, without a scheme for every weight", f"No target in its config is {base}."
    )


def _integers(
    base: str, index: Mapping[str, TensorEntry], scheme: QuantizationArgs
) -> tuple[Encoding, tuple[int, ...]]:
    bits = scheme.num_bits
    if scheme.type != "int" or bits not in BITS:
        raise unreadable(
            f"by compressed-tensors to {scheme.type}{bits}",
            f"moec reads integers of {BITS[0]} and {BITS[1]} bits.",
        )
    packed = index.get(f"{base}{PACKED}")
    codes = packed or _part(index, base, WEIGHT)
    scales = index[f"{base}{SCALE}"]
    if len(codes.shape) != 2 or codes.dtype != ("I8" if packed is None else "I32"):
        raise misfit(base, codes, scales, "a matrix of codes, in bytes or in words of 32 bits")
    rows, wide = codes.shape
    columns = wide if packed is None else wide * WORD // bits
    block, grid = _grid(base, rows, columns, codes, scales, scheme)
    zeros = None if scheme.symmetric else index.get(f"{base}{ZERO}")
    if zeros is None and not scheme.symmetric:
        raise missing(f"{base}{ZERO}", f"{base}{SCALE}")
    if zeros is not None:
        whole = math.prod(zeros.shape) == math.prod(grid)
        if zeros.dtype == "I8" and whole:
            zeros = replace(zeros, shape=grid)
        elif zeros.dtype != "I32" or zeros.shape != (-(-rows * bits // WORD), grid[1]) or block[0] != 1:
            raise misfit(base, codes, zeros, f"zero points {grid}, in bytes or in words along the rows")
    return CompressedIntegers(codes, replace(scales, shape=grid), zeros, bits, block), (rows, columns)


def _floats(
    base: str, index: Mapping[str, TensorEntry], scheme: QuantizationArgs
) -> tuple[Encoding, tuple[int, ...]]:
    codes, scales = _part(index, base, WEIGHT), index[f"{base}{SCALE}"]
    if scheme.type == "int":
        return _integers(base, index, scheme)
    if scheme.num_bits != 8 or codes.dtype != "F8_E4M3" or len(codes.shape) != 2:
        raise unreadable(f"by compressed-tensors to {scheme.type}{scheme.num_bits}", "moec reads FP8 (E4M3).")
    block, grid = _grid(base, *codes.shape, codes, scales, scheme)
    return fp8_in_blocks(base, codes, replace(scales, shape=grid), block), codes.shape


def _mxfp4(
    base: str,
    index: Mapping[str, TensorEntry],
    scheme: QuantizationArgs,  # noqa: ARG001
) -> tuple[Encoding, tuple[int, ...]]:
    codes, scales = _part(index, base, PACKED), index[f"{base}{SCALE}"]
    if len(codes.shape) != 2 or codes.shape[1] % (MX_BLOCK // 2):
        raise misfit(base, codes, scales, "blocks of 16 bytes")
    rows, wide = codes.shape
    blocks = replace(codes, shape=(rows, wide // (MX_BLOCK // 2), MX_BLOCK // 2))
    return mxfp4(base, blocks, scales), (rows, 2 * wide)


def _part(index: Mapping[str, TensorEntry], base: str, part: str) -> TensorEntry:
    if f"{base}{part}" not in index:
        raise missing(f"{base}{part}", f"{base}{SCALE}")
    return index[f"{base}{part}"]


def _grid(
    base: str, rows: int, columns: int, codes: TensorEntry, scales: TensorEntry, scheme: QuantizationArgs
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns that share a scale, and how many scales that makes each way."""
    block = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, min(scheme.group_size or columns, columns)),
        "block": tuple(scheme.block_structure or (rows, columns)),
    }.get(str(scheme.strategy))
    if block is None:
        raise unreadable(
            f"by compressed-tensors with a scale for each {scheme.strategy}",
            "moec reads scales for a tensor, channel, group or block.",
        )
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    if math.prod(scales.shape) != math.prod(grid) or scales.dtype not in SCALE_TYPES:
        raise misfit(base, codes, scales, f"floating point {grid}")
    return (block[0], block[1]), grid


FORMATS: dict[str, Maker] = {
    "pack-quantized": _integers,
    "int-quantized": _integers,
    "float-quantized": _floats,
    "naive-quantized": _floats,
    "mxfp4-pack-quantized": _mxfp4,
}
"""By the names that the library gives them."""

"""What an expert makes of a token, between the second product of ``many.py`` and the sum of a token's experts.

Numbers are float16 of a sixteenth, as activations are for quantized weights: half the bytes of float32, with an error
of one part in 2048 at most, which is an eighth of what rounding the products' inputs to bfloat16 does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.packed.codes import SPLIT, TYPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.compiler.kernels.emit import Buffer, Expr

RESULT_BYTES = 2


def store_results(results: Buffer, place: Expr, values: Sequence[Expr]) -> None:
    """Store two or four neighbours, at a multiple of as many."""
    scaled = [
        cuda.value("float32", "clamp", value * T.float32(SPLIT.scale), T.float32(SPLIT.largest))
        for value in values
    ]
    words = [cuda.pack(TYPE, *scaled[k : k + 2]) for k in range(0, len(scaled), 2)]
    cuda.call({1: "store_4", 2: "store_8"}[len(words)], cuda.element(results, place), *words)


def values_of(word: Expr) -> list[Expr]:
    """The float32 of two neighbours."""
    return [T.bind(value * T.float32(1 / SPLIT.scale)) for value in cuda.unpack(TYPE, word)]

"""Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.primitives import registers
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import load, loop, store

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Expr

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = (1 << 32) - 1


def uniform(seed: Expr, counter: Expr) -> Expr:
    """The float64 in [0, 1) with 53 bits that `moec.runtime.sampling.uniform` has for the same uint64 numbers."""
    state, key = registers(4, "uint64"), registers(2, "uint64")
    word = T.uint64(WORD)
    for place, start in enumerate((counter & word, counter >> T.uint64(32), T.uint64(0), T.uint64(0))):
        store(state, place, start)
    for place, start in enumerate((seed & word, seed >> T.uint64(32))):
        store(key, place, start)
    with loop(ROUNDS):
        a, b, c, d = (settle(load(state, place)) for place in range(4))
        first, second = settle(a * T.uint64(MULTIPLIERS[0])), settle(c * T.uint64(MULTIPLIERS[1]))
        store(state, 0, (second >> T.uint64(32)) ^ b ^ load(key, 0))
        store(state, 1, second & word)
        store(state, 2, (first >> T.uint64(32)) ^ d ^ load(key, 1))
        store(state, 3, first & word)
        for place in range(2):
            store(key, place, (load(key, place) + T.uint64(WEYL[place])) & word)
    bits = settle((load(state, 1) << T.uint64(32)) | load(state, 0))
    # Divided: TVM prints float64 constants with 15 digits after the point.
    return settle(T.cast(bits >> T.uint64(11), "float64") / T.float64(2.0**53))

"""The instruction, as a function in LLVM's language: TVM's own code generator has no vectors of bfloat16."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.emit import Expr, llvm_functions

if TYPE_CHECKING:
    from collections.abc import Iterator

LANES = 16
"""Pairs of a vector, and float32 sums."""
PAIR = 2
"""Columns of a lane."""
STEP = LANES * PAIR
"""Columns of a vector."""
_NAME = "moec_add_pairs"


@dataclass(frozen=True)
class PairProducts:
    """What adds products of pairs: ``sum + a.low * b.low + a.high * b.high`` in each lane."""

    llvm: str
    """Defines ``<16 x float> @moec_add_pairs(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b)``."""

    @contextmanager
    def defined(self) -> Iterator[None]:
        """Statements in which ``add_pairs`` may be emitted; once a kernel."""
        with llvm_functions(self.llvm):
            yield


def add_pairs(total: Expr, a: Expr, b: Expr) -> Expr:
    """Float32 sums and the products of two vectors of int32, each lane two numbers in bfloat16."""
    return T.call_pure_extern(f"float32x{LANES}", _NAME, total, a, b)


AVX512_BF16 = PairProducts(f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define <16 x float> @{_NAME}(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %added = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %added
}}
""")
"""``vdpbf16ps``: Cooper Lake, Sapphire Rapids, Zen 4 and later. It takes subnormal numbers for zeros."""

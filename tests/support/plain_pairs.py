"""Products of pairs of bfloat16 in plain arithmetic, for processors without the instruction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moec.compiler.kernels.cpu.pair_products import PairProducts

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SIXTEEN = ", ".join(["i32 16"] * 16)
_HIGH = ", ".join(["i32 -65536"] * 16)

PLAIN = PairProducts(f"""
define <16 x float> @moec_add_pairs(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) {{
  %a.low.bits = shl <16 x i32> %a, <{_SIXTEEN}>
  %b.low.bits = shl <16 x i32> %b, <{_SIXTEEN}>
  %a.high.bits = and <16 x i32> %a, <{_HIGH}>
  %b.high.bits = and <16 x i32> %b, <{_HIGH}>
  %a.low = bitcast <16 x i32> %a.low.bits to <16 x float>
  %b.low = bitcast <16 x i32> %b.low.bits to <16 x float>
  %a.high = bitcast <16 x i32> %a.high.bits to <16 x float>
  %b.high = bitcast <16 x i32> %b.high.bits to <16 x float>
  %low = fmul <16 x float> %a.low, %b.low
  %high = fmul <16 x float> %a.high, %b.high
  %first = fadd <16 x float> %sum, %low
  %both = fadd <16 x float> %first, %high
  ret <16 x float> %both
}}
""")
"""In vectors of 16 whatever the processor has: LLVM takes them apart."""


def to_bfloat16(x: torch.Tensor) -> NDArray[Any]:
    """What rounding leaves of activations."""
    values: NDArray[Any] = x.bfloat16().double().numpy()
    return values

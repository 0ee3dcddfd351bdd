from __future__ import annotations

from moec.artifacts.model import ExpertBody
from moec.compiler.kernels.cuda.dense.product import few_group
from moec.compiler.kernels.cuda.experts.beside import experts_beside, fits_beside
from moec.compiler.kernels.cuda.experts.few import gate_up_tiling
from moec.compiler.kernels.cuda.few.tiling import LANES
from moec.compiler.kernels.linear_shape import LinearShape
from moec.compiler.kernels.rows.product import Product


def test_a_wide_product_beside_ungated_experts_has_room_for_two_tiles() -> None:
    """Blocks that take two tiles have two places for sums, where those of the experts need one."""
    body = ExpertBody("wide", 7168, 2048, False, False, False, ("silu", "up"), "bfloat16")
    product = Product((LinearShape(7168, 2048, "bfloat16", None, False),), None, "x")
    assert fits_beside(body, 6, (product,))
    assert few_group(product).tiling(gate_up_tiling(body).threads // LANES).tiles > 1
    assert experts_beside("beside", body, (product,)).params

"""The chosen experts of a few tokens, and in their first launch the product of an expert that every token has.

A shared expert's weights are known before any expert is chosen: the blocks of its product come first in the launch, so
that their weights are on their way while the router still works. What meets its input is made with the router's
product, so this is its second one; where a segment has more products, the others have launches of their own between
the two of the experts, for in the second one there are no registers left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.dense.few import emit_linear_few
from moec.compiler.kernels.cuda.dense.parameters import parameters
from moec.compiler.kernels.cuda.dense.product import ProductKernel, few_group
from moec.compiler.kernels.cuda.experts.call import ExpertCall
from moec.compiler.kernels.cuda.experts.down_few import emit_down_few
from moec.compiler.kernels.cuda.experts.few import emit_gate_up_few, gate_up_tiling, runs_few
from moec.compiler.kernels.cuda.experts.step import MOST_CHOSEN
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS, LANES
from moec.compiler.kernels.emit import Argument, arguments, build, symbol

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.rows.product import Product

MOST_PRODUCTS = 2
"""Of a segment."""
MOST_TOKENS = FEW_TOKENS
"""Of a step: as many as a shared expert has the same bits for."""


def fits_beside(body: ExpertBody, top_k: int, products: tuple[Product, ...]) -> bool:
    """Whether the first of some products can go with the experts of ``body``: in blocks as large as theirs."""
    alone = all(product.shapes[0].batch is None and not product.keeps for product in products)
    if not products or not alone or not runs_few(body) or top_k > MOST_CHOSEN:
        return False
    group = few_group(products[0])
    if not group.on_tensor_cores:
        return False
    try:
        group.tiling(_warps(body))
    except ValueError:
        return False
    return True


def _warps(body: ExpertBody) -> int:
    return gate_up_tiling(body).threads // LANES


def experts_beside(
    name: str, body: ExpertBody, products: tuple[Product, ...], *, cached: bool = False
) -> tirx.PrimFunc:
    """The kernel ``name(x, index, weight, table, workspace, products'..., out)`` for a few tokens.

    Arguments as ``experts`` has them, and those of each product as ``product`` has them. Results are the same as
    theirs, those of experts to the bit. With ``cached`` it is ``name(x, index, weight, table, state, workspace, ...)``
    and runs beside ``fetch_experts``, as ``experts_cached`` does: the first product fills the time in which experts are
    on their way.
    """

    def emit() -> None:
        tokens, chosen, count, size = symbol("T"), symbol("K"), symbol("E"), symbol("W")
        own = [
            Argument("x", (tokens, body.hidden), "float32"),
            Argument("index", (tokens, chosen), "int64"),
            Argument("weight", (tokens, chosen), "float32"),
            Argument("table", (count,), "int64"),
        ]
        if cached:
            own.append(Argument("state", (symbol("S"),), "int64"))
        own.append(Argument("workspace", (size,), "uint8"))
        theirs = [parameters(product, tokens) for product in products]
        out = Argument("out", (tokens, body.hidden), "float32")
        buffers = arguments(*own, *(item for each in theirs for item in each), out)
        x, index, weight, table = buffers[:4]
        workspace, state = buffers[len(own) - 1], buffers[4] if cached else None
        call = ExpertCall(x, index, weight, table, workspace, buffers[-1], tokens, chosen, count)
        middle = T.decl_buffer(workspace.shape, "uint16", data=workspace.data, align=64)
        kernels, start = [], len(own)
        for product, each in zip(products, theirs, strict=True):
            kernels.append(ProductKernel(product, tokens, buffers[start : start + len(each)]))
            start += len(each)
        emit_gate_up_few(body, call, middle, state=state, beside=kernels[0].few(_warps(body)))
        for kernel in kernels[1:]:
            emit_linear_few(kernel.few())
        emit_down_few(body, call, middle, state=state)

    return build(name, emit)

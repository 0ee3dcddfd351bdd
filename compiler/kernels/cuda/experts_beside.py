"""The chosen experts of a few tokens, and in the same launch the first product of an expert that every token has.

A shared expert's weights are known before any expert is chosen: the blocks of its first product come first in the
launch, so that their weights are on their way while the router still works. On an H100 this saved a step of one token 6
of 27 us in front of the launch and in it, and a step of eight nothing. The second products stay apart: together they
had too few registers, and took 25 us instead of 18.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.experts_down_few import MOST_CHOSEN, emit_down_few
from moec.compiler.kernels.cuda.experts_few import ExpertCall, emit_gate_up_few, gate_up_tiling, runs_few
from moec.compiler.kernels.cuda.linear_few import emit_linear_few
from moec.compiler.kernels.cuda.product import ProductKernel, few_group
from moec.compiler.kernels.cuda.product_parameters import parameters
from moec.compiler.kernels.emit import Argument, arguments, build, symbol

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.rows.product import Product

MOST_TOKENS = 4
"""Of a step for which it pays."""


def fits_beside(body: ExpertBody, top_k: int, products: tuple[Product, Product]) -> bool:
    """Whether the first of two products can go with the experts of ``body``: its blocks are as large as theirs."""
    alone = all(product.shapes[0].batch is None and not product.keeps for product in products)
    if not alone or not runs_few(body) or top_k > MOST_CHOSEN:
        return False
    group = few_group(products[0])
    return group.on_tensor_cores and group.tiling().threads == gate_up_tiling(body).threads


def experts_beside(
    name: str, body: ExpertBody, products: tuple[Product, Product], *, cached: bool = False
) -> tirx.PrimFunc:
    """The kernel ``name(x, index, weight, table, workspace, first's..., second's..., out)`` for a few tokens.

    Arguments as ``experts`` has them, and those of the two products as ``product`` has them. Results are the same as
    theirs, to the bit. With ``cached`` it is ``name(x, index, weight, table, state, workspace, ...)`` and runs beside
    ``fetch_experts``, as ``experts_cached`` does: the first product fills the time in which experts are on their way.
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
        buffers = arguments(*own, *theirs[0], *theirs[1], out)
        x, index, weight, table = buffers[:4]
        workspace, state = buffers[len(own) - 1], buffers[4] if cached else None
        call = ExpertCall(x, index, weight, table, workspace, buffers[-1], tokens, chosen, count)
        middle = T.decl_buffer(workspace.shape, "uint16", data=workspace.data, align=64)
        first, second = len(own), len(own) + len(theirs[0])
        shared = [
            ProductKernel(products[0], tokens, buffers[first:second]),
            ProductKernel(products[1], tokens, buffers[second:-1]),
        ]
        emit_gate_up_few(body, call, middle, state=state, beside=shared[0].few())
        emit_linear_few(shared[1].few())
        emit_down_few(body, call, middle, state=state)

    return build(name, emit)

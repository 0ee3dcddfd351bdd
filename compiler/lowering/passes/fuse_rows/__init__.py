"""All operators between two products become one kernel: a block for each token computes its rows.

Before::

    lv = R.add(x0, x1)                                   # [1, T, 2048]
    lv1 = R.mean(R.multiply(lv, lv), axis=[-1])          # and so on: a norm
    lv9 = R.call_tir(cls.linear_3072_2048_bfloat16, (lv8, w1), ...)
    lv10 = R.split(R.permute_dims(R.reshape(lv9, ...)))  # and so on: rotary embedding

After::

    rows = R.call_tir(cls.rows_0, (x0, x1, w0), out_ty=[lv's type, lv8's type])
    lv9 = R.call_tir(cls.linear_3072_2048_bfloat16, (rows[1], w1), ...)
    rows_1 = R.call_tir(cls.rows_1, (lv9, cos, sin), out_ty=...)

Products have a *level*: how many products lie before them on the longest way. Everything that needs products up to
one level is one region; what is cheap is computed again in a later region rather than kept. An operator whose loops
are no rows is left as it is, and counts as a product.
"""

from moec.compiler.lowering.passes.fuse_rows.fuse import FuseRows
from moec.compiler.lowering.passes.fuse_rows.records import KEPT

__all__ = ["KEPT", "FuseRows"]

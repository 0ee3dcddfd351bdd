"""What the kernels compute, in plain numpy and float64: the definition that tests hold every target to."""

from moec.compiler.kernels.reference.activation import activate
from moec.compiler.kernels.reference.attention import attention, expand_latents
from moec.compiler.kernels.reference.capacity import keep_within_capacity
from moec.compiler.kernels.reference.experts import experts
from moec.compiler.kernels.reference.linear import linear
from moec.compiler.kernels.reference.selection import select
from moec.compiler.kernels.reference.states import advance

__all__ = [
    "activate",
    "advance",
    "attention",
    "expand_latents",
    "experts",
    "keep_within_capacity",
    "linear",
    "select",
]

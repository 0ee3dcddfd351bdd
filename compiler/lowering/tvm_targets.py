"""TVM's own descriptions of our targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm

if TYPE_CHECKING:
    from moec.compiler.lowering.targets import Target

CODEGEN_ARCHITECTURE = "sm_80"
"""What TVM generates CUDA source for: the oldest architecture, since one source serves all of them."""


def host_target(target: Target) -> tvm.target.Target:
    """The code that runs on the host."""
    return tvm.target.Target(
        {"kind": "llvm", "mcpu": target.mcpu, "mtriple": f"{target.machine}-unknown-linux-gnu"}
    )


def cuda_target(target: Target) -> tvm.target.Target:
    """The code that runs on the GPU, with its host."""
    device = tvm.target.Target({"kind": "cuda", "arch": CODEGEN_ARCHITECTURE})
    return device.with_host(host_target(target))

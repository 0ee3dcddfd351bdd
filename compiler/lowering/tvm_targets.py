"""TVM's own descriptions of our targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm

if TYPE_CHECKING:
    from moec.compiler.lowering.targets import Target

CODEGEN_ARCHITECTURE = "sm_80"
"""What TVM generates CUDA source for: the oldest architecture, since one source serves all of them."""


LLVM_FEATURES = {
    "x86-64-v4-vnni": ("x86-64-v4", ("+avx512vnni",)),
    "x86-64-v4-bf16": ("x86-64-v4", ("+avx512vnni", "+avx512bf16")),
}
"""How LLVM knows those instruction sets of which it has no name: by another's, and what they have more."""


def host_target(target: Target) -> tvm.target.Target:
    """The code that runs on the host."""
    mcpu, features = LLVM_FEATURES.get(target.mcpu, (target.mcpu, ()))
    described = {"kind": "llvm", "mcpu": mcpu, "mtriple": f"{target.machine}-unknown-linux-gnu"}
    return tvm.target.Target(described | ({"mattr": list(features)} if features else {}))


def cuda_target(target: Target) -> tvm.target.Target:
    """The code that runs on the GPU, with its host."""
    device = tvm.target.Target({"kind": "cuda", "arch": CODEGEN_ARCHITECTURE})
    return device.with_host(host_target(target))

"""Stage ``quantize``: which weights are stored in which format. Records change; no weight is read."""

from moec.compiler.quantization.apply import quantize
from moec.compiler.quantization.policies import POLICIES, policy_named, read_policy

__all__ = ["POLICIES", "policy_named", "quantize", "read_policy"]

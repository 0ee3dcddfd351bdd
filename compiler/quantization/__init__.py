"""Stage ``quantize``: which weights are stored in which format. Records change; no weight is read."""

from moec.compiler.quantization.apply import has_formats, quantize
from moec.compiler.quantization.kept import Kept, kept_formats
from moec.compiler.quantization.policies import POLICIES, policy_named, read_policy

__all__ = ["POLICIES", "Kept", "has_formats", "kept_formats", "policy_named", "quantize", "read_policy"]

"""The largest model there is, without a weight of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, resource, time
import transformers
from moec.artifacts.model import GenerationDefaults
from moec.compiler.partition import partition
from moec.compiler.trace import trace

begin = time.monotonic()
rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
config = transformers.DeepseekV3Config(max_position_embeddings=163840, rope_parameters=rope).to_dict()
traced = trace(config, dtype="bfloat16", max_context=4096)
parts = partition(traced, generation=GenerationDefaults(0, (1,), None, False, 1.0, 50, 1.0, 1.0), config_sha256="0")
print(json.dumps({
    "seconds": time.monotonic() - begin,
    "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "segments": len(parts.functions),
    "experts": [parts.model.experts[-1].experts, len(parts.model.experts)],
    "cached": parts.model.attentions[0].key_dim,
}))
"""


@pytest.mark.slow
def test_deepseek_v3_is_traced_and_partitioned_in_little_memory() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["segments"] == 6
    assert measured["experts"] == [256, 58]
    assert measured["cached"] == 576
    assert measured["resident_bytes"] < 2 * 2**30
    assert measured["seconds"] < 300

"""Bundle to tokens: ``runtime.load(path)`` gives a `Model`; under it an `Engine` that a server can drive.

Importing this loads numpy and little else: TVM's runtime, the tokenizer and the schema validator come with
the first use.
"""

from moec.runtime.engine import Engine, Limits, Request, Sequence, TokenOutput
from moec.runtime.loading.load import load
from moec.runtime.model import Model
from moec.runtime.moe import MoE, MoEConfig
from moec.runtime.sampling import Sampling
from moec.runtime.stats import Stats
from moec.runtime.streamers import Streamer, TextStreamer
from moec.runtime.tokenizer import Tokenizer

__all__ = [
    "Engine",
    "Limits",
    "MoE",
    "MoEConfig",
    "Model",
    "Request",
    "Sampling",
    "Sequence",
    "Stats",
    "Streamer",
    "TextStreamer",
    "TokenOutput",
    "Tokenizer",
    "load",
]

"""Stage ``checkpoint``: a folder, GGUF file or hub id -> config, side files, an index of tensors; no weight is read."""

from moec.artifacts.fingerprint import config_sha256
from moec.compiler.checkpoint.opening import fetch_weights, open_checkpoint, with_table
from moec.compiler.checkpoint.record import Checkpoint, TensorEntry
from moec.compiler.checkpoint.tokenizer import with_tokenizer

__all__ = [
    "Checkpoint",
    "TensorEntry",
    "config_sha256",
    "fetch_weights",
    "open_checkpoint",
    "with_table",
    "with_tokenizer",
]

"""Stage ``checkpoint``: a folder or hub id -> config, side files, an index of tensors; no weight is read."""

from moec.artifacts.fingerprint import config_sha256
from moec.compiler.checkpoint.opening import fetch_weights, open_checkpoint, with_table
from moec.compiler.checkpoint.record import Checkpoint, TensorEntry

__all__ = ["Checkpoint", "TensorEntry", "config_sha256", "fetch_weights", "open_checkpoint", "with_table"]

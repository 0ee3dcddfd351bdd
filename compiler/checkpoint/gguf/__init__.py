"""GGUF files as checkpoints: headers through the gguf package, configs, names and tokenizers by tables of ours."""

from moec.compiler.checkpoint.gguf.checkpoint import holds_gguf, is_gguf, read_gguf

__all__ = ["holds_gguf", "is_gguf", "read_gguf"]

"""GGUF files as checkpoints: configs, names and tokenizers by tables of ours, blocks by the gguf package."""

from moec.compiler.checkpoint.gguf.checkpoint import holds_gguf, is_gguf, read_gguf

__all__ = ["holds_gguf", "is_gguf", "read_gguf"]

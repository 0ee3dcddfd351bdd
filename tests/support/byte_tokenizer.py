"""A tokenizer with a token for each byte, so that every character beyond ASCII is split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from pathlib import Path

END = 256
"""The id of ``<end>``, a special token."""
VOCAB = 257


def bytes_tokenizer() -> Backend:
    """One token a byte, and ``<end>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return backend


def save(folder: Path) -> Path:
    """Write it as a bundle's ``tokenizer/`` has it; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    bytes_tokenizer().save(str(folder / "tokenizer.json"))
    return folder

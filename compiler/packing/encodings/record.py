"""What a way of storing quantized weights has to say of itself, for packing to read it and carry its codes over."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from moec.compiler.checkpoint.record import TensorEntry
    from moec.formats import Format


class Parts(Protocol):
    """The tensors of the checkpoint that one quantized weight consists of, while it is read."""

    def rows(self, entry: TensorEntry, begin: int, end: int) -> torch.Tensor:
        """Rows ``begin .. end`` along the first dimension of ``entry``, in memory of their own."""

    def whole(self, entry: TensorEntry) -> torch.Tensor:
        """All of ``entry``, read once and kept until the weight is done: for what is small or not stored by rows."""


class Encoding(Protocol):
    """How one quantized weight is stored: a matrix ``[N, K]``, or a batch of them that is only read by ``item``."""

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """All that is read, codes first."""

    @property
    def format(self) -> str | None:
        """The name of the format that says the same, bit for bit; None where there is none."""

    @property
    def obstacle(self) -> str:
        """Why there is no such format, as in "they have ..."; empty where there is one."""

    @property
    def row_step(self) -> int:
        """Rows that share a scale: those read together begin at a multiple of it."""

    def item(self, number: int) -> Encoding:
        """Matrix ``number`` of a batch."""

    def values(self, begin: int, end: int, parts: Parts) -> torch.Tensor:
        """What rows ``begin .. end`` stand for, float32 ``[n, K]``."""

    def packed(self, kind: Format, begin: int, end: int, parts: Parts) -> torch.Tensor:
        """The same rows in the format ``kind`` that has the name ``format``, uint8 ``[n, row_bytes]``."""


class Encoded(NamedTuple):
    """A quantized weight of a checkpoint."""

    encoding: Encoding
    shape: tuple[int, ...]
    """Of its values."""
    parts: tuple[str, ...]
    """The tensors of the checkpoint that it consists of, and those that belong to it and are of no use here."""
    turned: bool = False
    """Its last two dimensions are the other way round than those of transformers' parameter."""
    stand_in: str | None = None
    """A format that its values are rounded to, rather than to 16 bits, where its codes are not carried over."""

"""What packing asks of a method that rounds experts by what enters them on calibration tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from moec.compiler.packing.experts import whole_parts
from moec.compiler.packing.quantizing import not_stored
from moec.formats.feedback import takes_feedback

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from moec.artifacts.ids import LayerId
    from moec.compiler.packing.experts import ExpertReader, ExpertsFile, Piece
    from moec.formats import Format


class LayerRounding(Protocol):
    """Rounds the experts of one layer, in one thread."""

    def rows(
        self, expert: int, kind: Format, parts: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        """The packed rows, uint8 ``[N, row_bytes]``, of an expert's matrices, by the names of its parts.

        Args:
            expert: its number.
            kind: the format of all matrices.
            parts: matrices and biases, float32, by their names in `moec.artifacts.layout.experts.layout`.

        Raises:
            ValueError: a value is not finite.
        """


class CalibratedRounding(Protocol):
    """Rounds all experts of a model; it may be asked in several threads at once."""

    @property
    def identity(self) -> str:
        """What its results depend on besides the weights."""

    @property
    def thread_bytes(self) -> int:
        """What a thread holds at most to round the experts of a layer."""

    def layer(self, layer: LayerId) -> LayerRounding:
        """For the experts of one layer."""


def is_rounded(file: ExpertsFile) -> bool:
    """Whether such a method makes the codes of these experts: whole numbers, which the checkpoint does not have."""
    return file.quantizer is not None and takes_feedback(file.quantizer.kind) and not file.carried


def rounded_pieces(reader: ExpertReader, rounding: LayerRounding, expert: int) -> Iterator[Piece]:
    """The parts of one expert, as bytes; all of it is held.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    quantizer = reader.file.quantizer
    assert quantizer is not None
    parts = whole_parts(reader.pieces(expert))
    values = {name: piece.values.float() for name, piece in parts.items()}
    try:
        rows = rounding.rows(expert, quantizer.kind, values)
    except ValueError as error:
        raise not_stored(f"{reader.file.source.down}[{expert}]", quantizer.kind, error) from error
    for part in reader.file.layout.parts:
        piece = parts[part.name]
        yield piece._replace(values=rows.get(part.name, piece.values), quantizer=None)

"""The bytes of one expert as a sequence of pieces, in the canonical order of ``artifacts.layout.experts``."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from moec.artifacts.layout.experts import ExpertLayout, ExpertPart, layout
from moec.compiler.packing.tensors.binding import Binding, Converted, Stacked, convert_expert, expert_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from moec.artifacts.model import ExpertBody, ExpertsLayer
    from moec.artifacts.packing import ExpertSource
    from moec.compiler.packing.quantizing import Quantizer
    from moec.compiler.packing.tensors.reading import Reading, TensorReader
    from moec.compiler.packing.tensors.stored import Stored


class Piece(NamedTuple):
    """Some rows of a part of an expert."""

    parameter: str
    part: ExpertPart
    values: torch.Tensor
    """Contiguous; valid until the next piece is asked for. Float32 where they are to be quantized, bytes of rows where
    the checkpoint has them in the part's format already."""
    quantizer: Quantizer | None
    """What makes the part's bytes of them; None: they are stored as they are."""


@dataclass(frozen=True)
class ExpertsFile:
    """All experts of one layer, to be written one after the other."""

    layer: ExpertsLayer
    layout: ExpertLayout
    quantizer: Quantizer | None
    """Of matrices."""
    body: ExpertBody
    source: ExpertSource
    parameters: Mapping[str, Binding]
    dtypes: Mapping[str, torch.dtype]
    """Parameter -> element type that its tensors are read as."""

    @property
    def name(self) -> str:
        """File name in ``weights/``."""
        return f"experts-{self.layer.layer:05d}.bin"

    @property
    def carried(self) -> bool:
        """Whether the checkpoint has all matrices in the file's format already."""
        kind = None if self.quantizer is None else self.quantizer.kind.name
        sources = (self.source.up, self.source.down)
        return all(stored_format(self.source, self.parameters[name]) == kind for name in sources)

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return self.layer.experts * self.layout.stride_bytes


def experts_file(
    layer: ExpertsLayer,
    body: ExpertBody,
    source: ExpertSource,
    parameters: Mapping[str, Binding],
    dtypes: Mapping[str, torch.dtype],
    quantizer: Quantizer | None,
) -> ExpertsFile:
    """Describe the file of ``layer``."""
    return ExpertsFile(layer, layout(body), quantizer, body, source, parameters, dtypes)


def is_turned(source: ExpertSource, binding: Binding) -> bool:
    """Whether what is stored for a parameter of matrices is input-major, and has to be transposed."""
    return source.transposed != (not isinstance(binding, Converted) and binding.transposed)


def stored_format(source: ExpertSource, binding: Binding) -> str | None:
    """The format that the checkpoint has a parameter of matrices in, so that codes can be carried over."""
    if isinstance(binding, Converted) or is_turned(source, binding):
        return None
    found = {stored.format for stored in binding.stored_tensors}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class ExpertReader:
    """Reads the experts of one layer, in one thread."""

    file: ExpertsFile
    reader: TensorReader
    model: PreTrainedModel
    """On the meta device, for transformers' own conversions."""
    hold: Callable[[int], None]
    """Called with the bytes that are about to be held beyond a piece."""

    def pieces(self, expert: int) -> Iterator[Piece]:
        """Every byte of one expert, padding excepted, front to back; nothing of another expert is read."""
        source, gated = self.file.source, self.file.body.gated
        parts = {
            source.up: ("gate", "up") if gated else ("up",),
            source.up_bias: ("gate_bias", "up_bias") if gated else ("up_bias",),
            source.down: ("down",),
            source.down_bias: ("down_bias",),
        }
        for parameter, names in parts.items():
            if parameter is not None:
                yield from self._parameter(parameter, [self.file.layout.part(name) for name in names], expert)

    def _parameter(self, parameter: str, parts: Sequence[ExpertPart], expert: int) -> Iterator[Piece]:
        source = self.file.source
        matrix = parameter in (source.up, source.down)
        quantizer = self.file.quantizer if matrix else None
        as_: Reading = self.file.dtypes[parameter] if quantizer is None else torch.float32
        body, binding = self.file.body, self.file.parameters[parameter]
        alternating = isinstance(binding, Stacked) and binding.alternating
        mixed = len(parts) > 1 and source.interleaved != alternating
        held = 4 * sum(part.size_bytes for part in parts)
        if quantizer is not None and quantizer.kind.name == stored_format(source, binding):
            as_ = quantizer.kind
            quantizer = None
        elif quantizer is not None:
            held = 2 * len(parts) * body.hidden * body.intermediate * torch.float32.itemsize
        turned = matrix and is_turned(source, binding)
        if isinstance(binding, Converted):
            self.hold(held)
            whole = convert_expert(binding, expert, lambda stored: self.reader.whole(stored, as_), self.model)
        else:
            tensors = expert_tensors(binding, expert)
            if not turned and not mixed:
                yield from _streamed(parameter, parts, tensors, self.reader, as_, quantizer)
                return
            self.hold(held)
            loaded = [self.reader.whole(stored, as_) for stored in tensors]
            whole = loaded[0] if len(loaded) == 1 else torch.cat(loaded)
        yield from _split(parameter, parts, whole.mT if turned else whole, quantizer, mixed=mixed)


def whole_parts(pieces: Iterable[Piece]) -> dict[str, Piece]:
    """The parts of one expert by their names, each in one piece with memory of its own; biases are vectors."""
    read: dict[str, list[torch.Tensor]] = defaultdict(list)
    last: dict[str, Piece] = {}
    for piece in pieces:
        last[piece.part.name] = piece
        read[piece.part.name].append(piece.values.clone())
    parts = {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in read.items()}
    return {
        name: last[name]._replace(values=values.reshape(-1) if name.endswith("bias") else values)
        for name, values in parts.items()
    }


def _split(
    parameter: str,
    parts: Sequence[ExpertPart],
    whole: torch.Tensor,
    quantizer: Quantizer | None,
    *,
    mixed: bool,
) -> Iterator[Piece]:
    """Cut ``whole`` (``[2I, H]``, ``[2I]``, ...) into ``parts``: halves, or if ``mixed`` every second row."""
    count, size = len(parts), parts[0].shape[0]
    for number, part in enumerate(parts):
        rows = whole[number::count] if mixed else whole[number * size : (number + 1) * size]
        yield Piece(parameter, part, rows.contiguous(), quantizer)


def _streamed(
    parameter: str,
    parts: Sequence[ExpertPart],
    tensors: Sequence[Stored],
    reader: TensorReader,
    as_: Reading,
    quantizer: Quantizer | None,
) -> Iterator[Piece]:
    """The rows of ``tensors``, one below the other, are the rows of ``parts``: nothing is held."""
    top = 0
    for part in parts:
        first, last = top, top + part.shape[0]
        above = 0
        for stored in tensors:
            begin, end = max(first - above, 0), min(last - above, stored.rows)
            if begin < end:
                for values in reader.pieces(stored, begin, end, as_):
                    yield Piece(parameter, part, values, quantizer)
            above += stored.rows
        top = last

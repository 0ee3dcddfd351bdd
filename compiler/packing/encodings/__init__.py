"""How quantized checkpoints store their weights, a file an encoding; ``published`` knows which has which."""

from moec.compiler.packing.encodings.published import encoded_weights
from moec.compiler.packing.encodings.record import Encoded, Encoding, Parts

__all__ = ["Encoded", "Encoding", "Parts", "encoded_weights"]

"""Stage ``pack``: weights streamed into the bundle's layout, in bounded memory, resumable."""

from moec.compiler.packing.output import PackedFile, Progress
from moec.compiler.packing.pack import PackResult, check_weights, forget_journal, pack

__all__ = ["PackResult", "PackedFile", "Progress", "check_weights", "forget_journal", "pack"]

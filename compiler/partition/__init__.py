"""Stage ``partition``: a whole model's graph becomes a chain of distinct segments, cut at the markers."""

from moec.compiler.partition.partition import partition
from moec.compiler.partition.records import PartitionedModel, SegmentGraph

__all__ = ["PartitionedModel", "SegmentGraph", "partition"]

"""Continuous batching: sequences join and leave the running batch at step boundaries, over a paged cache."""

from moec.runtime.engine.engine import Engine
from moec.runtime.engine.scheduler import Limits
from moec.runtime.engine.sequence import Request, Sequence, TokenOutput

__all__ = ["Engine", "Limits", "Request", "Sequence", "TokenOutput"]

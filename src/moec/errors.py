"""Errors for the person who sees them: each kind has an exit code, each message says what, why, what to do."""

from __future__ import annotations


class MoecError(Exception):
    """Base of every error that moec raises on purpose.

    Args:
        what: what happened, one sentence.
        why: the cause as far as known.
        do: what the reader can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        super().__init__(what, why, do)
        self.what, self.why, self.do = what, why, do

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.do) if part)


class UsageError(MoecError):
    """Wrong usage: options name what there is not, or contradict each other."""

    exit_code = 2


class CheckpointError(MoecError):
    """The checkpoint is missing, damaged, or does not match its own config."""

    exit_code = 3


class UnsupportedModelError(MoecError):
    """The checkpoint is readable, but moec cannot compile this model."""

    exit_code = 4


class CompileError(MoecError):
    """A stage of the compiler failed on a model that it should support."""

    exit_code = 5


class BundleError(MoecError):
    """The bundle is missing, damaged, or of a format this moec does not read."""

    exit_code = 6


class OutputError(MoecError):
    """The output cannot be written: it exists, the disk is full, or permissions forbid it."""

    exit_code = 7


class BudgetError(MoecError):
    """A memory budget is too small, or memory ran out."""

    exit_code = 8


class DeviceError(MoecError):
    """This machine cannot run any module in the bundle."""

    exit_code = 9


class RequestError(MoecError):
    """A generation request is out of range: too long, a bad token id, a bad sampling option."""

    exit_code = 10


class NetworkError(MoecError):
    """A model hub could not be reached, or an address is not free to listen at."""

    exit_code = 11


class MissingDependencyError(MoecError):
    """An optional package that this command needs is not installed."""

    exit_code = 12

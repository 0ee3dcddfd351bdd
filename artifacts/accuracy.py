"""``accuracy.json``: how close a bundle computes to the checkpoint it was made of, as `moec verify` measured it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.files.records import read_record, write_record
from moec.artifacts.files.update import rewrite
from moec.artifacts.model import DType
from moec.artifacts.paths import ACCURACY_NAME

if TYPE_CHECKING:
    from moec.artifacts.files.bundle import Bundle


@dataclass(frozen=True)
class Agreement:
    """How close two models' next-token distributions are, teacher-forced, over ``tokens`` positions."""

    tokens: int
    argmax_agreement: float
    """Share of positions whose likeliest token is the same."""
    mean_kl: float
    """Mean Kullback-Leibler divergence from the reference, in nats."""
    kl_99: float
    """Its 99th percentile: of a hundred positions one is further off."""
    max_kl: float
    reference_perplexity: float
    perplexity: float


@dataclass(frozen=True)
class Comparison:
    """One run of ``moec verify --reference``."""

    reference: str
    """The checkpoint, as the person gave it: a hub id, or the last part of a path."""
    fingerprint: str
    """Of that checkpoint; see `moec.artifacts.files.manifest.model_fingerprint`."""
    reference_dtype: DType
    """What the reference computed in."""
    target: str
    """The compiled target that ran."""
    text: str
    """``shipped prompts``, ``random tokens``, or ``sha256:`` and the hash of the text that was given."""
    agreement: Agreement

    @property
    def subject(self) -> tuple[str, str, str, str]:
        """What a later run of the same comparison has in common with this one."""
        return self.fingerprint, self.reference_dtype, self.target, self.text


@dataclass(frozen=True)
class AccuracyRecord:
    """The whole of ``accuracy.json``."""

    comparisons: tuple[Comparison, ...]


def read_accuracy(bundle: Bundle) -> AccuracyRecord:
    """What was measured of the bundle so far; no comparison where it was never verified against a reference."""
    if ACCURACY_NAME not in bundle.manifest.files:
        return AccuracyRecord(())
    return read_record(AccuracyRecord, "accuracy", bundle.path / ACCURACY_NAME)


def add_comparison(bundle: Bundle, comparison: Comparison) -> None:
    """Put ``comparison`` into the bundle, in the place of an earlier one of the same subject.

    Raises:
        OutputError: the bundle's folder cannot be written.
    """
    known = read_accuracy(bundle).comparisons
    others = tuple(other for other in known if other.subject != comparison.subject)
    record = AccuracyRecord((*others, comparison))
    rewrite(bundle, {ACCURACY_NAME: lambda path: write_record(record, path)})

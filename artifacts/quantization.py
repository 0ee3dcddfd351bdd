"""Which weights are stored in which format: what ``--quantization FILE`` reads, and ``packing.json`` keeps."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from moec.formats import ALIASES, FORMATS

PLAIN = "plain"
"""Stands for no format: values of the model's own type."""
KEEP = "keep"
"""Stands for the format that the checkpoint has a weight in, so that its codes are carried over; else for `PLAIN`."""

Role: TypeAlias = Literal["experts", "linear", "router", "embedding", "head"]

ROLES: dict[Role, str] = {
    "experts": "the matrices of routed experts",
    "linear": "every other matrix that activations are multiplied with: attention, shared experts, dense MLPs",
    "router": "the products that experts are chosen by",
    "embedding": "the table that tokens are looked up in",
    "head": "the product that gives the logits",
}


@dataclass(frozen=True)
class FormatRule:
    """A format for weights by their names."""

    match: str
    """Of parameters of the transformers model, with ``*`` for anything: ``model.layers.0.*``."""
    format: str
    """In ``moec.formats.FORMATS`` or ``ALIASES``, or ``plain`` or ``keep``."""


@dataclass(frozen=True)
class Quantization:
    """A policy: the first of ``rules`` that matches says a weight's format, else its role does."""

    name: str
    method: str
    """What makes codes of values: in ``moec.formats.METHODS``."""
    roles: dict[str, str]
    """Role to format; a role that is not there is ``plain``."""
    rules: tuple[FormatRule, ...]

    def format_for(self, name: str, role: Role, kept: str | None = None) -> str | None:
        """The long name of the format for a parameter called ``name``; None: plain.

        Args:
            name: in transformers.
            role: what it does.
            kept: the format that the checkpoint has it in.
        """
        found = next((rule.format for rule in self.rules if fnmatchcase(name, rule.match)), None)
        asked = self.roles.get(role, PLAIN) if found is None else found
        return {PLAIN: None, KEEP: kept}.get(asked, ALIASES.get(asked, asked))

    @property
    def keeps(self) -> bool:
        """Whether anything depends on how the checkpoint has it."""
        return KEEP in (*self.roles.values(), *(rule.format for rule in self.rules))


def quantization_problems(policy: Quantization, methods: tuple[str, ...]) -> list[str]:
    """What in a policy no moec of this version can do, one sentence each."""
    known = (PLAIN, KEEP, *ALIASES, *FORMATS)
    asked = [*policy.roles.values(), *(rule.format for rule in policy.rules)]
    problems = [
        f"there is no format {name}; there are {', '.join(known)}" for name in asked if name not in known
    ]
    problems += [
        f"there is no role {role}; there are {', '.join(ROLES)}" for role in policy.roles if role not in ROLES
    ]
    if policy.method not in methods:
        problems.append(f"there is no method {policy.method}; there are {', '.join(methods)}")
    return problems

"""Which weights are stored in which format: what ``--quantization FILE`` reads, and ``packing.json`` keeps."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from moec.formats import ALIASES, FORMATS

PLAIN = "plain"
"""Stands for no format: values of the model's own type."""

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
    """In ``moec.formats.FORMATS`` or ``ALIASES``, or ``plain``."""


@dataclass(frozen=True)
class Quantization:
    """A policy: the first of ``rules`` that matches says a weight's format, else its role does."""

    name: str
    method: str
    """What makes codes of values: in ``moec.formats.METHODS``."""
    roles: dict[str, str]
    """Role to format; a role that is not there is ``plain``."""
    rules: tuple[FormatRule, ...]

    def format_for(self, name: str, role: Role) -> str | None:
        """The long name of the format for a parameter called ``name``; None: plain."""
        found = next((rule.format for rule in self.rules if fnmatchcase(name, rule.match)), None)
        asked = self.roles.get(role, PLAIN) if found is None else found
        return None if asked == PLAIN else ALIASES.get(asked, asked)


def quantization_problems(policy: Quantization, methods: tuple[str, ...]) -> list[str]:
    """What in a policy no moec of this version can do, one sentence each."""
    known = (PLAIN, *ALIASES, *FORMATS)
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

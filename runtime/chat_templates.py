"""Chat templates: Jinja in a sandbox, with the helpers that transformers gives to them and nothing else."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from moec.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2.parser import Parser

_RAISED = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""By the expressions of a template, on values that it was not written for."""


class Generation(Extension):  # type: ignore[misc]
    """``{% generation %}``, by which templates mark what assistants say, for training: text as any other."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        """Of a block what is in it; names that it sets are its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class PlainNamespace(Namespace):  # type: ignore[misc]
    """Attributes that a template sets, but for those that Python has on all objects."""

    def __init__(self, /, *values: Any, **named: Any) -> None:
        own = dict(*values, **named)
        for name in own:
            _check_attribute(name)
        super().__init__(own)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def check_template(template: str, source: str) -> None:
    """Raise `RequestError` where a chat template is none; ``source`` is where it comes from."""
    compile_template(template, source)


def compile_template(template: str, source: str) -> Template:
    """A template, ready to be rendered.

    Raises:
        RequestError: it is none; the message names ``source``.
    """
    try:
        return _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise RequestError(
            f"{source} is no chat template.", f"Line {error.lineno}: {error.message}.", "Correct it."
        ) from error


def render(template: Template, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
    """The text of a conversation; there are no tools and no documents.

    Raises:
        RequestError: the template refuses these messages.
    """
    own = {"tools": None, "documents": None, **values, "messages": list(map(_with_thinking, messages))}
    try:
        return str(template.render(own))
    except (TemplateError, *_RAISED) as error:
        raise RequestError(
            "The chat template refuses this conversation.", f"{error}.", "Change the messages."
        ) from error


def _with_thinking(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose reasoning has the name too by which gpt-oss' templates know it."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"thinking": reasoning, **message}


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    environment.globals["namespace"] = PlainNamespace
    return environment


def _check_attribute(name: str) -> None:
    if name.startswith("__"):
        raise SecurityError(f"a namespace has no attribute {name}")


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().replace(tzinfo=None).strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own it escapes nothing for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

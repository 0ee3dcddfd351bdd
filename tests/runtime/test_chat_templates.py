"""Chat templates, against what transformers renders."""

from __future__ import annotations

from typing import Any

import pytest

from moec.errors import RequestError
from moec.runtime.chat_templates import check_template, compile_template, render

MESSAGES = [
    {"role": "user", "content": "what <is> é?"},
    {"role": "assistant", "content": "a letter", "reasoning_content": "it looks like one"},
    {"role": "user", "content": "and 1?"},
]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}\n{{ m.content }}{% endgeneration %}|{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{%- generation -%} {{ m.role }} {%- endgeneration -%}{% break %}{% endfor %}",
        "{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}{{ messages[0] | tojson(indent=2) }}",
        "{% if tools is not none %}tools{% endif %}{% if documents is none %}no documents{% endif %}",
        "{{ tools is defined }}{{ messages[1].thinking }}{{ messages[1].reasoning_content }}{{ messages[0].thinking }}",
        "{{ strftime_now('%Z%z') }}",
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% set ns.last = m.role %}{% endfor %}{{ ns.last }}",
        "{{ style }}{% if add_generation_prompt %}[assistant]{% endif %}",
    ],
)
def test_a_conversation_reads_as_transformers_writes_it(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        [MESSAGES], chat_template=template, add_generation_prompt=True, style="short"
    )
    values: dict[str, Any] = {"add_generation_prompt": True, "style": "short"}
    assert render(compile_template(template, "mine"), MESSAGES, values) == expected[0]


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace() %}{% set ns.__class__ = messages %}",
        "{{ namespace(__class__=messages) }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_reaches_nothing_of_python(template: str) -> None:
    with pytest.raises(RequestError, match="refuses this conversation"):
        render(compile_template(template, "mine"), MESSAGES, {})


def test_a_template_that_is_none() -> None:
    check_template("{% for m in messages %}{% break %}{% endfor %}", "fine")
    with pytest.raises(RequestError, match=r"mine\.jinja is no chat template"):
        check_template("{{ messages", "mine.jinja")

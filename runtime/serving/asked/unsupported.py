"""Fields of this API, here and on other servers, that are not implemented: refused, unless they ask for nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.runtime.serving.errors import ApiError


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why a field is refused; ``harmless`` are values that mean what happens anyway, besides null and empty lists."""

    why: str
    harmless: tuple[Any, ...] = ()


_TOOLS = "Calls of tools are written in a way of each model's own, which this server does not read."
_BEAMS = "Beams are not searched."
_STORES = "This server keeps no answers."

GENERATION = {
    "response_format": Unsupported(
        "Answers are not held to a format; ask for it in the prompt.", ({"type": "text"},)
    ),
    "store": Unsupported(_STORES, (False,)),
    "metadata": Unsupported(_STORES, ({},)),
    "service_tier": Unsupported("There is one tier.", ("auto", "default")),
    # Other servers' extensions, which their clients send as they are.
    "min_p": Unsupported("Give top_p.", (0,)),
    "typical_p": Unsupported("Give top_p.", (1,)),
    "length_penalty": Unsupported(_BEAMS, (1,)),
    "use_beam_search": Unsupported(_BEAMS, (False,)),
    "skip_special_tokens": Unsupported("Special tokens are no text.", (True,)),
    "include_stop_str_in_output": Unsupported("Texts end before the stop string.", (False,)),
}
STREAM_OPTIONS = {"include_obfuscation": Unsupported("Chunks are as long as their text.", (False,))}
CHAT = GENERATION | {
    "tools": Unsupported(_TOOLS),
    "tool_choice": Unsupported(_TOOLS, ("none", "auto")),
    "parallel_tool_calls": Unsupported(_TOOLS, (True, False)),
    "functions": Unsupported(_TOOLS),
    "function_call": Unsupported(_TOOLS, ("none", "auto")),
    "modalities": Unsupported("Models answer with text.", (["text"],)),
    "audio": Unsupported("Models answer with text."),
    "prediction": Unsupported("Nothing is predicted ahead of the model."),
    "reasoning_effort": Unsupported("Models' templates have names of their own: give chat_template_kwargs."),
    "verbosity": Unsupported("No model here knows it; ask for it in the prompt."),
    "web_search_options": Unsupported("This server searches nothing."),
}
COMPLETIONS = GENERATION | {
    "best_of": Unsupported("All choices are returned: give n.", (1,)),
    "suffix": Unsupported("Models continue text; they do not fill gaps.", ("",)),
}
MESSAGES = {
    "tool_calls": Unsupported(_TOOLS),
    "tool_call_id": Unsupported(_TOOLS),
    "function_call": Unsupported(_TOOLS),
    "refusal": Unsupported("It is OpenAI's own."),
    "audio": Unsupported("Models read text."),
    "annotations": Unsupported("They are OpenAI's own."),
}


def without_unsupported(body: Any, unsupported: dict[str, Unsupported]) -> Any:
    """``body`` without the fields of ``unsupported``.

    Raises:
        ApiError: one of them asks for something.
    """
    if not isinstance(body, dict):
        return body
    for name, field in unsupported.items():
        value = body.get(name)
        if value is not None and value != [] and value not in field.harmless:
            raise ApiError(
                400, f"{name} is not supported. {field.why}", param=name, code="unsupported_parameter"
            )
    return {name: value for name, value in body.items() if name not in unsupported}

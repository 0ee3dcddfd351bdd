"""Text to token ids and back, from the bundle's ``tokenizer/`` folder; chat templates; text as it streams."""

from __future__ import annotations

import json
from operator import index
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex

from moec.errors import BundleError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

INCOMPLETE = "\ufffd"
"""What decoders put in place of bytes that are not (yet) a character."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names by which chat templates know them."""


class Decoder(Protocol):
    """The part of ``tokenizers.Tokenizer`` that a `TextStream` needs."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``."""
        ...


class TextStream:
    """Text of tokens that arrive one by one; never half a character.

    Some tokenizers decode a token differently at the start of a text, so text is decoded from a few tokens
    back and the part that was given out before is cut off.

    Args:
        decoder: makes text of tokens.
        skip_special_tokens: leave them out.
        context: tokens that the first one follows, the last few of a prompt; none: it begins a text.
    """

    def __init__(
        self, decoder: Decoder, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> None:
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._ids = list(context)
        self._context = 0
        self._given = len(self._ids)

    def push(self, token: int) -> str:
        """Text that is certain now that ``token`` has come; often empty in the middle of a character."""
        self._ids.append(token)
        text = self._fresh()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._context, self._given = self._given, len(self._ids)
        return text

    def finish(self) -> str:
        """What was held back; bytes that never became a character are replacement characters."""
        text = self._fresh()
        self._context = self._given = len(self._ids)
        return text

    def _fresh(self) -> str:
        before = self._decoder.decode(self._ids[self._context : self._given], skip_special_tokens=self._skip)
        after = self._decoder.decode(self._ids[self._context :], skip_special_tokens=self._skip)
        return after[len(before) :]


class Tokenizer:
    """The checkpoint's tokenizer.

    Args:
        folder: has ``tokenizer.json``, and ``tokenizer_config.json`` where the checkpoint has it.
        chat_template: instead of the checkpoint's.

    Raises:
        BundleError: ``tokenizer.json`` is missing or unreadable.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BundleError(
                "The bundle has no tokenizer.json.",
                "The checkpoint had no tokenizer in the format that the tokenizers package reads.",
                "Give token ids instead of text.",
            )
        # Imported here: neither is needed for token ids, and importing the runtime must be quick.
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise BundleError(
                "The bundle's tokenizer.json cannot be read.", f"{error}.", "Compile again."
            ) from error
        self._config = _read_json(folder / "tokenizer_config.json")
        self._template = _chat_template(folder, self._config) if chat_template is None else chat_template
        self._compiled: Any = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, with the tokens that the model wants around it (such as a first one)."""
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:
            raise RequestError("This cannot be encoded.", _not_text(text), "Give one text.") from error

    def decode(self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``."""
        try:
            numbers = [index(token) for token in ids]
            return str(self._backend.decode(numbers, skip_special_tokens=skip_special_tokens))
        except (TypeError, OverflowError) as error:
            raise RequestError(
                "These are not the token ids of a text.",
                f"{error}.",
                "Give integers; of what generate returns, one row.",
            ) from error

    def token_id(self, token: str) -> int:
        """The id of a token by its text, such as a language's code.

        Raises:
            RequestError: there is no such token.
        """
        found = self._backend.token_to_id(token)
        if found is None:
            raise RequestError(
                f"The tokenizer has no token {token!r}.",
                "Tokens are case-sensitive.",
                "Look it up in the bundle's tokenizer.json.",
            )
        return int(found)

    def stream(self, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> TextStream:
        """A decoder for tokens that arrive one by one, after those of ``context``."""
        return TextStream(self._backend, skip_special_tokens, context)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works."""
        return self._template is not None

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation that the model is to answer; see `apply_chat_template`."""
        return self.encode(self.apply_chat_template(messages, variables=variables), add_special_tokens=False)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation; encode it with ``add_special_tokens=False``.

        Args:
            messages: ``{"role": ..., "content": ...}``, oldest first.
            add_generation_prompt: end with what makes the model answer.
            variables: what this template knows besides, such as ``enable_thinking``.

        Raises:
            RequestError: the bundle has no template, or the template refuses these messages.
        """
        if self._template is None:
            raise RequestError(
                "This model has no chat template.",
                "Its checkpoint does not define one.",
                "Give a plain prompt.",
            )
        # Imported here: it is not needed for token ids, and importing the runtime must be quick.
        from moec.runtime.chat_templates import compile_template, render

        if self._compiled is None:
            self._compiled = compile_template(self._template, "The bundle's chat template")
        special = {
            name: _token_text(self._config[name])
            for name in SPECIAL_TOKENS
            if self._config.get(name) is not None
        }
        values = {**(variables or {}), "add_generation_prompt": add_generation_prompt, **special}
        return render(self._compiled, messages, values)


def _not_text(value: object) -> str:
    if isinstance(value, str):
        return "It has bytes that are no UTF-8."
    return f"It is of type {type(value).__name__}."


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return None if template is None else str(template)


def _token_text(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(
            f"The bundle's {path.name} cannot be read.", f"{error}.", "Compile again."
        ) from error
    return value if isinstance(value, dict) else {}

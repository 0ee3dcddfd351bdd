"""What clients send: the fields of OpenAI's API that are implemented, and the extensions of vLLM's that are."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moec.runtime.serving.asked.unsupported import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    STREAM_OPTIONS,
    Unsupported,
    without_unsupported,
)
from moec.runtime.serving.errors import ApiError

MOST_CHOICES = 128
MOST_TOP_LOGPROBS = 20
MOST_STOPS = 64
MOST_BIASES = 1024
MOST_DIGITS = 18
"""Of a token id that is written as text: no vocabulary has more, and Python reads no number of thousands."""

TokenId = Annotated[int, Field(ge=0)]


class _Body(BaseModel):
    """Unknown fields are refused, as OpenAI does; so are known ones that ask for what is not done here."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    unsupported: ClassVar[dict[str, Unsupported]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        return without_unsupported(value, cls.unsupported)


class StreamOptions(_Body):
    """``stream_options``."""

    unsupported = STREAM_OPTIONS

    include_usage: bool = False


class Generation(_Body):
    """What both endpoints take. Of what is left out or null, the checkpoint's generation config decides."""

    model: str | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=MOST_BIASES)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    top_k: int | None = Field(None, ge=-1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if "" in stops or len(stops) > MOST_STOPS:
            raise ValueError(f"these are at most {MOST_STOPS} strings, none of them empty")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _bias_of_tokens(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token, bias in (value or {}).items():
            if not token.isdecimal() or len(token) > MOST_DIGITS or not -100 <= bias <= 100:
                raise ValueError("its keys are token ids, its values between -100 and 100")
        return value

    @model_validator(mode="after")
    def _stream_options_of_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for stream=true.", param="stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Message(_Body):
    """A message of a conversation; keys of answers that are given back and hold nothing are dropped."""

    unsupported = MESSAGES

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None
    reasoning_content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        texts: list[str] = []
        for part in value:
            known = isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text"
            if not known or not isinstance(part["text"], str):
                raise ValueError('this model reads text alone: parts are {"type": "text", "text": ...}')
            texts.append(part["text"])
        return "".join(texts)

    def for_template(self) -> dict[str, str]:
        """As chat templates know it: what is left out is not there, and a developer is the system."""
        given = self.model_dump(exclude_none=True)
        return given | {"role": "system"} if self.role == "developer" else given


class ChatBody(Generation):
    """``POST /v1/chat/completions``."""

    unsupported = CHAT

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _options_that_go_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs is for logprobs=true.", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(400, "max_completion_tokens replaces max_tokens; give one.", param="max_tokens")
        return self

    @property
    def most_tokens(self) -> int | None:
        """New tokens at most; ``None``: as many as there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens are named; ``None``: there are no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Generation):
    """``POST /v1/completions``."""

    unsupported = COMPLETIONS

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    echo: bool | None = None
    forced_bos_token_id: TokenId | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _kinds_of_prompts(cls, value: Any, check: Any) -> Any:
        try:
            checked = check(value)
        except ValueError as error:
            raise ValueError(
                "it is a string, a list of strings, a list of token ids, or a list of such lists"
            ) from error
        if checked == []:
            raise ValueError("there is none")
        return checked

    @property
    def most_tokens(self) -> int:
        """New tokens at most; OpenAI's default."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens are named; ``None``: there are no logprobs."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        given: list[Any] = self.prompt
        return [given] if isinstance(given[0], int) else given


class TokenizeBody(_Body):
    """``POST /tokenize``: a text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "Give prompt or messages.", param="prompt")
        return self


class DetokenizeBody(_Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[TokenId]

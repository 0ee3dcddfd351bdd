"""The model as clients know it: its name, its texts, and who runs its requests."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moec.errors import RequestError
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.serving.errors import ApiError, busy, failed, refused
from moec.runtime.serving.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.runtime.logprobs import TokenLogprobs
    from moec.runtime.model import Model
    from moec.runtime.serving.admission import Admission
    from moec.runtime.serving.asked.bodies import Message
    from moec.runtime.stats import Stats
    from moec.runtime.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass
class Service:
    """What the endpoints share."""

    name: str
    model: Model
    tokenizer: Tokenizer
    admission: Admission
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    _scoring: asyncio.Lock = field(default_factory=asyncio.Lock)

    def check_name(self, name: str | None) -> None:
        """Refuse another model's name; none is this model's."""
        if name not in (None, self.name):
            raise ApiError(
                404,
                f"The model {name!r} does not exist; this server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    def describe(self) -> dict[str, Any]:
        """The entry of ``/v1/models``."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "moec",
            "max_model_len": self.model.record.max_context,
        }

    def encode(self, prompt: str | list[int], add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ApiError: it is no text.
        """
        if not isinstance(prompt, str):
            return prompt
        try:
            return self.tokenizer.encode(prompt, add_special_tokens)
        except RequestError as error:
            raise refused(error, param="prompt") from error

    def encode_chat(self, messages: Sequence[Message], variables: dict[str, Any] | None) -> list[int]:
        """Token ids of a conversation.

        Raises:
            ApiError: there is no chat template, or it refuses them, or the model does not chat.
        """
        if self.model.has_encoder:
            raise ApiError(
                400, "An encoder-decoder model does not chat. Use /v1/completions.", param="messages"
            )
        if not self.tokenizer.has_chat_template:
            raise ApiError(
                400,
                "This model has no chat template. Use /v1/completions, or start the server with --chat-template.",
                param="messages",
            )
        try:
            return self.tokenizer.encode_chat([message.for_template() for message in messages], variables)
        except RequestError as error:
            raise refused(error, param="messages") from error

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special ones included.

        Raises:
            ApiError: one is none of the model's.
        """
        try:
            if tokens:
                Vocabulary.of(self.model.record).check(tokens)
        except RequestError as error:
            raise refused(error, param="tokens") from error
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    async def score(self, prompt: tuple[int, ...], top: int) -> list[TokenLogprobs | None]:
        """How likely a prompt's tokens are, and the ``top`` likeliest ones at each place; others go on meanwhile.

        Of the first token there are none.

        Raises:
            ApiError: others hold too much of the cache, or the model failed.
        """
        call = self.admission.driver.call
        found: list[TokenLogprobs | None] = [None]
        async with self._scoring:
            parts = self.model.engine.score_tokens(prompt, top)
            try:
                while (part := await asyncio.wrap_future(call(lambda: next(parts, None)))) is not None:
                    found += part
            except RequestError as error:
                raise busy(str(error)) from error
            except Exception as error:
                log.exception("A prompt was not scored; its request fails.")
                raise failed(error) from error
            finally:
                call(parts.close)
        return found

    async def stats(self) -> Stats:
        """The model's counters, up to date."""
        return await asyncio.wrap_future(self.admission.driver.call(lambda: self.model.stats))

"""A loaded model: generate, forward, encode and decode, close."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np

from moec.artifacts.files.reader import open_bundle
from moec.errors import RequestError
from moec.runtime.engine.continuation import Continuation
from moec.runtime.engine.run import assemble, run
from moec.runtime.recording import Recording
from moec.runtime.requests.checks import (
    check_count,
    end_tokens,
    padded_rows,
    sampling_from,
    stop_strings_of,
    to_prompts,
)
from moec.runtime.requests.sides import no_decoder_tokens, sides
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.routing.early_router import early_routers
from moec.runtime.routing.ring import DEFAULT_CAPACITY
from moec.runtime.stops import StopWatch
from moec.runtime.streamers import check_streamer
from moec.runtime.tokenizer import Tokenizer
from moec.runtime.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

    from moec.artifacts.model import ModelRecord
    from moec.artifacts.traces import Traces
    from moec.runtime.chain.executor import ChainExecutor
    from moec.runtime.engine import Engine
    from moec.runtime.memory.budget import MemoryPlan
    from moec.runtime.memory.device_budget import DevicePlan
    from moec.runtime.memory.divided import DividedPlan
    from moec.runtime.requests.checks import Listed
    from moec.runtime.requests.sides import TokenIds
    from moec.runtime.stats import Stats
    from moec.runtime.streamers import Streamer


class Model:
    """A bundle, loaded. Made by `moec.runtime.load`; close it, or use it as a context manager.

    Threads that call it take turns: a call waits until the one before has ended. To run requests of several together,
    give them to one call, or drive `engine`. A process that is forked from the one that loaded it loads its own, on the
    CPU and with one thread; one that is spawned does as it likes.

    Attributes:
        path: the bundle's folder.
        record: ``model.json``.
        memory: what it takes, by purpose.
        target: name of the compiled target that runs.
        cpu_threads: threads that its kernels run on.
        notes: what its user should know of how it runs.
    """

    def __init__(
        self,
        path: Path,
        record: ModelRecord,
        target: str,
        memory: MemoryPlan | DevicePlan | DividedPlan,
        engine: Engine,
        executor: ChainExecutor | None,
        cpu_threads: int = 1,
        *,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.record = record
        self.target = target
        self.cpu_threads = cpu_threads
        self.notes = notes
        self.memory = memory
        self._stats = engine.stats
        self._engine: Engine | None = engine
        self._executor = executor
        self._recording = None if executor is None else Recording(record, engine, executor)
        self._turns = Turns()

    @property
    def engine(self) -> Engine:
        """The engine under `generate`, to drive by hand: ``add`` requests, ``step`` until not ``busy``."""
        self._turns.check()
        if self._engine is None:
            raise _closed()
        return self._engine

    @property
    def stats(self) -> Stats:
        """Counters since it was loaded. Where a GPU counts, looking waits for it, but for no call of another thread.

        While such a call runs, what the GPU counts is as it was when somebody looked last.
        """
        with self._turns.try_take() as mine:
            if mine and self._executor is not None:
                self._executor.count()
        return self._stats

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer; raises `BundleError` where it has none."""
        return Tokenizer(self.path / "tokenizer")

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder reads ``input_ids``, and a decoder answers."""
        return bool(self.record.encoder)

    @property
    def has_tokenizer(self) -> bool:
        """Whether `tokenizer`, `encode` and `decode` work."""
        return (self.path / "tokenizer" / "tokenizer.json").is_file()

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model wants around it."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int] | NDArray[np.int64], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    def generate(
        self,
        input_ids: TokenIds,
        attention_mask: Sequence[Sequence[int]] | NDArray[np.int64] | Listed | None = None,
        *,
        decoder_input_ids: TokenIds | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        pad_token_id: int | None = None,
        forced_bos_token_id: int | None = None,
        forced_eos_token_id: int | None = None,
        seed: int | None = None,
        streamer: Streamer | None = None,
    ) -> NDArray[np.int64]:
        """Continue prompts, with the semantics of transformers' ``generate``.

        Options that are ``None`` are the model's own (its ``generation_config.json``). A prompt's
        continuation does not depend on the other prompts; where transformers counts padding as seen for
        ``repetition_penalty``, this does not.

        Behind an encoder ``input_ids`` are what it reads, and the result is the decoder's: its prompt, which is the
        model's ``decoder_start_token_id`` where nothing is given, and what follows.

        Args:
            input_ids: one prompt, or several: a list of lists of any lengths, or an array or tensor ``[B, T]``.
            attention_mask: ``[B, T]``, 0 at padding on one side of each row of an array.
            decoder_input_ids: the decoder's prompts behind an encoder, as many as ``input_ids`` has.
            max_new_tokens: at most so many; ``None``: as many as context and cache hold.
            min_new_tokens: no end token before so many.
            do_sample: draw tokens; otherwise always the best one, and temperature, top_p and top_k do
                nothing.
            temperature: above 0.
            top_p: above 0, at most 1 (off).
            top_k: 0 is off.
            repetition_penalty: above 0; 1 is off.
            eos_token_id: one end token or several; an empty list: none.
            stop_strings: one text or several; a row ends with the token that completes one of them.
            pad_token_id: fills rows that are shorter; ``None``: the model's, or its first end token, or 0.
            forced_bos_token_id: the first token after a prompt of one token, such as the language to translate to.
            forced_eos_token_id: the last token where ``max_new_tokens`` is reached.
            seed: of row 0's random numbers; row i uses ``seed + i``, so it equals a run of its own with that
                seed.
            streamer: gets the prompt and then each token; for one prompt only.

        Returns:
            int64 ``[B, T + N]``: prompts (padded on the left where they came as lists of different lengths),
            continuations with their end tokens, padding on the right.

        Raises:
            RequestError: an option or token is out of range, or a request is longer than context or cache.
            BundleError: there are stop strings and no tokenizer.
        """
        defaults = self.record.generation
        sources, prompts = sides(self.record, to_prompts(input_ids, attention_mask), decoder_input_ids)
        sampling = sampling_from(defaults, do_sample, temperature, top_p, top_k, repetition_penalty)
        ends = end_tokens(defaults, eos_token_id)
        first = defaults.forced_bos_token_id if forced_bos_token_id is None else forced_bos_token_id
        last = defaults.forced_eos_token_id if forced_eos_token_id is None else forced_eos_token_id
        asked = Continuation(sampling, ends, max_new_tokens, min_new_tokens, first, last, seed)
        asked.check(Vocabulary.of(self.record))
        if pad_token_id is not None:
            check_count("pad_token_id", pad_token_id, least=0, most=np.iinfo(np.int64).max)
        if streamer is not None:
            check_streamer(streamer, len(prompts))
        stops = stop_strings_of(stop_strings)
        watches = [StopWatch(self.tokenizer.stream(), stops) for _ in prompts] if stops else []
        with self._turns.take():
            results = run(self.engine, asked.requests(self.engine, prompts, sources), streamer, watches)
        pad = next(
            (token for token in (pad_token_id, defaults.pad_token_id, *ends[:1]) if token is not None), 0
        )
        rows = None if attention_mask is None or self.has_encoder else padded_rows(input_ids)
        return assemble(prompts, results, pad, rows)

    def forward(
        self,
        input_ids: TokenIds,
        decoder_input_ids: TokenIds | None = None,
        *,
        attention_mask: Sequence[Sequence[int]] | NDArray[np.int64] | Listed | None = None,
    ) -> NDArray[np.float32]:
        """Logits at every position; sequences that the engine runs are left alone.

        Args:
            input_ids: token ids of one prompt, or ``[B, T]``. Behind an encoder, what that reads, of any lengths.
            decoder_input_ids: behind an encoder the decoder's tokens ``[B, T]``, whose logits these are.
            attention_mask: as ``input_ids``, 0 at padding on one side of each row.

        Returns:
            float32 ``[B, T, V]``.

        Raises:
            RequestError: rows of different lengths, a token out of range, or too many tokens.
        """
        if self.has_encoder and decoder_input_ids is None:
            raise no_decoder_tokens()
        sources, prompts = sides(self.record, to_prompts(input_ids, attention_mask), decoder_input_ids)
        if len({len(prompt) for prompt in prompts}) != 1:
            raise RequestError(
                "forward takes rows of one length.",
                "Logits of other shapes do not stack.",
                "Call it for each row.",
            )
        vocabulary = Vocabulary.of(self.record)
        for prompt in prompts:
            vocabulary.check(prompt)
        scored = zip(prompts, sources, strict=True)
        with self._turns.take():
            return np.stack([self.engine.score(prompt, source) for prompt, source in scored])

    def trace(self, prompts: Iterable[Sequence[int]], max_new_tokens: int = 0) -> Traces:
        """Run prompts and record which experts each token chooses.

        Args:
            prompts: token ids of each prompt; what an encoder reads, where there is one.
            max_new_tokens: tokens to draw after each prompt (with seed 0) and to trace, as far as they fit.

        Returns:
            The traces of all tokens that were run; the last drawn token of a sequence is not.

        Raises:
            RequestError: a decoder behind an encoder has nothing to begin with.
        """
        routers = () if self.has_encoder else early_routers(open_bundle(self.path, verify="sizes"))
        with self._turns.take():
            return self._routing.trace(prompts, max_new_tokens, routers)

    def record_routing(self, path: str | Path, capacity: int = DEFAULT_CAPACITY) -> None:
        """Keep the routing of all that is run from now on, for ``moec plan --traces``; see `save_routing`.

        What the file has of an earlier run is kept before it, as far as there is room; what was kept so far for another
        file is written there. On a GPU decoding steps stay one graph, which keeps their routing; in steps with prompts
        the host reads every layer's choices.

        Args:
            path: written when the model is closed.
            capacity: tokens that are kept, of an encoder's sources as many more; the oldest go first.

        Raises:
            RequestError: ``capacity`` is below 1.
            BundleError: the file is no file of traces, or of another model.
            OutputError: its folder does not exist, or cannot be written.
        """
        with self._turns.take():
            self._routing.begin(path, capacity)

    def save_routing(self) -> None:
        """Write what `record_routing` has kept to its file; closing does it too.

        Raises:
            OutputError: it cannot be written.
        """
        with self._turns.take():
            if self._recording is not None:
                self._recording.save()

    def close(self) -> None:
        """Let go of all memory, and write the routing that was recorded. The model cannot be used any more.

        In a process that is forked from the one that loaded it, memory and file are left to that one.
        """
        if not self._turns.here:
            return
        with self._turns.take():
            try:
                if self._engine is not None:
                    self.save_routing()
            finally:
                self._engine = None
                if self._executor is not None:
                    self._executor.close()
                self._executor = self._recording = None

    @property
    def _routing(self) -> Recording:
        if self._recording is None:
            raise _closed()
        return self._recording

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _closed() -> RequestError:
    return RequestError("The model is closed.", "close() was called.", "Load it again.")

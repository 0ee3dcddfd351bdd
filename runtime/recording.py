"""The routing of what a model runs: kept for a file, or as traces of prompts."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moec.runtime.engine.continuation import room
from moec.runtime.engine.run import run
from moec.runtime.engine.sequence import Request
from moec.runtime.requests.checks import check_count, sampling_from, to_prompts
from moec.runtime.requests.sides import sides
from moec.runtime.routing.recorder import SequenceRecorder
from moec.runtime.routing.ring import RoutingRing, read_earlier, write_traces
from moec.runtime.routing.sided import SidedRecorder, layers_of_sides, recorder_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from moec.artifacts.model import ModelRecord
    from moec.artifacts.traces import Traces
    from moec.runtime.chain.executor import ChainExecutor
    from moec.runtime.engine import Engine
    from moec.runtime.routing.early_router import Routers
    from moec.runtime.routing.sided import StepRecorder


class Recording:
    """Who is told of the routing of a model.

    Args:
        model: its MoE layers.
        engine: runs it, and says which tokens a step was for.
        executor: says what they chose.
    """

    def __init__(self, model: ModelRecord, engine: Engine, executor: ChainExecutor) -> None:
        self._model, self._engine, self._executor = model, engine, executor
        self._kept: tuple[StepRecorder, Path] | None = None

    def begin(self, path: str | Path, capacity: int) -> None:
        """Keep the routing of all that is run from now on; arguments and errors as of `Model.record_routing`."""
        check_count("trace_capacity", capacity, least=1)
        self.save()
        target = Path(path)
        of_encoder, layers = layers_of_sides(self._model)
        ring = recorder_for(
            self._model,
            lambda layers, earlier: RoutingRing(layers, capacity, earlier),
            read_earlier(target, layers, of_encoder),
        )
        self._tell(ring)
        self._kept = ring, target

    def save(self) -> None:
        """Write what was kept to its file, if anything is.

        Raises:
            OutputError: it cannot be written.
        """
        if self._kept is not None:
            ring, path = self._kept
            write_traces(ring.traces(), path)

    def stop(self) -> None:
        """Keep nothing any more, and forget what was kept."""
        self._tell(None)
        self._kept = None

    def trace(self, prompts: Iterable[Sequence[int]], max_new_tokens: int, routers: Routers) -> Traces:
        """Run prompts and keep the routing of these alone; arguments and errors as of `Model.trace`.

        ``routers`` say what each layer would choose one layer early; where there are none they are not asked.
        """
        recorder = recorder_for(
            self._model,
            lambda layers, _: SequenceRecorder(tuple(layer.experts for layer in layers), routers),
        )
        defaults = self._model.generation
        sampling = sampling_from(defaults, True, None, None, None, None)
        ends = frozenset(defaults.eos_token_id)
        sources, begun = sides(self._model, [row for prompt in prompts for row in to_prompts(prompt)], None)
        requests = [
            Request(
                prompt,
                min(max_new_tokens + 1, room(self._engine, prompt, source)),
                eos_token_ids=ends,
                sampling=sampling,
                seed=0,
                source=source,
                whole_prompt=True,
            )
            for source, prompt in zip(sources, begun, strict=True)
        ]
        with self._instead(recorder):
            run(self._engine, requests)
        return recorder.traces()

    @contextmanager
    def _instead(self, recorder: StepRecorder) -> Iterator[None]:
        """``recorder`` is told of what is run in the meantime, and the file has nothing of it."""
        self._tell(recorder)
        try:
            yield
        finally:
            self._tell(None if self._kept is None else self._kept[0])

    def _tell(self, recorder: StepRecorder | None) -> None:
        self._executor.recorder = recorder
        self._engine.observer = None if recorder is None else recorder.end_step
        self._engine.sources.observer = recorder.end_sources if isinstance(recorder, SidedRecorder) else None

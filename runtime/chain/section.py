"""What one device runs of the chain: consecutive steps, whose calls are bound once for each token count."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Literal, NamedTuple

from moec.artifacts.layout.chain import CHAIN_INPUTS, CHAIN_OUTPUT, step_values
from moec.artifacts.model import DTYPE_BYTES
from moec.runtime.chain.calls import part_calls
from moec.runtime.chain.layout import value_spec
from moec.runtime.chain.mirrors import BatchMirrors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from moec.artifacts.ids import ValueId
    from moec.runtime.chain.binding import Binder
    from moec.runtime.chain.layout import Part
    from moec.runtime.device import Call, Device, TokenSampler, View
    from moec.runtime.engine.batch import StepBatch
    from moec.runtime.experts.calls import ExpertCalls
    from moec.runtime.routing.recorder import RoutingLog, RoutingRecorder
    from moec.runtime.stats import Stats

TOKENS = CHAIN_INPUTS[0]
COUNTS_KEPT = 96
"""Parts of steps, of one token count each, whose calls are kept; a decoding batch has only a few."""


class _Key(NamedTuple):
    """What a prepared list of calls is for."""

    part: Part | Literal["whole"]
    gathered: bool
    sampled: bool
    tokens: int


class ChainSection:
    """One device's part of the chain; the whole of it where there is one device.

    Args:
        device: what runs the calls.
        binder: makes them.
        experts: what the binder makes the calls of routed experts with.
        stats: milliseconds per stage.
        sampler: chooses tokens on the device; ``None``: the host does, from the logits.
        log: keeps the routing of decoding steps on the device; ``None``: the host reads each layer's as it runs.
    """

    def __init__(
        self,
        device: Device,
        binder: Binder,
        experts: ExpertCalls,
        stats: Stats,
        sampler: TokenSampler | None = None,
        log: RoutingLog | None = None,
    ) -> None:
        self.device, self.experts, self.sampler, self.log = device, experts, sampler, log
        self._binder, self._stats = binder, stats
        self._model = binder.model
        self._recorder: RoutingRecorder | None = None
        self._mirrors: BatchMirrors | None = None
        self._bound: OrderedDict[_Key, Callable[[], None]] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Where the step's token ids lie."""
        return self._shown.tokens

    @property
    def experts_before(self) -> int:
        """MoE layers of earlier sections."""
        return self._binder.section.experts_before

    @property
    def routes(self) -> bool:
        """Whether it has routed experts."""
        return bool(self._model.experts)

    @property
    def reads_tokens(self) -> bool:
        """Whether any step does."""
        return any(TOKENS in step_values(step)[0] for step in self._model.steps)

    def arriving(self, count: int) -> list[View]:
        """Where the values of a step of ``count`` tokens go that come from the section before."""
        return self._places(self._binder.section.arriving, count)

    def leaving(self, count: int) -> list[View]:
        """Where those lie that go to the section behind, in its order."""
        return self._places(self._binder.section.leaving, count)

    def record_with(self, recorder: RoutingRecorder | None) -> None:
        """Tell ``recorder`` of every token's routing from now on."""
        self._recorder = recorder
        self._bound.clear()

    def forget(self) -> None:
        """Bind all calls anew."""
        self._bound.clear()

    def show(self, batch: StepBatch, rows: Sequence[int], *, ahead: bool) -> None:
        """Let the device see the step, and the ``rows`` of its page table that have changed."""
        if self._mirrors is None or self._mirrors.batch is not batch:
            self._mirrors = BatchMirrors(self.device, batch)
            self._bound.clear()
        self._mirrors.update(rows, ahead=ahead)

    def run_whole(self, count: int, *, sampled: bool = False) -> None:
        """A step whose every row's logits are wanted, as decoding has: both parts as one list of calls."""
        key = _Key("whole", False, sampled, count)
        self._run(key, lambda: self._calls("main", key) + self._last_calls(key))

    def run_part(self, part: Part, count: int, *, gathered: bool = False, sampled: bool = False) -> None:
        """One part of a step, see `moec.runtime.chain.calls.part_calls`."""
        key = _Key(part, gathered, sampled, count)
        self._run(key, lambda: self._last_calls(key) if part == "last" else self._calls(part, key))

    def read_logits(self, rows: int, *, gathered: bool) -> NDArray[np.float32]:
        """What the last part has made, ``[rows, V]``."""
        place = self._binder.value("last", CHAIN_OUTPUT, rows, self._shown, gathered=gathered)
        logits: NDArray[np.float32] = self.device.read(place).reshape(rows, self._model.vocab_size)
        return logits

    def gather(self, rows: list[int]) -> None:
        """Copy ``rows`` of the values that the last steps read to where those look for them."""
        mirrors, count = self._shown, self._shown.batch.count
        for name in self._binder.crossing:
            spec = value_spec(self._model, name)
            source = self._binder.value("main", name, count, mirrors)
            target = self._binder.value("last", name, len(rows), mirrors, gathered=True)
            axis = spec.shape.index("T")
            row_bytes = DTYPE_BYTES[spec.dtype] * math.prod(source.shape[axis + 1 :])
            for block in range(math.prod(source.shape[:axis])):
                begin = source.address + block * count * row_bytes
                self.device.gather(begin, target.address + block * len(rows) * row_bytes, rows, row_bytes)

    def _places(self, names: Sequence[ValueId], count: int) -> list[View]:
        return [self._binder.value("main", name, count, self._shown) for name in names]

    @property
    def _shown(self) -> BatchMirrors:
        assert self._mirrors is not None, "no step was shown"
        return self._mirrors

    def _calls(self, part: Part, key: _Key) -> list[Call]:
        """The calls of a part, with its routing kept where it is wanted: by the device, or read by the host."""
        logged = self._recorder is not None and self.log is not None and key.part == "whole" and key.sampled
        return part_calls(
            self._binder,
            part,
            key.tokens,
            self._shown,
            gathered=key.gathered,
            recorder=None if logged else self._recorder,
            places=self.log.places(key.tokens) if logged and self.log is not None else None,
        )

    def _last_calls(self, key: _Key) -> list[Call]:
        """The last part's calls, and where the device chooses tokens the call that does.

        The section of another device has none.
        """
        calls = self._calls("last", key)
        if key.sampled and self.sampler is not None:
            logits = self._binder.value("last", CHAIN_OUTPUT, key.tokens, self._shown, gathered=key.gathered)
            calls.append(self.sampler.call(logits, self.tokens))
        return calls

    def _run(self, key: _Key, make: Callable[[], list[Call]]) -> None:
        """Run the calls for ``key``, made once; of those kept the longest unused go first."""
        run = self._bound.get(key)
        if run is None:
            calls = make()
            if len(self._bound) >= COUNTS_KEPT:
                self._bound.popitem(last=False)
            run = self._bound[key] = self.device.prepare(calls, self._stats, often=key.part == "whole")
        self._bound.move_to_end(key)
        run()

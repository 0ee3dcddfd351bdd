"""What ``GET /metrics`` tells Prometheus."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from moec.runtime.engine import Engine
    from moec.runtime.stats import Stats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper bounds of the buckets of histograms."""

_COUNTERS = {
    "steps": "Runs through the model.",
    "prompt_tokens": "Tokens run to fill the cache, recomputation included.",
    "reused_tokens": "Tokens that were in the cache and were not run.",
    "prefix_hits": "Sequences whose first tokens were.",
    "generated_tokens": "Tokens generated.",
    "preemptions": "Sequences that lost their pages and were recomputed.",
    "hits": "Uses of experts that were resident.",
    "misses": "Uses of experts that had to be fetched, or computed elsewhere.",
    "evictions": "Experts that made room for others.",
    "bytes_moved": "Bytes of experts that were moved.",
}
"""Of `Stats`."""


class Metrics:
    """Counters and times of the server; those of the model are read when they are asked for."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "moec_http_requests", "Requests answered.", ("path", "status"), registry=self._registry
        )
        self._first = self._histogram("time_to_first_token", "From a request's arrival to its first token.")
        self._between = self._histogram("time_between_tokens", "Between two tokens of a choice.")
        self._whole = self._histogram("request", "From a request's arrival to its last token.")

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"moec_{name}_seconds", what, buckets=SECONDS, registry=self._registry)

    def answered(self, path: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(path, str(status)).inc()

    def begin(self, choices: int) -> Timer:
        """Time a request from now on."""
        return Timer(self._first, self._between, self._whole, choices)

    def render(self, engine: Engine, stats: Stats) -> bytes:
        """All of it in Prometheus' text format; ``stats`` are up to date."""
        return generate_latest(self._registry) + generate_latest(_Model(engine, stats))


class Timer:
    """The times of one request's tokens."""

    def __init__(self, first: Histogram, between: Histogram, whole: Histogram, choices: int) -> None:
        self._first, self._between, self._whole = first, between, whole
        self._begun = perf_counter()
        self._last: list[float | None] = [None] * choices

    def token(self, index: int) -> None:
        """A token of a choice has come."""
        now, last = perf_counter(), self._last[index]
        if last is not None:
            self._between.observe(now - last)
        elif not any(self._last):
            self._first.observe(now - self._begun)
        self._last[index] = now

    def end(self) -> None:
        """All have come."""
        self._whole.observe(perf_counter() - self._begun)


class _Model(CollectorRegistry):
    """What the engine and its counters say now."""

    def __init__(self, engine: Engine, stats: Stats) -> None:
        super().__init__()
        self._engine, self._stats = engine, stats

    def collect(self) -> Iterator[Metric]:
        scheduler = self._engine.scheduler
        gauges = {
            "sequences_running": (len(scheduler.running), "Sequences that run."),
            "sequences_waiting": (len(scheduler.waiting), "Sequences that wait for room."),
            "cache_pages_free": (
                scheduler.pages.free,
                "Pages of the key-value cache that no sequence holds.",
            ),
            "cache_pages_kept": (scheduler.pages.kept, "Those of them whose tokens a prompt may take over."),
            "cache_pages": (scheduler.pages.total, "Pages of the key-value cache."),
        }
        for name, (value, what) in gauges.items():
            yield GaugeMetricFamily(f"moec_{name}", what, value)
        for name, what in _COUNTERS.items():
            family = f"expert_{name}" if name in ("hits", "misses", "evictions") else name
            yield CounterMetricFamily(f"moec_{family}", what, getattr(self._stats, name))
        stages = CounterMetricFamily("moec_stage_seconds", "Time of each stage of steps.", labels=["stage"])
        for stage, milliseconds in self._stats.milliseconds.items():
            stages.add_metric([stage], milliseconds / 1e3)
        yield stages

"""Metrics: what a server counts, in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gemma_multi.generation import GenerationResult
from gemma_multi.serving.tickets import Ended, Event

if TYPE_CHECKING:
    from gemma_multi.serving.app import Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, meaning: str, labels: Iterable[str]) -> Counter:
            return Counter(f"gemma_multi_{name}", meaning, labels, registry=self._registry)

        def seconds(name: str, meaning: str, labels: Iterable[str]) -> Histogram:
            return Histogram(
                f"gemma_multi_{name}_seconds", meaning, labels, registry=self._registry,
                buckets=_SECONDS,
            )  # fmt: skip

        self._requests = counter("requests", "Requests answered.", ("route", "status"))
        self._duration = seconds("request", "From a request to the end of its answer.", ("route",))
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", ("model",))
        self._reused = counter("reused_tokens", "Tokens of prompts read before.", ("model",))
        self._generated = counter("generated_tokens", "Tokens generated.", ("model",))
        self._first = seconds("first_token", "From a request to its first token.", ("model",))

    def watch(self, served: Iterable[Served]) -> None:
        """Also tells how busy these are."""
        self._registry.register(_Load(list(served)))

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def of(self, model: str) -> Callable[[Event], None]:
        """What counts the events of one request."""
        started, first = time.perf_counter(), True

        def seen(event: Event) -> None:
            nonlocal first
            if first:
                first = False
                self._first.labels(model).observe(time.perf_counter() - started)
            if isinstance(event, Ended) and isinstance(event.outcome, GenerationResult):
                result = event.outcome
                self._prompt.labels(model).inc(result.prompt_tokens)
                self._reused.labels(model).inc(result.reused_tokens)
                self._generated.labels(model).inc(result.generated_tokens)

        return seen

    def page(self) -> bytes:
        return generate_latest(self._registry)


class _Load(Collector):
    def __init__(self, served: list[Served]) -> None:
        self._workers = {one.worker: one.name for one in reversed(served)}  # by its first name

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, meaning in (
            ("running", "Answers on their way."), ("waiting", "Requests that wait for a seat."),
        ):  # fmt: skip
            family = GaugeMetricFamily(f"gemma_multi_{name}", meaning, labels=("model",))
            for worker, model in self._workers.items():
                family.add_metric((model,), getattr(worker, name))
            yield family

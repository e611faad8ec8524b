"""Answers: a loaded model at work on rows, and what a task gives for one of them, as columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemma_multi.batch.kinds import COUNT, JSON, NUMBER, TEXT, VECTOR, Kind, plain
from gemma_multi.batch.source import AskedRow
from gemma_multi.errors import OptionError
from gemma_multi.loading import load
from gemma_multi.model import Model
from gemma_multi.sources import Source
from gemma_multi.tasks import Classification

Columns = dict[str, Any]
_SEEDS = 1 << 32


@dataclass(frozen=True)
class Work:
    """What is asked of which model; all that somebody elsewhere needs to know to do it."""

    model: Source
    task: str
    options: Mapping[str, Any]
    place: Mapping[str, Any] = field(default_factory=dict)  # what else `load` takes
    seed: int | None = None  # of row 0 where tokens are drawn; None leaves it to `options`


class Answering:
    """A loaded model at work. Raises what `load` raises, and OptionError for bad options."""

    def __init__(self, work: Work) -> None:
        loaded = isinstance(work.model, Model)
        self.model: Model = work.model if loaded else load(work.model, **work.place)  # type: ignore[assignment]
        self._work = work
        self.model.batch([], work.task, progress=False, **work.options)  # is all of it right?
        self._draws = work.seed is not None and _draws(self.model, work)

    def __call__(self, asked: Sequence[AskedRow]) -> Iterator[Columns]:
        """The answer to each, in order: its columns, or what it ended with as `error`. It depends
        on these rows alone: what earlier ones had in common is forgotten."""
        self.model.prefixes.clear()
        options, values = self._work.options, _TASKS[self._work.task].values
        items = [self._item(one) for one in asked if one.problem is None]
        outcomes = self.model.batch(items, self._work.task, progress=False, **options)
        for one in asked:
            if one.problem is not None:
                yield {"row": one.number, "error": one.problem}
                continue
            outcome = next(outcomes)
            if outcome.error is not None:
                yield {"row": one.number, "error": str(outcome.error)}
            else:
                yield {"row": one.number, **values(outcome.value, options)}

    def _item(self, one: AskedRow) -> Mapping[str, Any]:
        seed = {"seed": (self._work.seed + one.number) % _SEEDS} if self._draws else {}  # type: ignore[operator]
        return {"text": one.item, **seed}


def _draws(model: Model, work: Work) -> bool:
    """Whether tokens are drawn, and not the best taken."""
    if work.task == "generate":
        other = ("raw", "tools", "tool_choice", "width")
        asked = {n: v for n, v in work.options.items() if n not in other}
        return model.answer_options(asked)[0].temperature > 0
    return work.task == "extract" and (work.options.get("temperature") or 0) > 0


def columns_of(work: Work) -> dict[str, Kind]:
    """The columns of a task's answers, beside the row's number, and what kind each is of."""
    return _TASKS[work.task].kinds(work.options)


def rows_per_part(task: str) -> int:
    """As many as take a minute or so to answer. At the end of a part a batch is not full."""
    return 256 if _TASKS[task].writes else 1024


def check_task(task: Any) -> None:
    """Raises OptionError for one that there is not."""
    if task not in _TASKS:
        raise OptionError(f"task is {task!r}, expected one of {', '.join(_TASKS)}")


def _generated(result: Any, options: Mapping[str, Any]) -> Columns:
    found: Columns = {
        "text": result.text, "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens, "generated_tokens": result.generated_tokens,
    }  # fmt: skip
    if options.get("schema") is not None:
        found["parsed"] = plain(result.parsed)
    if options.get("tools") is not None:
        found["calls"] = [{"name": c.name, "arguments": c.arguments} for c in result.calls]
    return found


def _generated_kinds(options: Mapping[str, Any]) -> dict[str, Kind]:
    found: dict[str, Kind] = {
        "text": TEXT, "finish_reason": TEXT, "prompt_tokens": COUNT, "generated_tokens": COUNT
    }  # fmt: skip
    if options.get("schema") is not None:
        found["parsed"] = JSON
    if options.get("tools") is not None:
        found["calls"] = JSON
    return found


def _choice(name: str) -> Callable[[Classification, Mapping[str, Any]], Columns]:
    return lambda found, options: {
        name: found.label, "probability": found.probability, "probabilities": found.probabilities
    }  # fmt: skip


def _choice_kinds(name: str, names: str) -> Callable[[Mapping[str, Any]], dict[str, Kind]]:
    return lambda options: {
        name: TEXT, "probability": NUMBER, "probabilities": tuple(options.get(names) or ())
    }  # fmt: skip


def _embedded(vector: np.ndarray, options: Mapping[str, Any]) -> Columns:
    # the shortest decimals that are these float32
    return {"embedding": [float(str(value)) for value in vector.astype(np.float32)]}


@dataclass(frozen=True)
class _Task:
    """How a task's value becomes columns; both are told its options."""

    values: Callable[[Any, Mapping[str, Any]], Columns]
    kinds: Callable[[Mapping[str, Any]], dict[str, Kind]]
    writes: bool = False  # a text, token by token


_TASKS = {
    "generate": _Task(_generated, _generated_kinds, writes=True),
    "classify": _Task(_choice("label"), _choice_kinds("label", "labels")),
    "route": _Task(_choice("route"), _choice_kinds("route", "routes")),
    "extract": _Task(
        lambda value, _: {"object": plain(value)}, lambda _: {"object": JSON}, writes=True
    ),
    "embed": _Task(_embedded, lambda _: {"embedding": VECTOR}),
}

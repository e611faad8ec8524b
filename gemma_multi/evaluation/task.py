"""Task: how rows are asked and what is counted. Findings: what came of it.

Design choices:
- A row is a question with its answer. `finetune`'s rows are asked as they stand, since that is what
  a specialist was taught; a `text` beside what is to be said of it is put into the prompt that
  `Model.classify` and `Model.extract` make.
- Every row is read before the first is asked, and none is dropped: what cannot be asked is an error
  that names its line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from gemma_multi.chat_template import Message
from gemma_multi.errors import ConstraintError, DataError, GemmaError, OptionError
from gemma_multi.options import option
from gemma_multi.progress import Progress, reporting
from gemma_multi.reads import Reads, complete_together
from gemma_multi.rows import Data, Given, open_data, read_row
from gemma_multi.scoring import Estimate, PartScore
from gemma_multi.tasks.prompts import TaskPrompt

if TYPE_CHECKING:
    from gemma_multi.model import Model

# one option of several tasks
MOST_TOKENS_HELP = "The most tokens of an answer.  [32 of labels, 512 of ifeval, else 256]"


@dataclass(frozen=True)
class TaskOptions:
    """What every task can be told."""

    limit: int | None = option(None, "Ask the first so many rows only.")

    def __post_init__(self) -> None:
        if self.limit is not None and (type(self.limit) is not int or self.limit < 1):
            raise OptionError(f"limit is {self.limit!r}, expected at least 1")


@dataclass(frozen=True)
class PromptOptions(TaskOptions):
    """What tasks that ask something can be told."""

    instruction: str | None = option(None, "What the model is told in front of each row.")
    raw: bool = option(False, "Prompts as plain text, for base models.")


@dataclass(frozen=True)
class Answered:
    """A row, and what the model made of it."""

    where: str  # file and line
    asked: str
    expected: str
    given: str
    right: bool
    probability: float | None = None  # of the label that was given


@dataclass(frozen=True)
class Findings:
    """Figures of a task; the first is the one that counts."""

    figures: dict[str, Estimate]
    # precision, recall and F1 by what kind of thing (label, field, argument), and which
    parts: dict[str, dict[str, PartScore]] = field(default_factory=dict)
    shares: dict[str, Estimate] = field(default_factory=dict)  # right ones, by kind of instruction
    confusion: dict[str, dict[str, int]] = field(default_factory=dict)  # expected -> given -> rows
    numbers: dict[str, float] = field(default_factory=dict)  # others, without an interval
    rows: tuple[Answered, ...] = ()
    count: int = 0  # of rows
    protocol: dict[str, Any] = field(default_factory=dict)  # how they were asked


@dataclass(frozen=True)
class Task:
    """One kind of evaluation."""

    name: str
    rows: str  # what a row is, for people
    options: type[Any]
    run: Callable[[Model, Any, Any, Progress], Findings]
    data: Any = None  # rows of its own, where none are given


@dataclass(frozen=True)
class Question:
    """What is asked of one row."""

    where: str
    asked: str | list[Message]  # a text for the task's own prompt, or a conversation
    expected: Any

    @property
    def shown(self) -> str:
        """For people: the text, or the last turn."""
        return self.asked if isinstance(self.asked, str) else self.asked[-1]["content"]

    @property
    def is_text(self) -> bool:
        return isinstance(self.asked, str)


def answered(
    question: Question, expected: str, given: str, right: bool, probability: float | None = None
) -> Answered:
    return Answered(question.where, question.shown, expected, given, right, probability)


def read_questions(data: Data, answer: str, limit: int | None) -> list[Question]:
    """Rows with a `text` and an `answer` (by that key), or as `finetune` takes them, all of a kind.
    Raises DataError naming the first that is neither."""
    found: list[Question] = []
    for where, line, raw in numbered_rows(data, limit):
        if isinstance(raw, Mapping) and set(raw) == {"text", answer}:
            if not isinstance(raw["text"], str) or not raw["text"].strip():
                raise DataError(f"{where}: 'text' is {raw['text']!r}, expected some words")
            found.append(Question(where, raw["text"], raw[answer]))
            continue
        try:
            one = Given(read_row(raw, line), raw, where)
        except OptionError as error:
            raise DataError(f"{where}: {error}, or 'text' and {answer!r}") from None
        if one.question is None:
            raise DataError(f"{where}: has no text for an answer to a question")
        found.append(Question(where, one.question, one.answer))
    if mixed := next((q for q in found if q.is_text != found[0].is_text), None):
        raise DataError(f"{mixed.where}: is of another kind than {found[0].where}; a figure needs "
                        "rows that are asked alike")  # fmt: skip
    return found


def numbered_rows(data: Data, limit: int | None) -> list[tuple[str, int, Any]]:
    """(file and line, line, the row as it came). Raises DataError where there is none."""
    name, numbered = open_data(data)
    found: list[tuple[str, int, Any]] = []
    for line, raw in numbered:
        if limit is not None and len(found) == limit:
            break
        found.append((f"{name}:{line}", line, raw))
    if not found:
        raise DataError(f"{name}: has no rows")
    return found


def ask_all(
    model: Model, questions: Sequence[Question], job: Callable[[Question], Reads[Any]], title: str,
    progress: Progress,
) -> list[Any]:  # fmt: skip
    """What came of each, side by side where the engine gains by it; a ConstraintError for an answer
    that was cut off. Raises DataError naming the row that cannot be asked."""
    found: list[Any] = [None] * len(questions)
    starts = (partial(job, question) for question in questions)
    with reporting(progress, title) as report:
        together = complete_together(model.engine, starts, model.engine.rows_at_a_time)
        for done, (place, outcome) in enumerate(together, 1):
            if isinstance(outcome, GemmaError) and not isinstance(outcome, ConstraintError):
                raise DataError(f"{questions[place].where}: {outcome}") from outcome
            found[place] = outcome
            report(done, len(questions))
    return found


def write_all(
    model: Model, questions: Sequence[Question], options: PromptOptions, title: str,
    progress: Progress, **how: Any,
) -> list[Any]:  # fmt: skip
    """Has the model write an answer to each as it stands, greedily."""
    prompt = plain_prompt(options)

    def job(question: Question) -> Reads[Any]:
        assert isinstance(question.asked, list)
        asked = prompt.as_it_stands(question.asked)
        return model.stream(asked, raw=options.raw, temperature=0.0, **how).whole()

    return ask_all(model, questions, job, title, progress)


def text_of(outcome: Any) -> str:
    """What was said, as far as it came."""
    return str((outcome.result if isinstance(outcome, ConstraintError) else outcome).text)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def plain_prompt(options: PromptOptions) -> TaskPrompt:
    """The prompt of rows that are asked as they stand."""
    return TaskPrompt(options.instruction or "", (), options.raw, "")


def prompt_form(options: PromptOptions, questions: Sequence[Question], own: str) -> dict[str, Any]:
    """How a protocol says what was asked; `own` is the task's prompt for texts."""
    form = own if questions[0].is_text else "the row as it stands"
    return {
        "prompt": f"{form}, as {'plain text' if options.raw else 'a conversation'}",
        "instruction": options.instruction,
    }

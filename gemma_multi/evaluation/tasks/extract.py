"""extract: JSON objects, held to a schema where there is one, field by field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_multi.constraints.schema import write_json
from gemma_multi.errors import ConstraintError, DataError, OptionError
from gemma_multi.evaluation.task import (
    MOST_TOKENS_HELP,
    Findings,
    PromptOptions,
    Question,
    Task,
    answered,
    as_json,
    ask_all,
    prompt_form,
    read_questions,
    text_of,
    write_all,
)
from gemma_multi.options import option
from gemma_multi.progress import Progress
from gemma_multi.scoring import FIELDS, Scoring, read_object, score
from gemma_multi.tasks.extraction import by_schema

if TYPE_CHECKING:
    from gemma_multi.model import Model

_MOST_TOKENS = 256


@dataclass(frozen=True)
class ExtractOptions(PromptOptions):
    """What `extract` can be told."""

    schema: object = option(None, "JSON Schema that answers are held to: a file, or its text.")
    max_tokens: int | None = option(None, MOST_TOKENS_HELP)


def _run(model: Model, data: Any, options: ExtractOptions, progress: Progress) -> Findings:
    questions = read_questions(data, "object", options.limit)
    expected = [_expected(question) for question in questions]
    most = options.max_tokens or _MOST_TOKENS
    if questions[0].is_text:
        given = _filled_in(model, questions, options, most, progress)
    else:
        found = write_all(model, questions, options, "extracting", progress, max_tokens=most,
                          schema=options.schema)  # fmt: skip
        given = [text_of(one) for one in found]
    scored = score(Scoring(FIELDS, ""), expected, given)
    return Findings(
        {"right objects": scored.estimate}, {"field": scored.fields},
        numbers={"no object": sum(read_object(text) is None for text in given)},
        rows=tuple(map(answered, questions, expected, given, scored.right)), count=len(questions),
        protocol={
            **prompt_form(options, questions, "extract's"), "max_tokens": most,
            "answer": "greedy, held to the schema" if options.schema else "written, greedy",
        },
    )  # fmt: skip


def _filled_in(
    model: Model, questions: Sequence[Question], options: ExtractOptions, most: int,
    progress: Progress,
) -> list[str]:  # fmt: skip
    """The object of each text, as JSON."""
    if options.schema is None:
        raise OptionError("rows with a 'text' need a schema for their objects; give one")
    reads = by_schema(model, options.schema, options.instruction, raw=options.raw,
                      temperature=0.0, max_tokens=most)  # fmt: skip
    found = ask_all(model, questions, lambda q: reads(str(q.asked)), "extracting", progress)
    return [text_of(one) if isinstance(one, ConstraintError) else write_json(one) for one in found]


def _expected(question: Question) -> str:
    """The object that is expected, as JSON. Raises DataError where it is none."""
    value = question.expected
    text = value if isinstance(value, str) else as_json(value)
    if read_object(text) is None:
        raise DataError(f"{question.where}: its answer is {text!r}, expected a JSON object")
    return text


TASK = Task(
    "extract", "a 'prompt' and a JSON object for 'completion', or a 'text' and its "
    "'object'", ExtractOptions, _run,
)  # fmt: skip

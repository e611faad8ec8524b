"""extract: JSON objects, held to a schema where there is one, field by field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_multi.constraints.schema import write_json
from gemma_multi.errors import ConstraintError, DataError, OptionError
from gemma_multi.evaluation.task import (
    Answered,
    Findings,
    PromptOptions,
    Question,
    Task,
    as_json,
    ask_all,
    plain_prompt,
    prompt_form,
    read_questions,
    text_of,
)
from gemma_multi.options import option
from gemma_multi.progress import Progress
from gemma_multi.reads import Reads
from gemma_multi.scoring import FIELDS, Scoring, read_object, score
from gemma_multi.tasks.extraction import by_schema

if TYPE_CHECKING:
    from gemma_multi.model import Model

_MOST_TOKENS = 256


@dataclass(frozen=True)
class ExtractOptions(PromptOptions):
    """What `extract` can be told."""

    schema: Any = option(None, "JSON Schema that answers are held to: a file, or its text.")
    max_tokens: int | None = option(
        None, "The most tokens of an answer.  [32 of labels, 512 of ifeval, else 256]"
    )


def _run(model: Model, data: Any, options: ExtractOptions, progress: Progress) -> Findings:
    questions = read_questions(data, "object", options.limit)
    expected = [_expected(question) for question in questions]
    most = options.max_tokens or _MOST_TOKENS
    chosen = {"temperature": 0.0, "max_tokens": most}
    if questions[0].is_text and options.schema is None:
        raise OptionError("rows with a 'text' need a schema for their objects; give one")
    if questions[0].is_text:
        reads = by_schema(model, options.schema, options.instruction, raw=options.raw, **chosen)
    else:
        prompt = plain_prompt(options)

        def reads(asked: Any) -> Reads[Any]:
            stream = model.stream(prompt.as_it_stands(asked), raw=options.raw,
                                  schema=options.schema, **chosen)  # fmt: skip
            return stream.whole()

    found = ask_all(model, questions, lambda q: reads(q.asked), "extracting", progress)
    is_object = questions[0].is_text  # what by_schema gives
    given = [
        write_json(one) if is_object and not isinstance(one, ConstraintError) else text_of(one)
        for one in found
    ]
    scored = score(Scoring(FIELDS, ""), expected, given)
    rows = zip(questions, expected, given, scored.right, strict=True)
    return Findings(
        {"right objects": scored.estimate}, {"field": scored.fields},
        numbers={"no object": sum(read_object(text) is None for text in given)},
        rows=tuple(Answered(q.where, q.shown, *row) for q, *row in rows), count=len(questions),
        protocol={
            **prompt_form(options, questions, "extract's"), "max_tokens": most,
            "answer": "greedy, held to the schema" if options.schema else "written, greedy",
        },
    )  # fmt: skip


def _expected(question: Question) -> str:
    """The object that is expected, as JSON. Raises DataError where it is none."""
    value = question.expected
    text = value if isinstance(value, str) else as_json(value)
    if read_object(text) is None:
        raise DataError(f"{question.where}: its answer is {text!r}, expected a JSON object")
    return text


TASK = Task(
    "extract", "extracting", "a 'prompt' and a JSON object for 'completion', or a 'text' and its "
    "'object'", ExtractOptions, _run,
)  # fmt: skip

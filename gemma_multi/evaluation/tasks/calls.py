"""calls: which functions a model calls, and with which arguments."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gemma_multi.errors import ConstraintError, DataError, OptionError
from gemma_multi.evaluation.task import (
    MOST_TOKENS_HELP,
    Answered,
    Findings,
    Question,
    Task,
    TaskOptions,
    as_json,
    ask_all,
    numbered_rows,
)
from gemma_multi.options import option
from gemma_multi.progress import Progress
from gemma_multi.reads import Reads
from gemma_multi.rows import read_row
from gemma_multi.scoring import Score, confusion, field_scores, share
from gemma_multi.tools import Call

if TYPE_CHECKING:
    from gemma_multi.model import Model

NO_CALL = "no call"
_MOST_TOKENS = 256


@dataclass(frozen=True)
class CallsOptions(TaskOptions):
    """What `calls` can be told."""

    tool_choice: str = option("auto", "auto, required, none, or the name of one tool.")
    max_tokens: int | None = option(None, MOST_TOKENS_HELP)


def _run(model: Model, data: Any, options: CallsOptions, progress: Progress) -> Findings:
    questions, tools, most = [], {}, options.max_tokens or _MOST_TOKENS
    for where, line, raw in numbered_rows(data, options.limit):
        try:
            row = read_row(raw, line)
        except OptionError as error:
            raise DataError(f"{where}: {error}") from None
        if not row.tools:
            raise DataError(f"{where}: has no 'tools' beside its 'messages', which calls are of")
        kind, said = row.turns[-1]
        expected = said if kind == "calls" else ()
        tools[where] = row.tools
        questions.append(Question(where, raw["messages"][:-1], expected))

    def job(question: Question) -> Reads[Any]:
        return model.stream(
            question.asked, tools=tools[question.where], tool_choice=options.tool_choice,
            temperature=0.0, max_tokens=most,
        ).whole()  # fmt: skip

    found = ask_all(model, questions, job, "calling", progress)
    # calls that were cut off are none
    given = [() if isinstance(one, ConstraintError) else one.calls for one in found]
    scored = score_calls([question.expected for question in questions], given)
    rows = [
        Answered(q.where, _last(q), _written(q.expected), _written(calls), right)
        for q, calls, right in zip(questions, given, scored.right, strict=True)
    ]
    return Findings(
        {"right calls": scored.estimate}, {"function": scored.labels, "argument": scored.fields},
        confusion=scored.confusion, rows=tuple(rows), count=len(rows),
        numbers={"cut off": sum(isinstance(one, ConstraintError) for one in found)},
        protocol={"prompt": "the row as it stands, as a conversation with its tools",
                  "tool_choice": options.tool_choice, "answer": "greedy, calls held to the tools",
                  "max_tokens": most},
    )  # fmt: skip


def score_calls(expected: Sequence[Sequence[Call]], given: Sequence[Sequence[Call]]) -> Score:
    """A row is right where all its calls are, whatever their order, with their arguments. In the
    confusion a row stands under the names that it calls."""
    pairs = list(zip(expected, given, strict=True))
    right = tuple(_counted(want) == _counted(got) for want, got in pairs)
    wanted, found = ([_names(calls) for calls in side] for side in (expected, given))
    labels = [name for name, _ in Counter([*wanted, *found]).most_common()]
    fields = field_scores([_arguments(one) for one in expected], [_arguments(one) for one in given])
    return Score(
        "calls", share(sum(right), len(right)), right, confusion(wanted, found, labels), fields
    )


def _counted(calls: Sequence[Call]) -> Counter[str]:
    return Counter(json.dumps(asdict(call), sort_keys=True) for call in calls)


def _names(calls: Sequence[Call]) -> str:
    return " + ".join(sorted(call.name for call in calls)) or NO_CALL


def _arguments(calls: Sequence[Call]) -> dict[str, Any]:
    """Argument -> its values in all calls of a row."""
    found: dict[str, list[Any]] = defaultdict(list)
    for call in calls:
        for name, value in call.arguments.items():
            found[f"{call.name}.{name}"].append(value)
    return found


def _written(calls: Sequence[Call]) -> str:
    return ", ".join(f"{call.name}({as_json(call.arguments)})" for call in calls) or NO_CALL


def _last(question: Question) -> str:
    content = question.shown
    return content if isinstance(content, str) else as_json(content)


TASK = Task(
    "calls", "'tools' and 'messages' that end with the model's 'calls' or its words",
    CallsOptions, _run,
)  # fmt: skip

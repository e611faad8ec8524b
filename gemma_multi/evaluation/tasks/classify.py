"""classify: the likeliest label of each row, or with `free` whatever the model writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_multi.constraints.options import check_choices
from gemma_multi.errors import DataError, OptionError
from gemma_multi.evaluation.task import (
    MOST_TOKENS_HELP,
    Findings,
    PromptOptions,
    Question,
    Task,
    answered,
    ask_all,
    plain_prompt,
    prompt_form,
    read_questions,
    text_of,
    write_all,
)
from gemma_multi.options import option
from gemma_multi.progress import Progress
from gemma_multi.scoring import LABELS, Scoring, score
from gemma_multi.tasks.classification import MAX_LABELS, Classifier, by_labels

if TYPE_CHECKING:
    from gemma_multi.model import Model

_MOST_TOKENS = 32


@dataclass(frozen=True)
class ClassifyOptions(PromptOptions):
    """What `classify` can be told."""

    labels: tuple[str, ...] = option((), "The labels; those of the rows if unset.")
    calibrate: bool = option(False, "Divide by what each label would get without a text.")
    free: bool = option(False, "Let the model write, and count what is no label as none.")
    max_tokens: int | None = option(None, MOST_TOKENS_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.free and self.calibrate:
            raise OptionError("calibrate compares labels, and free lets the model write; give one")
        if self.max_tokens is not None and not self.free:
            raise OptionError("max_tokens is for an answer that is written; give it with free")


def _run(model: Model, data: Any, options: ClassifyOptions, progress: Progress) -> Findings:
    questions = read_questions(data, "label", options.limit)
    labels = _labels(questions, options.labels)
    protocol = prompt_form(options, questions, "classify's")
    probabilities: list[float | None] = [None] * len(questions)
    if options.free:
        if questions[0].is_text:
            raise OptionError("free asks rows as they stand: give a 'prompt' and a 'completion'")
        most = options.max_tokens or _MOST_TOKENS
        written = write_all(model, questions, options, "classifying", progress, max_tokens=most)
        given = [text_of(one) for one in written]
        protocol |= {"answer": "written, greedy", "max_tokens": most}
    else:
        classifier = _classifier(model, questions, labels, options)
        found = ask_all(model, questions, lambda q: classifier(q.asked), "classifying", progress)
        given = [one.label for one in found]
        probabilities = [one.probability for one in found]
        protocol |= {"answer": "the likeliest label", "calibrate": options.calibrate}
    expected = [question.expected.strip() for question in questions]
    scored = score(Scoring(LABELS, "", tuple(labels)), expected, given)
    seen = [one for one in scored.labels.values() if one.recall.count or one.precision.count]
    return Findings(
        {"accuracy": scored.estimate}, {"label": scored.labels}, confusion=scored.confusion,
        numbers={"macro F1": sum(one.f1 for one in seen) / len(seen)},
        rows=tuple(map(answered, questions, expected, given, scored.right, probabilities)),
        count=len(questions), protocol={**protocol, "labels": labels},
    )  # fmt: skip


def _labels(questions: Sequence[Question], given: Sequence[str]) -> list[str]:
    """In the order given, or of how often they come. Raises DataError, OptionError."""
    for question in questions:
        label = question.expected
        if not isinstance(label, str) or not label.strip():
            raise DataError(f"{question.where}: its label is {label!r}, expected some words")
        if given and label.strip() not in given:
            known = ", ".join(map(repr, given))
            raise DataError(f"{question.where}: its label {label!r} is none of {known}")
    counted = Counter(question.expected.strip() for question in questions)
    labels = list(given) or [label for label, _ in counted.most_common()]
    if len(labels) == 1:
        raise DataError(
            f"all rows have the label {labels[0]!r}, so a model that always says so is right; give "
            "rows of every label, or the labels that there are"
        )
    return check_choices("labels", labels, MAX_LABELS)


def _classifier(
    model: Model, questions: Sequence[Question], labels: list[str], options: ClassifyOptions
) -> Classifier:
    if questions[0].is_text:
        return by_labels(model, labels, options.instruction, calibrate=options.calibrate,
                         raw=options.raw)  # fmt: skip
    return Classifier(model, plain_prompt(options), labels, options.calibrate)


TASK = Task(
    "classify", "a 'prompt' and a label for 'completion', or a 'text' and a 'label'",
    ClassifyOptions, _run,
)  # fmt: skip

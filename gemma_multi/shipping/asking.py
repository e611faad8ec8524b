"""Asks a model the held-out rows, writing each answer as it comes, so that a killed process goes on
with the next row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_multi.chat_template import Message
from gemma_multi.files import write_atomically
from gemma_multi.model import Model
from gemma_multi.progress import Progress
from gemma_multi.scoring import LABELS, LOSS, Score, Scoring, perplexity_score, score
from gemma_multi.training.history import read_history
from gemma_multi.training.validation import row_losses


@dataclass(frozen=True)
class Questions:
    """What is asked of every model alike. `messages` are empty for a loss."""

    messages: list[list[Message]]
    rows: Path  # the held-out rows, for their loss
    max_tokens: int  # of an answer
    max_length: int  # of a row

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": str(self.rows)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Questions:
        return cls(**{**plain, "rows": Path(plain["rows"])})


class Answers:
    """Answers (`{"answer": ...}`) or losses (`{"loss": ..., "tokens": ...}`) of held-out rows, in
    order, in a file that grows by a line a row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = read_history(path)

    def keep(self, new: Iterable[Mapping[str, Any]]) -> None:
        """Adds what comes after those that there are."""
        lines = "".join(json.dumps(one) + "\n" for one in self.found)
        write_atomically(self.path, lines.encode())  # without a line that was left unfinished
        with self.path.open("a", encoding="utf-8") as file:
            for one in new:
                self.found.append(dict(one))
                file.write(json.dumps(one) + "\n")
                file.flush()

    @property
    def texts(self) -> list[str]:
        return [one["answer"] for one in self.found]

    def score(self, scoring: Scoring, expected: Sequence[str | None]) -> Score:
        if scoring.kind == LOSS:
            losses, tokens = zip(*((one["loss"], one["tokens"]) for one in self.found), strict=True)
            return perplexity_score(losses, tokens)
        return score(scoring, [text or "" for text in expected], self.texts)


def ask(
    model: Model, questions: Questions, answers: Answers, scoring: Scoring, progress: Progress,
    held_to_labels: bool = False,
) -> None:  # fmt: skip
    """Asks what was not asked yet. `held_to_labels`: nothing but a label can be the answer, which
    is fair to a model that was never told the labels."""
    asked = len(answers.found)
    if scoring.kind == LOSS:
        losses = row_losses(
            model, questions.rows, questions.max_length, first=asked, progress=progress
        )
        answers.keep({"loss": loss, "tokens": tokens} for loss, tokens in losses)
        return
    choices = list(scoring.labels) if held_to_labels and scoring.kind == LABELS else None
    answers.keep(_texts(model, questions, asked, choices, progress))


def _texts(
    model: Model, questions: Questions, first: int, choices: list[str] | None, progress: Progress
) -> Iterator[dict[str, str]]:
    left = [{"messages": messages} for messages in questions.messages[first:]]
    rows = model.batch(
        left, progress=progress, temperature=0.0, max_tokens=questions.max_tokens, choices=choices
    )
    for row in rows:
        if row.error is not None:
            raise row.error
        yield {"answer": row.value.text}

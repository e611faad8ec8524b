"""classify: the probability of each label, from logits instead of from an answer's text.

A label's probability is that of the answer beginning with it, among answers that begin with any of
the labels. So labels of several tokens and of different lengths are compared as the model itself
would: by the product of their tokens' probabilities over the whole vocabulary. Where one label
begins another ("good", "good enough"), the shorter one has what the longer ones leave of it.

One read of the text gives the logits of all first tokens, and only their rows of the head are
computed, since what all labels are divided by cancels. Labels that go on need a step for each
token after which others would have been possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_multi.chat_template import Message
from gemma_multi.constraints.options import check_choices
from gemma_multi.engines import LAST, Rows, Session
from gemma_multi.errors import BackendError, OptionError
from gemma_multi.progress import Progress
from gemma_multi.reads import Read, Reads, complete
from gemma_multi.sampling import not_finite
from gemma_multi.tasks.prompts import TaskPrompt, read_choices, read_instruction, read_texts
from gemma_multi.tasks.running import run_all

if TYPE_CHECKING:
    from gemma_multi.model import Model

MAX_LABELS = 1000
_NO_CONTENT = "N/A"
_LEAST = -1e4  # of log-probabilities that are compared: nothing minus nothing is no number


@dataclass(frozen=True)
class Classification:
    """The most likely label, and how likely each is."""

    label: str
    probabilities: dict[str, float]  # of each label, in the order given; their sum is 1
    prompt_tokens: int
    reused_tokens: int  # of them, read for an earlier prompt

    @property
    def probability(self) -> float:
        """Of the label."""
        return self.probabilities[self.label]

    def __str__(self) -> str:
        return self.label


def classify(
    model: Model, texts: str | Sequence[str], labels: Sequence[str], instruction: str | None = None,
    examples: Any = None, *, calibrate: bool = False, raw: bool = False, progress: Progress = True,
) -> Any:  # fmt: skip
    """See `Model.classify`."""
    classifier = by_labels(
        model, labels, instruction, examples, calibrate=calibrate, raw=raw
    )  # fmt: skip
    return classifier.all(texts, progress)


def by_labels(
    model: Model, labels: Sequence[str], instruction: str | None = None, examples: Any = None, *,
    calibrate: bool = False, raw: bool = False,
) -> Classifier:  # fmt: skip
    """Raises OptionError."""
    names = check_choices("labels", labels, MAX_LABELS)
    default = f"Classify the text as one of: {', '.join(names)}. Answer with one of them only."
    answered = read_choices(examples, "label", names)
    prompt = TaskPrompt(read_instruction(instruction, default), answered, raw, "Label")
    return Classifier(model, prompt, names, calibrate)


class Classifier:
    """A prompt and the labels that an answer to it may begin with."""

    def __init__(self, model: Model, prompt: TaskPrompt, names: list[str], calibrate: bool) -> None:
        self._model, self._prompt, self._names = model, prompt, names
        self._tree = _Node.of([prompt.answer_ids(model, name) for name in names])
        self._shared = prompt.shared(model)
        self._prior = np.zeros(len(names))
        if calibrate:
            self._prior = complete(self._scores(prompt.ids(model, _NO_CONTENT)))[0]

    def all(self, texts: str | Sequence[str], progress: Progress) -> Any:
        """A Classification for each text, or one for one text."""
        given, single = read_texts(texts, "text")
        # each is checked before any is read
        jobs = [self(text) for text in given]
        return run_all(self._model, jobs, single, "classifying", progress)

    def __call__(self, text: str | list[Message]) -> Reads[Classification]:
        """The reads for one text, or for a conversation that is asked as it stands. Raises
        OptionError for one that is none or too long."""
        return self._classification(self._prompt.ids(self._model, text))

    def _classification(self, ids: list[int]) -> Reads[Classification]:
        try:
            scores, reused = yield from self._scores(ids)
        except BackendError:  # what is not finite may be in the caches that others go on from
            self._model.prefixes.clear()
            raise
        scores = np.maximum(scores, _LEAST) - np.maximum(self._prior, _LEAST)
        weights = np.exp(scores - scores.max())
        shares = dict(zip(self._names, (weights / weights.sum()).tolist(), strict=True))
        return Classification(self._names[int(scores.argmax())], shares, len(ids), reused)

    def _scores(self, ids: list[int]) -> Reads[tuple[np.ndarray, int]]:
        """The log-probability of each label up to a constant that is the same for all, `f64[N]`,
        and how many tokens of the prompt were read before."""
        model, tree = self._model, self._tree
        deepest = tree.depth() - 1  # tokens of labels that are read as well
        if len(ids) + deepest > model.context_length:
            model.check_prompt(ids)
            raise OptionError(
                f"the prompt is {len(ids)} tokens long and the labels {deepest + 1}, but the "
                f"context holds {model.context_length}"
            )
        session, reused = model.prefixes.start(
            model.engine, ids, self._shared, model.context_length
        )
        scores = np.full(len(self._names), -np.inf)
        firsts = np.array(sorted(tree.children))
        # labels that are the beginning of others are nothing here: the root is no label
        logits = _finite((yield Read(session, ids[session.length :], Rows(firsts))))
        several = len(tree.children) > 1
        for token, logit in zip(firsts.tolist(), logits.tolist(), strict=True):
            yield from _descend(session, token, tree.children[token], logit, scores, several)
        return scores, reused


def _finite(logits: np.ndarray) -> np.ndarray:
    if not np.isfinite(logits).all():
        raise not_finite("logits")
    return logits


def _descend(
    session: Session, token: int, node: _Node, reached: float, scores: np.ndarray, fork: bool
) -> Reads[float]:
    """Fills in the scores of the labels from a node on, which is reached with a log-probability;
    the logarithm of what they have of it together."""
    taken = -np.inf  # by the labels that go on
    if node.children:
        session = session.fork() if fork else session
        logits = _finite((yield Read(session, [token], LAST)))
        top = logits.max()
        total = float(top + np.log(np.exp(logits - top).sum(dtype=np.float64)))
        for child, below in node.children.items():
            on = reached + float(logits[child]) - total
            several = len(node.children) > 1
            found = yield from _descend(session, child, below, on, scores, several)
            taken = np.logaddexp(taken, found)
    if node.label is None:
        return float(taken)
    # all that reaches it and does not go on to a longer label
    rest = -np.expm1(min(taken - reached, 0.0))
    scores[node.label] = reached + np.log(rest) if rest > 0 else -np.inf
    return reached


@dataclass
class _Node:
    """A place in the tree of labels' tokens."""

    label: int | None = None  # that ends here
    children: dict[int, _Node] = field(default_factory=dict)

    @classmethod
    def of(cls, labels: Sequence[Sequence[int]]) -> _Node:
        root = cls()
        for i, ids in enumerate(labels):
            node = root
            for token in ids:
                node = node.children.setdefault(token, cls())
            node.label = i
        return root

    def depth(self) -> int:
        return 1 + max((child.depth() for child in self.children.values()), default=-1)

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

from gemma_multi.constraints.options import check_choices
from gemma_multi.engines import LAST, Rows, Session
from gemma_multi.errors import OptionError
from gemma_multi.progress import Progress, reporting
from gemma_multi.tasks.prompts import TaskPrompt, read_choices, read_instruction, read_texts

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
    names = check_choices("labels", labels, MAX_LABELS)
    default = f"Classify the text as one of: {', '.join(names)}. Answer with one of them only."
    answered = read_choices(examples, "label", names)
    prompt = TaskPrompt(read_instruction(instruction, default), answered, raw, "Label")
    return classify_prompts(model, prompt, texts, names, calibrate, progress)


def classify_prompts(
    model: Model, prompt: TaskPrompt, texts: Any, names: list[str], calibrate: bool,
    progress: Progress,
) -> Any:  # fmt: skip
    """A Classification for each text, or one for one text."""
    given, single = read_texts(texts, "text")
    tree = _Node.of([prompt.answer_ids(model, name) for name in names])
    shared = prompt.shared(model)
    prior = np.zeros(len(names))
    if calibrate:
        prior, _, _ = _scores(model, prompt.ids(model, _NO_CONTENT), shared, tree, len(names))
    prompts = [prompt.ids(model, text) for text in given]  # each is checked before any is read
    found = []
    with reporting(progress, "classifying") as report:
        for ids in prompts:
            found.append(_classification(model, ids, shared, tree, names, prior))
            if not single:
                report(len(found), len(prompts))
    return found[0] if single else found


def _classification(
    model: Model, ids: list[int], shared: int, tree: _Node, names: list[str], prior: np.ndarray
) -> Classification:
    scores, tokens, reused = _scores(model, ids, shared, tree, len(names))
    scores = np.maximum(scores, _LEAST) - np.maximum(prior, _LEAST)
    weights = np.exp(scores - scores.max())
    shares = (weights / weights.sum()).tolist()
    best = names[int(scores.argmax())]
    return Classification(best, dict(zip(names, shares, strict=True)), tokens, reused)


def _scores(
    model: Model, ids: list[int], shared: int, tree: _Node, count: int
) -> tuple[np.ndarray, int, int]:
    """The log-probability of each label up to a constant that is the same for all, `f64[count]`,
    the prompt's tokens and those of them that were read before."""
    deepest = tree.depth() - 1  # tokens of labels that are read as well
    if len(ids) + deepest > model.context_length:
        model.check_prompt(ids)
        raise OptionError(
            f"the prompt is {len(ids)} tokens long and the labels {deepest + 1}, but the context "
            f"holds {model.context_length}"
        )
    session, reused = model.prefixes.start(model.engine, ids, shared, model.context_length)
    scores = np.full(count, -np.inf)
    firsts = np.array(sorted(tree.children))
    # labels that are the beginning of others are nothing here: the root is no label
    logits = session.read(ids[session.length :], Rows(firsts)).astype(np.float64)
    for token, logit in zip(firsts.tolist(), logits.tolist(), strict=True):
        _descend(session, token, tree.children[token], logit, scores, len(tree.children) > 1)
    return scores, len(ids), reused


def _descend(
    session: Session, token: int, node: _Node, reached: float, scores: np.ndarray, fork: bool
) -> float:
    """Fills in the scores of the labels from a node on, which is reached with a log-probability;
    the logarithm of what they have of it together."""
    taken = -np.inf  # by the labels that go on
    if node.children:
        session = session.fork() if fork else session
        logits = session.read([token], LAST)
        top = logits.max()
        total = float(top + np.log(np.exp(logits - top).sum(dtype=np.float64)))
        for child, below in node.children.items():
            on = reached + float(logits[child]) - total
            several = len(node.children) > 1
            taken = np.logaddexp(taken, _descend(session, child, below, on, scores, several))
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

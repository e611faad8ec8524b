"""Level 4, text: does every side write what the others would have written?

Design choices:
- One side writes, step by step, as a user's `generate` does. All sides then read what was written,
  the writer too, and say at each place which token they would have chosen. Up to the first place
  where two of them differ, their texts are the same, token by token.
- To a few prompts every side writes an answer; over many they take turns, the reference half as
  often as the others. Where reading agrees (`logits`) and the text does not, writing is to blame.
- A text that a third side wrote counts for a pair only as far as it is what the pair would write.
- Where texts part, the gap between the two tokens in the reference's logits tells a tie from a
  bug. Sampling adds the same noise on all sides, without filters, so that its gap means the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gemma_multi.comparison.tolerances import Tolerance
from gemma_multi.engines import ALL
from gemma_multi.generation import Decoding, generate_tokens
from gemma_multi.model import Model
from gemma_multi.sampling import GenerationOptions, choose
from gemma_multi.sampling.noise import gumbel

GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True)
class Written:
    """An answer, and whether a stop token ended it."""

    tokens: tuple[int, ...]
    stopped: bool


@dataclass(frozen=True)
class Divergence:
    """Where two texts part."""

    prompt: str
    mode: str  # GREEDY or SAMPLED
    position: int  # tokens that are the same
    expected: str  # the reference's token
    received: str
    gap: float  # between the two in the reference's logits, at least 0
    tie: bool


@dataclass
class TextResult:
    """All texts of one pair."""

    allowed: Tolerance
    texts: dict[str, int] = field(default_factory=lambda: {GREEDY: 0, SAMPLED: 0})
    tokens: dict[str, int] = field(default_factory=lambda: {GREEDY: 0, SAMPLED: 0})
    divergences: list[Divergence] = field(default_factory=list)

    def add(self, judge: Judge) -> None:
        self.texts[judge.mode] += judge.done
        self.tokens[judge.mode] += judge.same
        if judge.found:
            self.divergences.append(judge.found)

    @property
    def bugs(self) -> list[Divergence]:
        return [d for d in self.divergences if not d.tie]

    @property
    def passed(self) -> bool:
        return self.texts[GREEDY] > 0 and not self.bugs

    def parted(self, mode: str) -> list[Divergence]:
        return [d for d in self.divergences if d.mode == mode]

    @property
    def summary(self) -> str:
        parts = []
        for mode, count in self.texts.items():
            parted = self.parted(mode)
            part = (
                f"{mode}: {count - len(parted)} of {count} the same ({self.tokens[mode]:,} tokens)"
            )
            if parted:
                first = min(parted, key=lambda d: d.position)
                gap = max(d.gap for d in parted)
                part += f", the others part from token {first.position} on, at gaps up to {gap:.2g}"
            parts.append(part)
        if self.bugs:
            worst = max(self.bugs, key=lambda d: d.gap)
            parts.append(
                f"no tie: {worst.prompt}, token {worst.position}: {worst.received} instead of "
                f"{worst.expected}, {worst.gap:.2g} apart"
            )
        return "; ".join(parts)


@dataclass(frozen=True)
class Disagreement:
    """A token of somebody's greedy text that a model would not have chosen."""

    position: int  # in the text, in tokens
    received: str
    expected: str  # the model's own choice
    gap: float  # between the two, in the model's logits
    tie: bool


def disagreements(
    model: Model, prompt: Sequence[int], text: str, tie: float, stopped: bool = True
) -> list[Disagreement]:
    """Where `model` would have gone on otherwise, had it written `text` greedily after `prompt`.

    Reads the text as it stands and looks at every token of it, and at the end of the turn after it
    if it `stopped` there. `tie` is how close two logits must be for either to be right.
    """
    tokens = model.tokenizer.encode(text)
    session = model.engine.session(model.context_length)
    logits = session.read([*prompt, *tokens], ALL)[len(prompt) - 1 :]
    stops = sorted(model.stop_ids)
    found = []
    for i, row in enumerate(logits[: len(tokens) + stopped]):
        allowed = row[: model.tokenizer.vocab_size]
        best = int(allowed.argmax())
        wrote = tokens[i] if i < len(tokens) else max(stops, key=lambda token: allowed[token])
        if best != wrote:
            gap = float(allowed[best] - allowed[wrote])
            received, expected = (repr(model.tokenizer.piece(token)) for token in (wrote, best))
            found.append(Disagreement(i, received, expected, gap, gap <= tie))
    return found


def sampling_options(model: Model, mode: str, max_tokens: int, seed: int) -> GenerationOptions:
    """Greedy, or the checkpoint's temperature without filters."""
    if mode == GREEDY:
        return GenerationOptions(max_tokens=max_tokens, temperature=0.0, seed=seed)
    usual = GenerationOptions.merge(model.checkpoint.generation, {"seed": seed})
    warmth = usual.temperature or 1.0
    plain = replace(usual, temperature=warmth, top_k=0, top_p=1.0, min_p=0.0, stop=())
    return replace(plain, repetition_penalty=1.0, max_tokens=max_tokens)


def write(model: Model, ids: Sequence[int], options: GenerationOptions) -> Written:
    """The model's answer, step by step."""
    session = model.engine.session(model.context_length)
    decoding = Decoding(
        options, ids, model.stop_ids, vocabulary=model.tokenizer.vocab_size,
        context_length=session.context_length,
    )  # fmt: skip
    tokens = tuple(generate_tokens(session, ids, decoding))
    return Written(tokens, decoding.finish_reason == "stop")


class Judge:
    """Follows one written text with the logits of both sides of a pair until they part."""

    def __init__(
        self, prompt: str, mode: str, model: Model, ids: Sequence[int], written: Written,
        options: GenerationOptions, allowed: Tolerance, writer: str,
    ) -> None:  # fmt: skip
        """`writer` is "reference", "other", or someone else."""
        self.mode = mode
        self._prompt, self._model = prompt, model
        self._start, self._options, self._allowed = len(ids), options, allowed
        self._writer = writer
        self._stops = sorted(model.stop_ids)
        self._tokens = written.tokens + ((self._stops[0],) if written.stopped else ())
        self._left = False  # the text is no longer what this pair would write
        self.same = 0  # tokens
        self.found: Divergence | None = None

    @property
    def done(self) -> bool:
        """Whether the whole text was followed, or as far as the two sides agree."""
        return self.found is not None or self.same == len(self._tokens)

    def look(self, first: int, mine: np.ndarray, theirs: np.ndarray) -> None:
        """Logits that choose the tokens `first`, ...: `f32[T, V]`, the reference's first."""
        for t in range(first, min(first + len(mine), len(self._tokens))):
            if self.found or self._left:
                return
            row, wrote = mine[t - first], self._tokens[t]
            expected, received = self._choose(row, t), self._choose(theirs[t - first], t)
            claims = {  # what must be the same, the likelier culprit second
                "reference": ((expected, wrote), (wrote, received)),
                "other": ((received, wrote), (expected, wrote)),
            }.get(self._writer, ((expected, received),))
            for a, b in claims:
                if a != b:
                    self.found = self._part(t, row, a, b)
                    return
            self._left = expected != wrote
            self.same += not self._left

    def _part(self, t: int, row: np.ndarray, expected: int, received: int) -> Divergence:
        gap = abs(self._score(row, expected, t) - self._score(row, received, t))
        expected_piece, received_piece = (
            repr(self._model.tokenizer.piece(token)) for token in (expected, received)
        )
        return Divergence(
            self._prompt, self.mode, t, expected_piece, received_piece, gap,
            tie=gap <= self._allowed.tie,
        )  # fmt: skip

    def _choose(self, row: np.ndarray, t: int) -> int:
        """The token that follows; all stop tokens are one."""
        allowed = row[: self._model.tokenizer.vocab_size]
        token = choose(allowed, np.zeros(0, np.int32), self._options, self._start + t)
        return self._stops[0] if token in self._stops else token

    def _score(self, logits: np.ndarray, token: int, t: int) -> float:
        """What sampling compares, in units of the logits."""
        tokens = np.array(self._stops if token == self._stops[0] else [token])
        scores = logits[tokens].astype(np.float64)
        if self.mode == SAMPLED:
            noise = gumbel(np, self._options.seed or 0, self._start + t, tokens)
            scores += self._options.temperature * noise
        return float(scores.max())

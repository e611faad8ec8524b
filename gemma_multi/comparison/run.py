"""One run over all subjects and prompts: every level, side by side, nothing kept but figures.

Subjects read the same tokens at the same time, a chunk at a time, so that what is held at once is
one chunk of logits a subject, and prompts are read once for all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_multi.comparison.layers import LayersResult, LayerTrace, trace_layers
from gemma_multi.comparison.logits import LogitsResult
from gemma_multi.comparison.prompts import Prompt
from gemma_multi.comparison.subjects import Subject
from gemma_multi.comparison.text import (
    GREEDY,
    SAMPLED,
    Judge,
    TextResult,
    sampling_options,
    write,
)
from gemma_multi.comparison.tokens import TokensResult, compare_tokens
from gemma_multi.comparison.tolerances import Tolerance, tolerance_of
from gemma_multi.comparison.weights import WeightsResult, compare_weights
from gemma_multi.engines import ALL, Session
from gemma_multi.progress import Report, silent

MAX_TOKENS, SAMPLED_TOKENS = 200, 32
_FEW = 12  # prompts, up to which every side writes each answer
_CHUNK_LOGITS = 1 << 25  # numbers in one chunk of logits, 134 MB
_CHUNK_TOKENS = 512

Result = WeightsResult | TokensResult | LogitsResult | TextResult | LayersResult


@dataclass(frozen=True)
class Comparison:
    """What was found between the reference and one other subject."""

    reference: Subject
    other: Subject
    allowed: Tolerance
    weights: WeightsResult
    tokens: TokensResult
    logits: LogitsResult
    text: TextResult
    layers: LayersResult | None = None  # only where it was asked for

    @property
    def levels(self) -> dict[str, Result]:
        found: dict[str, Result] = {
            "weights": self.weights,
            "tokens": self.tokens,
            "logits": self.logits,
            "text": self.text,
        }
        if self.layers is not None:
            found["layers"] = self.layers
        return found

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.levels.values())


def compare(
    subjects: Sequence[Subject], prompts: Sequence[Prompt], *, max_tokens: int = MAX_TOKENS,
    seed: int = 0, trace: bool = False, progress: Report = silent,
) -> list[Comparison]:  # fmt: skip
    """Compares the first subject with each of the others."""
    reference, *others = subjects
    pairs = [_Pair(reference, other) for other in others]
    traces = [pair.trace for pair in pairs] if trace else []
    steps = len(pairs) + len(prompts) * (1 + trace)
    turns = [*others, *others, reference]  # most is written by what is under test
    weights = []
    for pair in pairs:
        weights.append(compare_weights(reference, pair.other, pair.allowed))
        progress(len(weights), steps)
    tokens = [compare_tokens(reference, pair.other, prompts) for pair in pairs]
    for i, prompt in enumerate(prompts):
        writers = subjects if len(prompts) <= _FEW else [turns[i % len(turns)]]
        _compare_on(subjects, pairs, prompt, writers, max_tokens, seed)
        progress(len(pairs) + i + 1, steps)
    for i, prompt in enumerate(prompts if trace else ()):
        ids = reference.model.encode(prompt.content, raw=prompt.raw)
        trace_layers(reference, others, traces, ids)
        progress(len(pairs) + len(prompts) + i + 1, steps)
    return [
        Comparison(reference, pair.other, pair.allowed, weights[i], tokens[i], pair.logits,
                   pair.text, pair.trace.result() if trace else None)
        for i, pair in enumerate(pairs)
    ]  # fmt: skip


class _Pair:
    """The reference and one other subject, while figures are collected."""

    def __init__(self, reference: Subject, other: Subject) -> None:
        config = reference.model.config
        self.other = other
        self.allowed = tolerance_of(reference.compute, other.compute)
        self.logits = LogitsResult(config.sliding_window, self.allowed)
        self.text = TextResult(self.allowed)
        self.trace = LayerTrace(config, self.allowed)


def _compare_on(
    subjects: Sequence[Subject], pairs: Sequence[_Pair], prompt: Prompt,
    writers: Sequence[Subject], max_tokens: int, seed: int,
) -> None:  # fmt: skip
    """One prompt: all read it, some write answers, and all read those."""
    model = subjects[0].model
    ids = model.encode(prompt.content, raw=prompt.raw)
    room = min(s.model.context_length for s in subjects) - len(ids)
    sessions = [s.model.engine.session(s.model.context_length) for s in subjects]
    after = _read_prompt(sessions, pairs, prompt, ids)
    for mode, length in ((GREEDY, max_tokens), (SAMPLED, min(max_tokens, SAMPLED_TOKENS))):
        options = sampling_options(model, mode, min(length, room), seed)
        known: set[tuple[int, ...]] = set()  # of greedy texts, each counts once in the logits
        for writer in writers:
            written = write(writer.model, ids, options)
            judges = [
                Judge(prompt.name, mode, model, ids, written, options, pair.allowed,
                      {subjects[0]: "reference", pair.other: "other"}.get(writer, "third"))
                for pair in pairs
            ]  # fmt: skip
            for judge, row in zip(judges, after[1:], strict=True):
                judge.look(0, after[0], row)
            counts = mode == GREEDY and written.tokens not in known
            forks = [session.fork() for session in sessions]
            for start, (mine, *others) in _in_chunks(forks, written.tokens):
                for pair, judge, theirs in zip(pairs, judges, others, strict=True):
                    if counts:
                        pair.logits.add(prompt.name, len(ids) + start, mine, theirs)
                    judge.look(start + 1, mine, theirs)
            known.add(written.tokens)
            for pair, judge in zip(pairs, judges, strict=True):
                pair.text.add(judge)


def _read_prompt(
    sessions: Sequence[Session], pairs: Sequence[_Pair], prompt: Prompt, ids: Sequence[int]
) -> list[np.ndarray]:
    """Adds the prompt's logits to each pair, or the last alone; those, `f32[1, V]` a session."""
    first = len(ids) - 1 if prompt.only_answer else 0
    for start, (mine, *theirs) in _in_chunks(sessions, ids):
        left_out = max(0, first - start)
        for pair, logits in zip(pairs, theirs, strict=True):
            if left_out < len(mine):
                pair.logits.add(prompt.name, start + left_out, mine[left_out:], logits[left_out:])
    return [logits[-1:].copy() for logits in (mine, *theirs)]  # a view would keep the chunk


def _in_chunks(
    sessions: Sequence[Session], ids: Sequence[int]
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(the first position, each session's logits) for all of `ids`."""
    vocabulary = sessions[0].config.vocab_size
    size = max(1, min(_CHUNK_TOKENS, _CHUNK_LOGITS // vocabulary))
    for start in range(0, len(ids), size):
        yield start, [s.read(ids[start : start + size], ALL) for s in sessions]

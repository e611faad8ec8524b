"""Specialists of the real Gemma 3 270M, on rows that people wrote and judged.

    python benchmarks/specialists.py [--task spam] [--rows 20 200] [--json results/...json]

The base is calibrated once (`quantize`), and for every task and number of rows its scales and norms
are trained (`finetune`, method "scales"): that int4 is asked unseen rows on Keras and, exported, in
LiteRT-LM, Google's runtime for phones. Beside it stand the same base trained in full and kept in
bfloat16; what becomes of that in int4, calibrated on its rows and its scales trained for one more
epoch; VADER (which was made on rows like these), and TF-IDF with logistic regression on the same
rows. Rows are added to `--json` as they are found.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from other_peoples_files import gemma_270m
from real_rows import TASKS, Row
from rich.console import Console
from rich.progress import track
from side_by_side import columns

import gemma_multi
from gemma_multi.litert_lm import in_litert_lm
from gemma_multi.scoring import EXACT, Estimate, Scoring
from gemma_multi.scoring import score as score_of
from gemma_multi.sources import Source
from gemma_multi.training.calibrated import calibrated
from gemma_multi.training.result import FineTune
from gemma_multi.transforms import original

UNSEEN = {"film reviews": 400, "spam": 300, "names": 200}
EPOCHS = {20: 15, 200: 3, 2000: 1}  # by rows
BATCH = {20: 4, 200: 8, 2000: 8}
_MOST_TOKENS = {"film reviews": 4, "spam": 4, "names": 40}  # of an answer
Ask = Callable[[str], str]


@dataclass(frozen=True)
class Score:
    """How many of the unseen rows one way got right."""

    task: str
    rows: int
    way: str
    right: float
    low: float  # of the 95% interval
    high: float
    unseen: int
    seconds: float  # of training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--rows", type=int, nargs="+", default=list(EPOCHS), choices=EPOCHS)
    parser.add_argument(
        "--ways", nargs="+", help="only these", choices=["int4", "bfloat16", "other"]
    )
    parser.add_argument("--backend", default="keras", help="to train and ask on")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    options = parser.parse_args()
    found: list[Score] = []
    for task in options.task or TASKS:
        rows = TASKS[task]()
        unseen, others = rows[: UNSEEN[task]], rows[UNSEEN[task] :]
        for count in options.rows:
            for score in scores(task, others[:count], unseen, options):
                found.append(score)
                Console(stderr=True).print(score)
                if options.json:
                    _add(options.json, score)
    _show(found)


def scores(
    task: str, rows: list[Row], unseen: list[Row], options: argparse.Namespace
) -> Iterable[Score]:
    def asked(way: str, ask: Ask, seconds: float = 0.0) -> Score:
        found = share_right(ask, unseen)
        return Score(task, len(rows), way, found.value, found.low, found.high, len(unseen), seconds)

    ways = options.ways or ["other", "int4", "bfloat16"]
    if "other" in ways and task != "names":
        yield asked("TF-IDF, logistic regression", _logistic_regression(rows))
        if task == "film reviews":
            yield asked("VADER", _vader())
    with tempfile.TemporaryDirectory() as work:
        base = original(gemma_multi.open_checkpoint(gemma_270m()))
        most, train = _MOST_TOKENS[task], partial(_trained, rows, options.backend)
        if "int4" in ways:
            calibrated(base, progress=True)  # once and for all, and not a part of training
            begin = time.monotonic()
            result = train(base, Path(work, "int4"), method="scales")
            seconds = time.monotonic() - begin
            yield asked("this package, int4", _answers(result.model, most), seconds)
            file = Path(work, "expert.litertlm")
            gemma_multi.export(result.path(), file, context_length=512)
            with in_litert_lm(file, most) as ask:
                yield asked("this package, int4 in LiteRT-LM", ask)
        if "bfloat16" in ways:
            begin = time.monotonic()
            result = train(base, Path(work, "bfloat16"), method="full", qat=False)
            seconds = time.monotonic() - begin
            yield asked("this package, bfloat16", _answers(result.model, most), seconds)
            begin, rounded = time.monotonic(), Path(work, "rounded")
            gemma_multi.quantize(result.path(), rounded, calibrate=rows)
            result = train(rounded, Path(work, "after"), epochs=1)
            seconds += time.monotonic() - begin
            yield asked("this package, int4 of that", _answers(result.model, most), seconds)


def _trained(
    rows: list[Row], backend: str, model: Source, output: Path, **options: Any
) -> FineTune:
    return gemma_multi.finetune(
        model, rows, output, backend=backend, validation=0, schedule="cosine",
        **{"epochs": EPOCHS[len(rows)], "batch_size": BATCH[len(rows)], **options},
    )  # fmt: skip


def share_right(ask: Ask, unseen: list[Row]) -> Estimate:
    answers = [ask(row["prompt"]) for row in track(unseen, "asking", transient=True)]
    return score_of(Scoring(EXACT, ""), [row["completion"] for row in unseen], answers).estimate


def _answers(model: gemma_multi.Model, most: int) -> Ask:
    return lambda prompt: model.generate(prompt, temperature=0, max_tokens=most).text


def _logistic_regression(rows: list[Row]) -> Ask:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10)
    )
    model.fit([_subject(row["prompt"]) for row in rows], [row["completion"] for row in rows])
    return lambda prompt: str(model.predict([_subject(prompt)])[0])


def _vader() -> Ask:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer().polarity_scores
    return lambda text: "positive" if judge(_subject(text))["compound"] > 0 else "negative"


def _subject(prompt: str) -> str:
    """What the question is about, without the question."""
    return prompt.split("\n", 1)[1]


def _add(path: Path, score: Score) -> None:
    """In place of one that was found before."""
    kept = json.loads(path.read_text()) if path.exists() else []
    new = asdict(score)
    same = ("task", "rows", "way")
    kept = [old for old in kept if any(old[key] != new[key] for key in same)]
    path.write_text(json.dumps([*kept, new], indent=1) + "\n")


def _show(found: list[Score]) -> None:
    table = columns(("task", "way"), ("rows", "right", "95%", "training"))
    for one in found:
        seconds = f"{one.seconds:.0f} s" if one.seconds else ""
        interval = f"{one.low:.0%} to {one.high:.0%}"
        table.add_row(one.task, one.way, str(one.rows), f"{one.right:.1%}", interval, seconds)
    Console().print(table)


if __name__ == "__main__":
    main()

"""The words over which a student is compared to its teacher, where all would be too many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint, tokenizer

from gemma_multi.calibration import calibrate
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.engines import ALL, create_engine
from gemma_multi.training import vocabulary
from gemma_multi.training.examples import Examples, prepare
from gemma_multi.training.head import chunk_loss
from gemma_multi.training.vocabulary import Vocabulary, likely_words
from training.conftest import ROWS, make_batch, make_trainer

WORDS = 8192


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_LIKELY", 1024)
    monkeypatch.setattr(vocabulary, "_STRETCHES", 1024)


@pytest.fixture
def rows(tmp_path: Path) -> Examples:
    return prepare(ROWS, tokenizer(), tmp_path / "rows.i32", max_length=64)


def test_the_likely_come_first_and_every_word_is_counted_once(few: None, rows: Examples) -> None:
    teacher = tiny_checkpoint(vocab_size=WORDS)
    words = likely_words(teacher, rows)
    assert words is not None
    counts = np.exp(words.log_weights)
    assert counts.sum() == pytest.approx(WORDS)
    assert len(set(words.ids.tolist())) == len(words.ids) == 2048
    assert (counts[:1024] == 1).all()

    engine = create_engine(teacher, "keras", "float32")
    mass = np.zeros(WORDS)
    for i in range(len(rows)):
        logits = engine.session().read(rows.example(i)[0], ALL).astype(np.float64)
        mass += (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).sum(0)
    found = set(words.ids[:1024].tolist())
    assert len(found & set(np.argsort(-mass)[:1024].tolist())) > 1000  # ties, to float32
    assert mass[words.ids[:1024]].min() > mass[words.ids[1024:]].max() * (1 - 1e-4)


def test_few_words_are_all_taken(rows: Examples) -> None:
    assert likely_words(tiny_checkpoint(vocab_size=WORDS), rows) is None


def test_a_word_that_stands_for_its_equals_changes_nothing() -> None:
    """Words of one vector have one probability, so one of them with their number is all of them."""
    rng = np.random.default_rng(0)
    counts = np.array([1, 1, 4, 7, 2])
    theirs, ours = rng.normal(size=(2, 5, 8)).astype(np.float32)
    teacher, hidden = rng.normal(size=(2, 3, 8)).astype(np.float32)
    labels = np.array([0, 1, -1])
    every = chunk_loss(np, hidden, np.repeat(ours, counts, 0), labels,
                       (teacher, np.repeat(theirs, counts, 0)))  # fmt: skip
    some = chunk_loss(np, hidden, ours, labels, (teacher, theirs),
                      np.log(counts).astype(np.float32))  # fmt: skip
    assert some.loss == pytest.approx(every.loss, rel=1e-5)
    np.testing.assert_allclose(some.hidden, every.hidden, atol=1e-5)


def step(
    backend: str, base: Checkpoint, teacher: Checkpoint, rows: Examples, words: Vocabulary | None
) -> tuple[float, float]:
    trainer = make_trainer(
        backend, base, teacher=teacher, vocabulary=words, qat=True, method="scales"
    )
    ids = np.stack([rows.example(i)[0][:16] for i in range(8)])
    labels = np.where(ids[:, 1:] > 0, ids[:, 1:], -1)
    labels = np.concatenate([labels, np.full((8, 1), -1)], 1).astype(np.int32)
    found = trainer.step(make_batch(ids, labels), 1e-3)
    return float(found.loss), float(found.gradient_norm)


def test_a_step_over_some_words_is_nearly_one_over_all(
    few: None, rows: Examples, trainer_backend: str
) -> None:
    teacher = tiny_checkpoint(vocab_size=WORDS)
    base = calibrate(teacher)[0]
    words = likely_words(teacher, rows)
    some = step(trainer_backend, base, teacher, rows, words)
    every = step(trainer_backend, base, teacher, rows, None)
    assert some == pytest.approx(every, rel=0.1)
    assert some != every

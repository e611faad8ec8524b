"""The bundled model does what it is for, on combinations it was never trained on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import gemma_multi
from gemma_multi.rows import read_row
from gemma_multi.sources import BUNDLED
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.training.examples import HAS_LOSS, tokenize
from gemma_multi.training.history import read_history

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "storyteller"))

import corpus
import evaluate
import stories
import tasks


@pytest.fixture(scope="module")
def model() -> gemma_multi.Model:
    return gemma_multi.load(
        "storyteller", backend="litert", precision="float32"
    )  # the fastest here


@pytest.mark.slow
def test_stories_name_hero_setting_and_twist_and_end(model: gemma_multi.Model) -> None:
    scores = evaluate.story_scores(model, 100)
    assert scores["all"] >= 0.95, scores


def test_stories_are_longer_than_the_window_and_follow_the_length(
    model: gemma_multi.Model,
) -> None:
    lengths: dict[str, list[int]] = {name: [] for name in stories.LENGTHS}
    for controls in stories.held_out_controls(12, seed=1):
        result = model.generate(controls.prompt(), seed=0)
        lengths[controls.length].append(result.generated_tokens)
    averages = [sum(v) / len(v) for v in lengths.values()]
    assert averages == sorted(averages)
    assert min(averages) > model.config.sliding_window


def test_tasks_are_answered(model: gemma_multi.Model) -> None:
    scores = evaluate.task_scores(model, 20)
    assert set(scores) == {"sentiment", "entities", "routing", "structure", "compliance"}
    assert all(score >= 0.9 for score in scores.values()), scores


def test_training_never_sees_what_is_held_out() -> None:
    import random

    held_out = stories.held_out_controls(200)
    assert len({(c.hero, c.setting, c.twist) for c in held_out}) == 200
    assert all(stories.is_held_out(controls) for controls in held_out)
    prompts = {c.prompt() for c in held_out}
    for i in range(2000):
        assert stories.conversation(random.Random(i))[0]["content"] not in prompts


def test_the_corpus_is_the_same_every_time_and_scores_only_the_answers() -> None:
    tokenizer = gemma_multi.load("storyteller", backend="keras").tokenizer
    again = Tokenizer(corpus.train_tokenizer())
    assert [again.piece(i) for i in range(4096)] == [tokenizer.piece(i) for i in range(4096)]
    rows = list(corpus.rows(200))
    assert rows == list(corpus.rows(200))
    assert rows != list(corpus.rows(200, seed=1))
    for row in [*rows, *corpus.held_out(20)]:
        words = tokenize(tokenizer, read_row(row))
        said = tokenizer.decode(int(word) & (HAS_LOSS - 1) for word in words if word >= HAS_LOSS)
        assert said
        assert "Hero:" not in said


def test_every_task_has_an_answer_that_its_prompt_supports() -> None:
    import random

    rng = random.Random(0)
    for _ in range(500):
        task = tasks.structure(rng)
        assert task.answer.splitlines()[0].removeprefix("customer: ") in task.prompt
        task = tasks.routing(rng)
        assert task.answer in task.prompt


def test_the_script_trains_from_nothing_and_through_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of `train.py` on a smaller model; a second start finds both runs finished."""
    import shutil

    import train

    monkeypatch.setattr(train, "CONFIG", train.CONFIG.replace(
        num_hidden_layers=2, layer_types=train.CONFIG.layer_types[:2], hidden_size=64,
        intermediate_size=64))  # fmt: skip
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(BUNDLED["storyteller"] / "tokenizer.model", tmp_path / "tokenizer")
    monkeypatch.setattr(sys, "argv", ["train.py", "--rows", "160", "--qat-rows", "80", "--work",
                                      str(tmp_path)])  # fmt: skip
    train.main()
    made = gemma_multi.open_checkpoint(tmp_path / "qat" / "model")
    assert (made.precision, made.grid) == ("int4", "portable")
    assert made.provenance.license == "apache-2.0"
    losses = [record["loss"] for record in read_history(tmp_path / "dense" / "history.jsonl")
              if "loss" in record]  # fmt: skip
    assert losses[-1] < losses[0] - 0.5
    train.main()
    assert gemma_multi.open_checkpoint(tmp_path / "qat" / "model").digest() == made.digest()

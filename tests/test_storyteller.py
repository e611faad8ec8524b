"""The bundled model does what it is for, on combinations it was never trained on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import gemma_multi
from gemma_multi.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "storyteller"))

import corpus
import evaluate
import stories
import tasks


@pytest.fixture(scope="module")
def model() -> gemma_multi.Model:
    return gemma_multi.load("storyteller", backend="keras")


def test_stories_name_hero_setting_and_twist_and_end(model: gemma_multi.Model) -> None:
    scores = evaluate.story_scores(model, 200)
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
    for step in range(8):
        ids, mask = corpus.batch(tokenizer, step)
        again, _ = corpus.batch(tokenizer, step)
        assert (ids == again).all()
        assert ids.shape == mask.shape
        for row, said in zip(ids.tolist(), mask.tolist(), strict=True):
            text = tokenizer.decode(t for t, m in zip(row, said, strict=True) if m)
            assert text
            assert "Hero:" not in text
            assert row[said.index(1) - 1] == tokenizer.encode("\n")[0]  # after `model\n`
            last = max(i for i, m in enumerate(said) if m)
            assert row[last] == tokenizer.end_of_turn_id


def test_every_task_has_an_answer_that_its_prompt_supports() -> None:
    import random

    rng = random.Random(0)
    for _ in range(500):
        task = tasks.structure(rng)
        assert task.answer.splitlines()[0].removeprefix("customer: ") in task.prompt
        task = tasks.routing(rng)
        assert task.answer in task.prompt


def test_training_resumes_to_the_very_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import train

    monkeypatch.setattr(train, "CONFIG", train.CONFIG.replace(
        num_hidden_layers=2, layer_types=train.CONFIG.layer_types[:2], hidden_size=64,
        intermediate_size=64))  # fmt: skip
    tokenizer = gemma_multi.load("storyteller", backend="keras").tokenizer
    ids, mask = corpus.batch(tokenizer, 0)

    def run(trainer: train.Trainer, first: int, last: int) -> list[float]:
        return [trainer.step(ids, mask, qat=step >= 3) for step in range(first, last)]

    whole = train.Trainer(steps=100, seed=0)
    losses = run(whole, 0, 5)
    assert losses[-1] < losses[0]
    first = train.Trainer(steps=100, seed=0)
    run(first, 0, 2)
    first.save(tmp_path / "state", 2)
    second = train.Trainer(steps=100, seed=0)
    assert second.resume(tmp_path / "absent") == 0
    assert second.resume(tmp_path / "state") == 2
    assert run(second, 2, 5) == losses[2:]
    for a, b in zip(whole.values, second.values, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    with pytest.raises(SystemExit, match="of a run with seed 0, this one has 1"):
        train.Trainer(steps=100, seed=1).resume(tmp_path / "state")

"""model.batch: what each row would be alone, in order, whatever runs beside it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, field_validator
from tiny import tiny_checkpoint
from training.test_adapters import random_adapter

import gemma_multi
from gemma_multi import (
    BackendError,
    BatchRow,
    ConstraintError,
    ContextError,
    Model,
    OptionError,
)
from gemma_multi.engines import Session

PROMPTS = [
    "Tell me a bedtime story.", "Hi", "Tell me a story about a brave little fox in the snow.",
    "Who are you?", "Tell me a bedtime story about a dragon, please, and let it end well.",
    "A", "Emma lives in Paris and works at Globex.",
]  # fmt: skip
FORM = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["n"]}  # fmt: skip


@pytest.fixture(scope="module", params=["mlx", "keras", "litert"])
def model(request: pytest.FixtureRequest) -> Model:
    checkpoint = tiny_checkpoint(vocab_size=4096)
    loaded = gemma_multi.load(checkpoint, backend=request.param, precision="float32")
    loaded.add_adapter("a", random_adapter(0))
    loaded.add_adapter("b", random_adapter(1))
    return loaded


def values(rows: Iterator[BatchRow]) -> list[Any]:
    found = list(rows)
    assert [row.index for row in found] == list(range(len(found)))
    assert [row.error for row in found] == [None] * len(found)
    return [row.value for row in found]


@pytest.mark.parametrize("width", [None, 3])
def test_greedy_texts_are_those_of_each_prompt_alone(model: Model, width: int | None) -> None:
    found = values(model.batch(PROMPTS, temperature=0, max_tokens=24, width=width))
    for prompt, result in zip(PROMPTS, found, strict=True):
        alone = model.generate(prompt, temperature=0, max_tokens=24)
        assert (result.tokens, result.text) == (alone.tokens, alone.text)
        assert result.finish_reason == alone.finish_reason
        assert result.prompt_tokens == alone.prompt_tokens


def test_seeds_constraints_and_options_belong_to_a_row(model: Model) -> None:
    rows: list[Any] = [
        {"prompt": "Hi", "seed": 1},
        {"prompt": "Hi", "schema": FORM},
        {"prompt": "Hi", "seed": 2, "stop": ["e"]},
        {"prompt": "Hi", "choices": ["a lot", "nothing"]},
        {"messages": [{"role": "user", "content": "Hi"}], "seed": 1},
        {"prompt": "Hi", "raw": True, "max_tokens": 3, "seed": 1},
    ]
    shared = {"max_tokens": 16, "seed": 5}
    for order in (rows, rows[::-1]):
        for row, result in zip(order, values(model.batch(order, **shared)), strict=True):
            own = dict(row)
            prompt = own.pop("prompt", None) or own.pop("messages")
            alone = model.generate(prompt, **{**shared, **own})
            assert (result.tokens, result.text, result.parsed) == (
                alone.tokens, alone.text, alone.parsed
            )  # fmt: skip


def test_an_adapter_belongs_to_a_row(model: Model) -> None:
    names = ["a", None, "b", "a", "b", None, "a"]
    rows = [{"prompt": p, "adapter": n} for p, n in zip(PROMPTS, names, strict=True)]
    found = values(model.batch(rows, temperature=0, max_tokens=8))
    assert model.active_adapter is None
    for prompt, name, result in zip(PROMPTS, names, found, strict=True):
        alone = model.switch_adapter(name).generate(prompt, temperature=0, max_tokens=8)
        assert result.tokens == alone.tokens
    model.switch_adapter("b")
    try:
        found = values(model.batch(["Hi", {"prompt": "Hi", "adapter": None}], max_tokens=8, seed=0))
        assert model.active_adapter == "b"
        assert found[0].tokens == model.generate("Hi", max_tokens=8, seed=0).tokens
    finally:
        model.switch_adapter(None)
    assert found[1].tokens == model.generate("Hi", max_tokens=8, seed=0).tokens


def test_tasks_give_what_they_give_for_one_text(model: Model) -> None:
    labels, routes = ["ok", "violation", "violation of the rules"], {"a": "the moon", "b": "a dog"}
    for row, one in zip(
        values(model.batch(PROMPTS, "classify", labels=labels, calibrate=True)),
        model.classify(PROMPTS, labels, calibrate=True), strict=True,
    ):  # fmt: skip
        assert row.label == one.label
        np.testing.assert_allclose(
            list(row.probabilities.values()), list(one.probabilities.values()), atol=1e-4
        )
    routed = values(model.batch([{"query": p} for p in PROMPTS], "route", routes=routes))
    assert [r.label for r in routed] == [model.route(p, routes).label for p in PROMPTS]
    assert values(model.batch(PROMPTS, "extract", schema=FORM, max_tokens=20)) == [
        model.extract(p, FORM, max_tokens=20) for p in PROMPTS
    ]
    for pooling in ("last", "mean"):
        np.testing.assert_allclose(
            values(model.batch([{"text": p} for p in PROMPTS], "embed", pooling=pooling)),
            [model.embed(p, pooling) for p in PROMPTS], atol=1e-4,
        )  # fmt: skip


def test_calibration_is_that_of_a_rows_adapter(model: Model) -> None:
    labels = ["ok", "violation"]
    rows = [{"text": "Hi", "adapter": name} for name in (None, "a")]
    found = values(model.batch(rows, "classify", labels=labels, calibrate=True))
    for name, result in zip((None, "a"), found, strict=True):
        alone = model.switch_adapter(name).classify("Hi", labels, calibrate=True)
        assert result.probabilities["ok"] == pytest.approx(alone.probabilities["ok"], abs=1e-4)
    model.switch_adapter(None)


def test_a_row_that_fails_is_an_error_and_the_others_go_on(model: Model) -> None:
    rows: list[Any] = [
        "Hi", "", 7, {"prompt": "Hi", "temprature": 1}, {"prompt": "Hi", "adapter": "c"},
        {"text": "Hi", "schema": FORM, "max_tokens": 2}, "word " * 500, {"nothing": 1}, "Hi",
    ]  # fmt: skip
    found = list(model.batch(rows, temperature=0, max_tokens=6))
    kinds = [type(row.error) for row in found]
    expected = [type(None), OptionError, OptionError, OptionError, OptionError, ConstraintError,
                ContextError, OptionError, type(None)]  # fmt: skip
    assert kinds == expected
    assert "temprature" in str(found[3].error)
    assert "no adapter is called 'c'; there are: 'a', 'b'" in str(found[4].error)
    assert "the row has ['nothing'], expected prompt or" in str(found[7].error)
    assert found[0].value.tokens == found[8].value.tokens


def test_a_row_with_options_that_its_task_does_not_have_is_an_error(model: Model) -> None:
    rows = ["Hi", {"text": "Hi", "lables": []}, {"text": None}, {"text": ["Hi"]}, "Hi"]
    found = list(model.batch(rows, "classify", labels=["a", "b"]))
    failed = [False, True, True, True, False]
    assert [isinstance(row.error, OptionError) for row in found] == failed
    found = list(model.batch(["Hi", {"prompt": None}, {"prompt": [1]}], max_tokens=1))
    assert [isinstance(row.error, OptionError) for row in found] == [False, True, True]


def test_a_row_cannot_end_the_others(model: Model) -> None:
    class Odd(BaseModel):
        n: int

        @field_validator("n")
        @classmethod
        def refused(cls, value: int) -> int:
            raise KeyError("no such number")

    rows: list[Any] = ["Hi", {"prompt": "Hi", "adapter": ["a"]}, {"prompt": "Hi", "schema": Odd,
                       "max_tokens": 60}, "Hi"]  # fmt: skip
    found = list(model.batch(rows, temperature=0, max_tokens=3))
    kinds = [type(row.error) for row in found]
    assert kinds == [type(None), OptionError, ConstraintError, type(None)]


def test_another_adapter_in_the_middle_is_an_error_and_no_wrong_row(model: Model) -> None:
    rows = model.batch([f"Hi {i}" for i in range(6)], max_tokens=2, width=2)
    next(rows)
    model.switch_adapter("a")
    with pytest.raises(OptionError, match="the adapter was switched to 'a' while a batch"):
        list(rows)
    assert model.active_adapter is None


def test_what_is_not_finite_is_an_error_and_no_label(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.engine.numpy
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "numpy", lambda array: whole(array) * np.float32(np.nan))
        for ask in (
            lambda: model.classify("Hi", ["a", "b"]), lambda: model.embed("Hi"),
            lambda: model.generate("Hi", max_tokens=2),
        ):  # fmt: skip
            with pytest.raises(BackendError, match="are not finite: the weights are damaged"):
                ask()
    assert len(model.prefixes) == 0
    assert model.classify("Hi", ["a", "b"]).label in ("a", "b")


def test_rows_that_failed_and_streams_that_were_left_keep_no_session(model: Model) -> None:
    def alive() -> int:
        return sum(isinstance(one, Session) for one in gc.get_objects())

    text = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    model.prefixes.clear()
    gc.collect()
    before = alive()
    gc.disable()
    try:
        found = list(model.batch(["Hi"] * 6, schema=text, max_tokens=3, width=3))
        assert all(isinstance(row.error, ConstraintError) for row in found)
        for _ in model.stream("Hi", max_tokens=9):
            break
        rows = model.batch(["Hi"] * 6, max_tokens=9, width=3)
        next(rows)
        rows.close()  # type: ignore[attr-defined]
        del rows
        assert alive() == before
    finally:
        gc.enable()


def test_it_takes_no_more_of_an_endless_source_than_it_needs(model: Model) -> None:
    taken = itertools.count()
    source = ({"prompt": f"Hi {next(taken)}", "adapter": None} for _ in itertools.repeat(0))
    rows = model.batch(source, temperature=0, max_tokens=2, width=2)
    assert [next(rows).index for _ in range(5)] == [0, 1, 2, 3, 4]
    rows.close()  # type: ignore[attr-defined]
    assert next(taken) <= 9
    assert model.active_adapter is None


def test_a_row_that_waits_for_its_adapter_does_not_wait_for_ever(model: Model) -> None:
    """Behind it come more rows than may be on their way."""
    rows = ({"prompt": "Hi", "adapter": "a" if i == 0 else None} for i in range(80))
    assert len(values(model.batch(rows, max_tokens=1, width=2))) == 80


def test_what_is_wrong_for_all_rows_is_said_at_once(model: Model) -> None:
    for given, message in (
        ({"items": ["Hi"], "task": "translate"}, "task is 'translate', expected one of generate,"),
        ({"items": "Hi"}, "items are 'Hi', expected a list or an iterator"),
        ({"items": ["Hi"], "width": 0}, "width is 0, expected a whole number 1 to 128"),
        ({"items": ["Hi"], "task": "classify", "labels": []}, "labels"),
        ({"items": ["Hi"], "temprature": 1}, "temprature"),
        ({"items": ["Hi"], "task": "classify"}, "task 'classify': missing .*'labels'"),
        ({"items": ["Hi"], "task": "embed", "pool": "last"}, "task 'embed': .*'pool'"),
    ):
        with pytest.raises(OptionError, match=message):
            model.batch(**given)  # type: ignore[arg-type]
    assert list(model.batch([])) == []


def test_progress_is_reported_for_lists_and_iterators() -> None:
    model = gemma_multi.load("storyteller", backend="litert")
    for items, total in ((["Hi", "Ho"], 2), (iter(["Hi", "Ho"]), 0)):
        seen: list[tuple[int, ...]] = []

        def note(*at: int, seen: list[tuple[int, ...]] = seen) -> None:
            seen.append(at)

        list(model.batch(items, max_tokens=1, progress=note))
        assert seen == [(1, total), (2, total)]

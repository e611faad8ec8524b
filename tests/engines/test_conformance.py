"""What every engine must do. An engine is done when it passes this."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import tiny_checkpoint

from gemma_multi.engines import create_engine
from gemma_multi.engines.base import Engine
from gemma_multi.errors import ContextError, OptionError

# Largest difference between two ways of reading the same tokens; logits are of size 5. The sums
# are the same up to their order, so the bound is the rounding of the activations.
TOLERANCE = {"float32": 3e-5, "bfloat16": 0.15, "int8": 0.15}


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 320, (batch, length))


def assert_close(engine: Engine, actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[engine.compute])


def test_prefill_equals_step_by_step_past_the_window(engine: Engine) -> None:
    ids = tokens(1, 50)  # the window is 16
    every = engine.session().score(ids)
    session = engine.session()
    assert every.shape == (1, 50, 320)
    for i in range(50):
        assert_close(engine, session.step(ids[0, i]), every[:, i])
    np.testing.assert_array_equal(session.ids, ids)


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 31, 33])
def test_prefill_in_two_parts_equals_one(engine: Engine, cut: int) -> None:
    ids = tokens(1, 40)
    session = engine.session()
    session.prefill(ids[:, :cut])
    assert_close(engine, session.prefill(ids[:, cut:]), engine.session().prefill(ids))


def test_the_window_holds_the_token_itself_and_no_more(backend: str) -> None:
    """One local layer with a window of 16: position 40 sees positions 25 to 40, and not 24."""
    engine = create_engine(tiny_checkpoint(num_hidden_layers=1), backend, "float32")
    ids = tokens(1, 41)
    expected = engine.session().prefill(ids)
    for changed, seen in ((24, False), (25, True)):
        other = ids.copy()
        other[0, changed] = (other[0, changed] + 1) % 320
        read_at_once = engine.session().prefill(other)
        session = engine.session()
        session.prefill(other[:, :30])
        for i in range(30, 41):
            stepped = session.step(other[0, i])
        for logits in (read_at_once, stepped):
            assert (np.abs(logits - expected).max() > 1e-3) == seen


@pytest.mark.parametrize("length", [0, 5, 12, 30, 44])
def test_truncate_then_read_on(engine: Engine, length: int) -> None:
    ids = tokens(1, 50)
    session = engine.session()
    session.prefill(ids[:, :30])
    for i in range(30, 45):
        session.step(ids[0, i])
    session.truncate(length)
    assert session.length == length
    assert_close(engine, session.prefill(ids[:, length:]), engine.session().prefill(ids))


@pytest.mark.parametrize("cuts", [(88, 76), (60, 30, 5), (99, 98, 70)])
def test_truncate_again_and_again(engine: Engine, cuts: tuple[int, ...]) -> None:
    """What a ring has lost it has lost, however the length changed since; forks inherit that."""
    ids = tokens(1, 120)
    session = engine.session()
    session.prefill(ids[:, :100])
    for cut in cuts:
        session.truncate(cut)
        session = session.fork()
    assert_close(engine, session.step(ids[0, cut]), engine.session().prefill(ids[:, : cut + 1]))


def test_truncate_to_more_than_was_read_is_refused(engine: Engine) -> None:
    session = engine.session()
    session.prefill([5, 6, 7])
    with pytest.raises(OptionError, match="cannot truncate 3 tokens to 4"):
        session.truncate(4)
    assert session.length == 3


@pytest.mark.parametrize("at", [6, 24])
def test_fork_leaves_the_original_alone(engine: Engine, at: int) -> None:
    ids, other = tokens(1, 40), tokens(1, 40, seed=1)
    session = engine.session()
    session.prefill(ids[:, :at])
    fork = session.fork()
    for i in range(at, 40):  # in turn, so that a shared cache would show
        fork.step(other[0, i])
        logits = session.step(ids[0, i])
    assert_close(engine, logits, engine.session().prefill(ids))
    joined = np.concatenate([ids[:, :at], other[:, at:]], axis=1)
    last = fork.fork()
    last.truncate(39)
    assert_close(engine, last.step(other[0, 39]), engine.session().prefill(joined))
    np.testing.assert_array_equal(fork.ids, joined)


def test_a_batch_equals_its_rows(engine: Engine) -> None:
    ids = tokens(3, 33)
    session = engine.session(batch=3)
    first = session.prefill(ids[:, :32])
    second = session.step(ids[:, 32])
    assert first.shape == second.shape == (3, 320)
    for row in range(3):
        assert_close(engine, second[row : row + 1], engine.session().prefill(ids[row]))


def test_a_context_that_is_full_refuses_and_stays_usable(engine: Engine) -> None:
    ids = tokens(1, 40)
    session = engine.session(context_length=20)
    session.prefill(ids[:, :18])
    with pytest.raises(ContextError, match="18 tokens read and 3 more do not fit a context of 20"):
        session.prefill(ids[:, 18:21])
    assert session.length == 18
    assert_close(engine, session.prefill(ids[:, 18:20]), engine.session().prefill(ids[:, :20]))
    with pytest.raises(ContextError):
        session.step(5)


def test_the_whole_context_can_be_used(engine: Engine) -> None:
    """256 positions, in chunks that do not divide them, and the last one by a step."""
    ids = tokens(1, 256)
    session = engine.session()
    session.prefill(ids[:, :139])
    session.prefill(ids[:, 139:255])
    assert_close(engine, session.step(ids[0, 255]), engine.session().score(ids)[:, -1])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "expected"),
        ([[1, 2], [3, 4]], "expected"),
        ([1, 320], "vocabulary has 320"),
        ([-1], "vocabulary has 320"),
        ([1.5], "whole numbers"),
    ],
)
def test_bad_ids_are_refused(engine: Engine, ids: list, message: str) -> None:
    session = engine.session()
    with pytest.raises(OptionError, match=message):
        session.prefill(ids)
    assert session.length == 0


@pytest.mark.parametrize("length", [0, -1, 257])
def test_a_context_outside_the_model_is_refused(engine: Engine, length: int) -> None:
    with pytest.raises(OptionError, match="expected 1 to 256"):
        engine.session(context_length=length)

"""What every engine must do, one conversation at a time; of many see
`test_conformance_of_many.py`. An engine is done when it passes both.

What depends on arithmetic is asked of `engine`, every backend at every precision; what a session
keeps count of, of `exact_engine`, each backend in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reading import ROWS_TOLERANCE, assert_close, tokens
from tiny import tiny_checkpoint

from gemma_multi.engines import (
    ALL,
    HIDDEN,
    LAST,
    NOTHING,
    Engine,
    Rows,
    backends,
    create_engine,
)
from gemma_multi.engines.caches import SPARE
from gemma_multi.errors import BackendError, ContextError, OptionError

# reading


def test_prefill_equals_step_by_step_past_the_window(engine: Engine) -> None:
    ids = tokens(50)  # the window is 16
    every = engine.session().read(ids, ALL)
    session = engine.session()
    assert every.shape == (50, 320)
    for i in range(50):
        assert_close(engine, session.read(ids[i : i + 1]), every[i])
    np.testing.assert_array_equal(session.ids, ids)


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 31, 33])
def test_prefill_in_two_parts_equals_one(engine: Engine, cut: int) -> None:
    ids = tokens(40)
    session = engine.session()
    assert session.read(ids[:cut], NOTHING) is None
    assert_close(engine, session.read(ids[cut:]), engine.session().read(ids))


@pytest.mark.parametrize("length", [1, 2, 50])
def test_each_want_is_a_part_of_all_logits(engine: Engine, length: int) -> None:
    """After a prompt past the window: the last row, some columns of it, and the state before."""
    before, ids = tokens(40), tokens(length, seed=1)

    def read(want: object) -> np.ndarray:
        session = engine.session()
        session.read(before, NOTHING)
        found = session.read(ids, want)
        assert session.length == 40 + length
        # what was read is the same whatever it was read for
        assert_close(engine, session.read([7]), after)
        return found

    whole = engine.session()
    whole.read(before, NOTHING)
    expected = whole.read(ids, ALL)
    after = whole.read([7])
    assert_close(engine, read(LAST), expected[-1])
    assert_close(engine, read(ALL), expected)
    assert read(NOTHING) is None
    words = np.array([319, 4, 4, 77])
    some = read(Rows(words))
    assert some.dtype == np.float32
    tolerance = ROWS_TOLERANCE[engine.compute]
    np.testing.assert_allclose(some, expected[-1][words], rtol=0, atol=tolerance)
    hidden = read(HIDDEN)
    assert (hidden.shape, hidden.dtype) == ((96,), np.float32)
    head = engine.weight("model.embed_tokens.weight")
    np.testing.assert_allclose(head @ hidden, expected[-1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("count", [1, 20, 320])
def test_any_number_of_rows(engine: Engine, count: int) -> None:
    words = np.random.default_rng(count).permutation(320)[:count]
    expected = engine.session().read([5, 6, 7])[words]
    actual = engine.session().read([5, 6, 7], Rows(words))
    tolerance = ROWS_TOLERANCE[engine.compute]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_the_window_holds_the_token_itself_and_no_more(backend: str) -> None:
    """One local layer with a window of 16: position 40 sees positions 25 to 40, and not 24."""
    engine = create_engine(tiny_checkpoint(num_hidden_layers=1), backend, "float32")
    ids = tokens(41)
    expected = engine.session().read(ids)
    for changed, seen in ((24, False), (25, True)):
        other = ids.copy()
        other[changed] = (other[changed] + 1) % 320
        read_at_once = engine.session().read(other)
        session = engine.session()
        session.read(other[:30])
        for i in range(30, 41):
            stepped = session.read(other[i : i + 1])
        for logits in (read_at_once, stepped):
            assert (np.abs(logits - expected).max() > 1e-3) == seen


# going back, and apart


@pytest.mark.parametrize("length", [0, 5, 12, 30, 44])
def test_truncate_then_read_on(engine: Engine, length: int) -> None:
    ids = tokens(50)
    session = engine.session()
    session.read(ids[:30])
    for i in range(30, 45):
        session.read(ids[i : i + 1])
    session.truncate(length)
    assert session.length == length
    assert_close(engine, session.read(ids[length:]), engine.session().read(ids))


@pytest.mark.parametrize("back", [1, SPARE - 1, SPARE])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_few_positions_are_taken_back_without_reading_again(
    exact_engine: Engine, back: int, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far past the window, and whether rings were filled by a chunk or step by step."""
    ids, other = tokens(120), tokens(120, seed=1)
    session = exact_engine.session()
    for part in np.split(ids[:100], 100) if one_by_one else [ids[:100]]:
        session.read(part)
    reread = []
    monkeypatch.setattr(type(session), "_reading", lambda self, ids, want: reread.append(len(ids)))
    session.truncate(100 - back)
    monkeypatch.undo()
    assert not reread
    assert session.length == 100 - back
    # and on from there, with other tokens, to where the rings have turned again
    joined = np.concatenate([ids[: 100 - back], other[:30]])
    for i in range(30):
        logits = session.read(other[i : i + 1])
    assert_close(exact_engine, logits, exact_engine.session().read(joined))


@pytest.mark.parametrize("cuts", [(88, 76), (60, 30, 5), (99, 98, 70), (90, 84)])
def test_truncate_again_and_again(exact_engine: Engine, cuts: tuple[int, ...]) -> None:
    """What a ring has lost it has lost, however the length changed since; forks inherit that."""
    ids = tokens(120)
    session = exact_engine.session()
    session.read(ids[:100])
    for cut in cuts:
        session.truncate(cut)
        session = session.fork()
    expected = exact_engine.session().read(ids[: cut + 1])
    assert_close(exact_engine, session.read(ids[cut : cut + 1]), expected)


def test_truncate_to_more_than_was_read_is_refused(exact_engine: Engine) -> None:
    session = exact_engine.session()
    session.read([5, 6, 7])
    with pytest.raises(OptionError, match="cannot truncate 3 tokens to 4"):
        session.truncate(4)
    assert session.length == 3


@pytest.mark.parametrize("at", [0, 6, 24, 100])
def test_fork_leaves_the_original_alone(engine: Engine, at: int) -> None:
    ids, other = tokens(at + 16), tokens(at + 16, seed=1)
    session = engine.session()
    if at:
        session.read(ids[:at])
    fork = session.fork()
    for i in range(at, at + 16):  # in turn, so that a shared cache would show
        fork.read(other[i : i + 1])
        logits = session.read(ids[i : i + 1])
    assert_close(engine, logits, engine.session().read(ids))
    joined = np.concatenate([ids[:at], other[at:]])
    last = fork.fork()
    last.truncate(at + 15)
    assert_close(engine, last.read(other[-1:]), engine.session().read(joined))
    np.testing.assert_array_equal(fork.ids, joined)


@pytest.mark.parametrize(("read", "kept"), [(1, 1), (9, 9), (40, 40), (60, 52)])
def test_what_a_session_held_goes_on_in_another(engine: Engine, read: int, kept: int) -> None:
    ids = tokens(70)
    session = engine.session()
    session.read(ids[:read], NOTHING)
    session.truncate(kept)
    held = {name: array.copy() for name, array in session.held().items()}
    expected = [session.read(ids[kept : kept + 1]), session.read(ids[kept + 1 : kept + 5])]
    other = engine.session()
    other.restore(ids[:kept], held)
    np.testing.assert_array_equal(other.ids, ids[:kept])
    assert_close(engine, other.read(ids[kept : kept + 1]), expected[0])
    assert_close(engine, other.read(ids[kept + 1 : kept + 5]), expected[1])


def test_what_does_not_fit_is_not_restored(exact_engine: Engine) -> None:
    session = exact_engine.session()
    session.read(tokens(9), NOTHING)
    held = session.held()
    for name in held:
        for wrong in (held[name][:-1], np.full_like(held[name], -1 if name == "written" else
                      np.nan), None):  # fmt: skip
            bad = {n: a for n, a in held.items() if n != name}
            if wrong is not None:
                bad[name] = wrong
            other = exact_engine.session()
            with pytest.raises(OptionError, match="does not fit this engine"):
                other.restore(tokens(9), bad)
            assert other.length == 0
            assert_close(exact_engine, other.read([5]), exact_engine.session().read([5]))


def test_a_session_is_new_whatever_the_one_before_it_read(engine: Engine) -> None:
    """Engines may use the memory of conversations that have ended."""
    expected = engine.session().read(tokens(7))
    for seed in range(3):
        session = engine.session()
        session.read(tokens(200, seed=seed))
        del session
        assert_close(engine, engine.session().read(tokens(7)), expected)


# limits and bad input


def test_a_context_that_is_full_refuses_and_stays_usable(exact_engine: Engine) -> None:
    ids = tokens(40)
    session = exact_engine.session(context_length=20)
    session.read(ids[:18])
    with pytest.raises(ContextError, match="18 tokens read and 3 more do not fit a context of 20"):
        session.read(ids[18:21])
    assert session.length == 18
    assert_close(exact_engine, session.read(ids[18:20]), exact_engine.session().read(ids[:20]))
    with pytest.raises(ContextError):
        session.read([5])


def test_the_whole_context_can_be_used(engine: Engine) -> None:
    """256 positions, in chunks that do not divide them, and the last one by a step."""
    ids = tokens(256)
    session = engine.session()
    session.read(ids[:139])
    session.read(ids[139:255])
    assert_close(engine, session.read(ids[255:]), engine.session().read(ids, ALL)[-1])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "expected"),
        (5, "expected"),
        ([[1, 2], [3, 4]], "expected"),
        ([[1, 2], [3]], "rows of different lengths"),
        ([1, 320], "vocabulary has 320"),
        ([-1], "vocabulary has 320"),
        ([1.5], "whole numbers"),
    ],
)
def test_bad_ids_are_refused(exact_engine: Engine, ids: list, message: str) -> None:
    session = exact_engine.session()
    with pytest.raises(OptionError, match=message):
        session.read(ids)
    assert session.length == 0


def test_what_is_no_want_and_whose_session_it_is_not(exact_engine: Engine) -> None:
    session = exact_engine.session()
    session.read([5, 6])
    for want in (None, "last", 3):
        with pytest.raises(OptionError, match="expected a Want, Rows or Chosen"):
            session.read([7], want)
    other = create_engine(tiny_checkpoint(), exact_engine.name, "float32")
    with pytest.raises(OptionError, match="session of another engine"):
        other.read([session], [[7]])
    with pytest.raises(OptionError, match=r"cannot truncate 2 tokens to 1\.0"):
        session.truncate(1.0)  # type: ignore[arg-type]
    assert session.length == 2
    assert_close(exact_engine, session.read([7]), exact_engine.session().read([5, 6, 7]))


@pytest.mark.parametrize("at", ["_forward", "_append", "numpy"])
def test_an_interrupted_read_leaves_an_empty_session(
    exact_engine: Engine, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = exact_engine.session()
    session.read(tokens(40))
    owner = exact_engine if at == "numpy" else session
    original = getattr(owner, at)

    def interrupted(*given: Any) -> None:
        original(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.read([7, 8])
    monkeypatch.undo()
    assert session.length == 0
    assert_close(exact_engine, session.read([5, 6]), exact_engine.session().read([5, 6]))


def test_single_tensors_can_be_replaced(backend: str) -> None:
    """Matrices and norms, dense ones too where the engine holds packed weights."""
    checkpoint = tiny_checkpoint()
    names = ["model.norm.weight", "model.layers.3.mlp.down_proj.weight"]
    others = {name: tiny_checkpoint(seed=1).weight(name) for name in names}
    known = backends()[backend].precisions
    for precision in (one for one in ("float32", "int4") if one in known):
        engine = create_engine(checkpoint, backend, precision)
        if engine.fixed_weights:
            with pytest.raises(BackendError, match="cannot change the weights"):
                engine.assign(others)
            continue
        engine.assign(others)
        expected = create_engine(checkpoint.with_tensors(others), backend, precision)
        assert_close(engine, engine.session().read([5, 6]), expected.session().read([5, 6]))


@pytest.mark.parametrize("length", [0, -1, 257])
def test_a_context_outside_the_model_is_refused(exact_engine: Engine, length: int) -> None:
    with pytest.raises(OptionError, match="expected 1 to 256"):
        exact_engine.session(context_length=length)


@pytest.mark.parametrize("rows", [[], [[1]], [1.5], "ab"])
def test_rows_that_are_no_ids_are_refused(rows: object) -> None:
    with pytest.raises(OptionError, match="expected token ids in one row"):
        Rows(np.asarray(rows))

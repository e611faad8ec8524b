"""What every engine must do with many conversations at once, and with tokens that it chooses.

An engine reads them in a batch, or one after the other: each is as if it were alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from reading import assert_close, tokens
from tiny import tiny_checkpoint

from gemma_multi.config import EMBEDDING, FULL
from gemma_multi.engines import (
    ALL,
    HIDDEN,
    LAST,
    NOTHING,
    Chosen,
    Engine,
    Rows,
    create_engine,
)
from gemma_multi.engines.caches import MOST_TOGETHER
from gemma_multi.errors import ContextError, OptionError
from gemma_multi.sampling import GenerationOptions, choose

# several sessions


def test_sessions_of_unequal_lengths_read_together(engine: Engine) -> None:
    """Each is as if it were alone: what it reads, what it wants, how much it has read before."""
    rows = [tokens(length, seed=length) for length in (3, 50, 1, 20)]
    more = [tokens(length, seed=100 + length) for length in (1, 2, 40, 1)]
    wants = [LAST, ALL, NOTHING, Rows(np.array([9, 8]))]
    sessions = [engine.session() for _ in rows]
    engine.read(sessions, rows, NOTHING)
    together = engine.read(sessions, more, wants)
    for session, row, extra, want, found in zip(sessions, rows, more, wants, together, strict=True):
        alone = engine.session()
        alone.read(row, NOTHING)
        expected = alone.read(extra, want)
        assert session.length == len(row) + len(extra)
        if expected is None:
            assert found is None
        else:
            assert_close(engine, engine.numpy(found), expected)
        assert_close(engine, session.read([11]), alone.read([11]))


def test_more_sessions_than_a_batch_holds_are_several(exact_engine: Engine) -> None:
    sessions = [exact_engine.session() for _ in range(MOST_TOGETHER + 2)]
    rows = [[5 + i] for i in range(len(sessions))]
    found = exact_engine.read(sessions, rows, HIDDEN)
    for i in (0, MOST_TOGETHER - 1, MOST_TOGETHER, MOST_TOGETHER + 1):
        expected = exact_engine.session().read(rows[i], HIDDEN)
        assert_close(exact_engine, exact_engine.numpy(found[i]), expected)
    assert [session.ids.tolist() for session in sessions] == rows


def test_sessions_come_and_go_between_reads_together(exact_engine: Engine, seed: int) -> None:
    """Any of them, in any order, by any number of tokens; some fork, go back, end, or read alone
    in between. Each knows its own tokens and no others."""
    rng = np.random.default_rng(seed)
    sessions: list[Any] = []
    for _ in range(25):
        sessions += [exact_engine.session() for _ in range(rng.integers(0, 4))]
        together = [s for s in sessions if rng.random() < 0.8]
        rng.shuffle(together)
        several = rng.random() < 0.4
        ids = [tokens(int(rng.integers(1, 12)) if several and rng.random() < 0.5 else 1,
                      int(rng.integers(1 << 30))) for _ in together]  # fmt: skip
        before = [s.ids.tolist() for s in together]
        chosen = Chosen(GenerationOptions(top_k=9, seed=seed), int(rng.integers(1, 6)))
        kinds = [LAST, HIDDEN, NOTHING, Rows(np.array([3, 300, 7])), chosen]
        wants = [kinds[rng.integers(5)] for _ in ids]
        if together:
            found = exact_engine.read(together, ids, wants)
            for i in rng.choice(len(together), min(2, len(together)), replace=False):
                whole = [*before[i], *ids[i].tolist()]
                expected = exact_engine.session().read(whole, wants[i])
                after = expected[:-1].tolist() if isinstance(wants[i], Chosen) else []
                assert together[i].ids.tolist() == [*whole, *after]
                if isinstance(wants[i], Chosen):
                    np.testing.assert_array_equal(exact_engine.numpy(found[i]), expected)
                elif expected is None:
                    assert found[i] is None
                else:
                    assert_close(exact_engine, exact_engine.numpy(found[i]), expected)
        for session in list(sessions):
            change = rng.random()
            if change < 0.1:
                sessions.append(session.fork())
            elif change < 0.2:
                session.truncate(int(session.length * rng.random()))
            elif change < 0.3 or session.length > 200:
                sessions.remove(session)
            elif change < 0.35:
                session.read(tokens(3), NOTHING)
        del together
    for session in sessions:
        expected = exact_engine.session().read([*session.ids.tolist(), 11])
        assert_close(exact_engine, session.read([11]), expected)


def test_an_interrupted_read_of_many_leaves_no_half_read_session(
    exact_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [exact_engine.session() for _ in range(3)]
    exact_engine.read(sessions, [tokens(5)] * 3, NOTHING)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sessions[1], "_append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            exact_engine.read(sessions, [tokens(1)] * 3)
    assert sessions[1].length == 0
    for session in sessions:
        expected = exact_engine.session().read([*session.ids.tolist(), 11])
        assert_close(exact_engine, session.read([11]), expected)


def test_what_is_not_finite_stays_in_its_own_row(backend: str) -> None:
    """Though its place is another's later."""
    checkpoint = tiny_checkpoint()
    engine = create_engine(checkpoint, backend, "float32")
    if engine.fixed_weights:
        pytest.skip("holds its weights as they came")
    embedding = checkpoint.weight(EMBEDDING).astype(np.float32)
    embedding[300] = np.nan
    engine.assign({EMBEDDING: embedding})
    sessions = [engine.session() for _ in range(3)]
    engine.read(sessions, [[300], [5], [6]], NOTHING)
    del sessions[0]
    sessions.append(engine.session())
    found = engine.read(sessions, [[7], [8], [9]], HIDDEN)
    alone = engine.session().read([9], HIDDEN)
    assert_close(engine, engine.numpy(found[2]), alone)


def test_an_interrupted_read_of_many_spares_or_empties_those_beside_them(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = create_engine(tiny_checkpoint(), backend, "float32")
    sessions = [engine.session() for _ in range(4)]
    engine.read(sessions, [[5], [6], [7], [8]], NOTHING)

    class Interrupting:
        def __call__(self, *given: Any, **named: Any) -> Any:
            program(*given, **named)
            raise KeyboardInterrupt

    if hasattr(engine, "forward"):  # whose arrays are given away
        program = engine.forward
        with monkeypatch.context() as patch:
            patch.setattr(engine, "forward", Interrupting())
            with pytest.raises(KeyboardInterrupt):
                engine.read(sessions[:3], [[5]] * 3)
    for session in sessions:
        expected = engine.session().read([*session.ids.tolist(), 11])
        assert_close(engine, session.read([11]), expected)


def test_what_was_taken_back_before_it_was_read_with_others_is_held(backend: str) -> None:
    whole = tiny_checkpoint(layer_types=(FULL,) * 8)
    engine = create_engine(whole, backend, "float32")
    ids, sessions = tokens(200), [engine.session() for _ in range(2)]
    sessions[0].read(ids, NOTHING)
    sessions[0].truncate(20)
    engine.read(sessions, [[5], [6]], NOTHING)
    other = engine.session()
    other.restore(sessions[0].ids, sessions[0].held())
    assert_close(engine, other.read([9]), engine.session().read([*ids[:20], 5, 9]))


def test_a_refused_row_leaves_all_sessions_as_they_were(exact_engine: Engine) -> None:
    one, other = exact_engine.session(), exact_engine.session(context_length=4)
    exact_engine.read([one, other], [[5, 6], [7]], NOTHING)
    for rows, message in (
        ([[5], [1, 2, 3, 4]], "do not fit a context of 4"),
        ([[5], [320]], "vocabulary has 320"),
        ([[5], []], "T at least 1"),
        ([[5]], "expected as many of each"),
    ):
        with pytest.raises(OptionError, match=message):
            exact_engine.read([one, other], rows)
    with pytest.raises(OptionError, match="there twice"):
        exact_engine.read([one, one], [[5], [6]])
    with pytest.raises(OptionError, match="rows run from 2 to 320"):
        one.read([5], Rows(np.array([2, 320])))
    assert (one.length, other.length) == (2, 1)
    alone = exact_engine.session()
    assert_close(exact_engine, one.read([9]), alone.read([5, 6, 9]))


def test_sessions_in_threads_do_not_disturb_each_other(exact_engine: Engine) -> None:
    rows = [tokens(60, seed=i) for i in range(4)]
    expected = [exact_engine.session().read(row) for row in rows]
    found: list[np.ndarray | None] = [None] * len(rows)
    lock = threading.Lock()  # engines may count on one call at a time; sessions need not

    def run(i: int) -> None:
        session = exact_engine.session()
        for start in range(0, 60, 7):
            with lock:
                found[i] = session.read(rows[i][start : start + 7])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(found, expected, strict=True):
        assert mine is not None
        assert_close(exact_engine, mine, theirs)


def test_a_conversation_may_go_on_in_another_thread(exact_engine: Engine) -> None:
    """Whatever was wanted of what was read before, and forks too."""
    ids = tokens(60)
    expected = exact_engine.session().read(ids)

    def elsewhere(work: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    for want in (LAST, ALL, NOTHING, HIDDEN, Rows(np.array([5, 6]))):
        session = exact_engine.session()
        elsewhere(lambda s=session, w=want: s.read(ids[:40], w))
        fork = session.fork()
        assert_close(exact_engine, session.read(ids[40:]), expected)
        assert_close(exact_engine, elsewhere(lambda s=fork: s.read(ids[40:])), expected)


# tokens chosen while they are read

WAYS = [
    {"temperature": 0.0}, {"top_k": 0, "top_p": 1.0}, {"top_k": 20, "top_p": 0.8},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.1}, {"top_k": 8, "top_p": 1.0, "min_p": 0.05},
    {"top_k": 0, "top_p": 0.7},
]  # fmt: skip


def one_by_one(session: Any, ids: Any, want: Chosen) -> list[int]:
    """What `want` asks for, from logits that come to the host."""
    chosen: list[int] = []
    while len(chosen) < want.count:
        logits = session.read(ids)[: want.vocabulary]
        chosen.append(choose(logits, np.zeros(0, np.int64), want.options, session.length))
        ids = chosen[-1:]
    return chosen


@pytest.mark.parametrize("given", WAYS, ids=lambda given: "-".join(map(str, given.values())))
def test_tokens_are_chosen_as_one_by_one(exact_engine: Engine, given: dict) -> None:
    """Up to the window, across it and beyond, any number of them, with what is to be read before;
    and some of them are taken back."""
    engine = exact_engine
    session, plain = engine.session(), engine.session()
    for step, count in enumerate((3, 16, 1, 9, 16)):
        options = GenerationOptions(seed=step << 33 | 5, **given)
        want = Chosen(options, count, 300)
        ids = tokens(1 if step % 2 else 7, seed=step)
        found = session.read(ids, want)
        assert (found.dtype, found.max() < 300) == (np.int32, True)
        assert found.tolist() == one_by_one(plain, ids, want)
        np.testing.assert_array_equal(session.ids, plain.ids)
        back = min(step, count - 1)
        for one in (session, plain):
            one.truncate(one.length - back)
        assert_close(engine, session.read([7]), plain.read([7]))
    fork = session.fork()
    want = Chosen(GenerationOptions(seed=1, **given), 5)
    assert session.read([9], want).tolist() == fork.read([9], want).tolist()
    assert_close(engine, session.read([7]), fork.read([7]))


def test_rows_choose_together_as_each_would_alone(exact_engine: Engine) -> None:
    """Of all lengths and counts, each by its own options, beside others that want none chosen."""
    engine = exact_engine
    sessions = [engine.session() for _ in range(len(WAYS) + 2)]
    plain = [engine.session() for _ in sessions]
    before = [tokens(3 + 5 * i, seed=i) for i in range(len(sessions))]
    for rows in (sessions, plain):
        engine.read(rows, before, NOTHING)
    for step in range(3):
        wants: list[Any] = [
            Chosen(GenerationOptions(seed=i + 99 * step, **given), 1 + (5 * i + 3 * step) % 16)
            for i, given in enumerate(WAYS)
        ]
        wants += [LAST, NOTHING]
        ids = [tokens(4 if (i + step) % 3 == 0 else 1, seed=step) for i in range(len(sessions))]
        found = engine.read(sessions, ids, wants)
        for session, other, row, want, result in zip(
            sessions, plain, ids, wants, found, strict=True
        ):
            if isinstance(want, Chosen):
                assert engine.numpy(result).tolist() == one_by_one(other, row, want)
            elif want is LAST:
                assert_close(engine, engine.numpy(result), other.read(row))
            else:
                other.read(row, NOTHING)
            np.testing.assert_array_equal(session.ids, other.ids)
    for session, other in zip(sessions, plain, strict=True):
        assert_close(engine, session.read([11]), other.read([11]))


def test_chosen_tokens_must_fit_and_fill_the_context(exact_engine: Engine) -> None:
    session, plain = (exact_engine.session(context_length=40) for _ in range(2))
    session.read(tokens(28), NOTHING)
    greedy = GenerationOptions(temperature=0.0)
    with pytest.raises(ContextError, match="28 tokens read and 13 more do not fit a context of 40"):
        session.read([5], Chosen(greedy, 13))
    assert session.length == 28
    plain.read(tokens(28), NOTHING)
    want = Chosen(greedy, 12)
    assert session.read([5], want).tolist() == one_by_one(plain, [5], want)
    assert session.length == 40
    for count, message in ((0, "count is 0, expected a whole number 1 to 16"), (17, "count is 17")):
        with pytest.raises(OptionError, match=message):
            Chosen(greedy, count)
    with pytest.raises(OptionError, match="repetition penalty"):
        Chosen(GenerationOptions(repetition_penalty=1.1), 2)


@pytest.mark.parametrize("together", [False, True])
def test_no_token_is_chosen_where_logits_are_not_finite(backend: str, together: bool) -> None:
    """The last that was to be read is then unread, and what was read before serves others."""
    checkpoint = tiny_checkpoint()
    embedding = checkpoint.weight("model.embed_tokens.weight").copy()
    embedding[319] = np.nan  # after it, no logit is finite
    engine = create_engine(
        checkpoint.with_tensors({"model.embed_tokens.weight": embedding}), backend, "float32"
    )
    want = Chosen(GenerationOptions(temperature=0.0), 6, 300)
    sessions = [engine.session() for _ in range(2 if together else 1)]
    for session in sessions:
        session.read([5, 6, 7], NOTHING)
    for result in engine.read(sessions, [[8, 319]] * len(sessions), want):
        assert engine.numpy(result).tolist() == []
    expected = create_engine(checkpoint, backend, "float32").session().read([5, 6, 7, 8, 9])
    for session in sessions:
        assert session.ids.tolist() == [5, 6, 7, 8]
        assert_close(engine, session.read([9])[:300], expected[:300])


@pytest.mark.parametrize("together", [False, True])
def test_more_equals_than_a_device_looks_at_are_left_to_the_host(
    backend: str, together: bool
) -> None:
    """Of 300 tokens with one embedding all survive a top-k, or none."""
    checkpoint = tiny_checkpoint()
    embedding = checkpoint.weight("model.embed_tokens.weight").copy()
    embedding[10:310] = embedding[10]
    engine = create_engine(
        checkpoint.with_tensors({"model.embed_tokens.weight": embedding}), backend, "float32"
    )
    options = GenerationOptions(top_k=9, top_p=1.0, seed=3)
    sessions = [engine.session() for _ in range(3 if together else 1)]
    plain, expected = engine.session(), [5]
    for _ in range(4):
        expected += one_by_one(plain, expected[-1:], Chosen(options, 16))
    texts = [[5] for _ in sessions]
    while any(short := [len(text) < 50 for text in texts]):
        going = [i for i, more in enumerate(short) if more]
        found = engine.read([sessions[i] for i in going], [texts[i][-1:] for i in going],
                            Chosen(options, 7))  # fmt: skip
        for i, result in zip(going, found, strict=True):
            chosen = engine.numpy(result).tolist()
            texts[i] += chosen or one_by_one(sessions[i], texts[i][-1:], Chosen(options, 1))
    for session, text in zip(sessions, texts, strict=True):
        assert text == expected[: len(text)]
        assert session.ids.tolist() == text[:-1]

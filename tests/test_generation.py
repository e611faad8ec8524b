"""The sampler and the loop, against transformers' filters and known distributions."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from typing import Any

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from goldens.make import FILTERS, FILTERS_FILE, filter_input
from tiny import tiny_checkpoint

from gemma_multi.constraints import Constraint
from gemma_multi.engines import ALL, Engine, Session, create_engine
from gemma_multi.errors import BackendError, ContextError, OptionError
from gemma_multi.generation import Decoding, PromptLookup, generate_tokens
from gemma_multi.sampling import GenerationOptions
from gemma_multi.sampling.noise import gumbel
from gemma_multi.sampling.sampler import candidates, choose

NOTHING = np.zeros(0, np.int32)


def options(**given: Any) -> GenerationOptions:
    plain = {"top_k": 0, "top_p": 1.0, "seed": 0}
    return GenerationOptions(**{**plain, **given})


def draws(logits: np.ndarray, count: int, **given: Any) -> Counter[int]:
    chosen = options(**given)
    return Counter(choose(logits, NOTHING, chosen, position) for position in range(count))


class TestSampler:
    def test_noise_is_the_same_everywhere(self) -> None:
        ids = np.arange(5000)
        ours = gumbel(np, 123456789012, 77, ids)
        for xp in (mx, jnp):
            np.testing.assert_allclose(
                np.array(gumbel(xp, 123456789012, 77, xp.array(ids))), ours, rtol=0, atol=2e-6
            )

    def test_noise_depends_on_seed_position_and_token_and_on_nothing_else(self) -> None:
        base = gumbel(np, 1, 2, np.arange(100))
        np.testing.assert_array_equal(gumbel(np, 1, 2, np.array([7, 3])), base[[7, 3]])
        for seed, position in ((2, 2), (1, 3), (2, 1), (1 << 32 | 1, 2)):
            assert np.abs(gumbel(np, seed, position, np.arange(100)) - base).min() > 0

    def test_noise_is_gumbel(self) -> None:
        sample = np.concatenate([gumbel(np, 5, p, np.arange(2000)) for p in range(100)])
        assert np.isfinite(sample).all()
        assert sample.mean() == pytest.approx(np.euler_gamma, abs=0.01)
        assert sample.std() == pytest.approx(math.pi / 6**0.5, abs=0.01)
        # neighbours in token id and in position are independent
        rows = sample.reshape(100, 2000)
        assert abs(np.corrcoef(rows[:, :-1].ravel(), rows[:, 1:].ravel())[0, 1]) < 0.01
        assert abs(np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]) < 0.01

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_tokens_come_with_their_probability(self, temperature: float) -> None:
        logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32)
        expected = np.exp(logits / temperature)
        expected /= expected.sum()
        counts = draws(logits, 20_000, temperature=temperature)
        found = np.array([counts[i] for i in range(5)]) / 20_000
        np.testing.assert_allclose(found, expected, atol=0.012)

    def test_greedy_takes_the_best_and_of_equals_the_first(self) -> None:
        logits = np.array([1.0, 3.0, 3.0, 2.0], np.float32)
        for temperature in (0.0, 1e-300, 1e-6):
            assert choose(logits, NOTHING, options(temperature=temperature), 0) == 1

    @pytest.mark.parametrize("case", FILTERS)
    def test_the_filters_are_those_of_transformers(self, case: str) -> None:
        """The same tokens survive, with the same probabilities (`goldens/make.py`)."""
        logits, seen = filter_input()
        expected = np.load(FILTERS_FILE)[case]
        chosen = options(**FILTERS[case])
        ids, found = candidates(logits, seen, chosen)
        assert set(ids) == set(np.flatnonzero(np.isfinite(expected)))
        np.testing.assert_allclose(found, expected[ids], atol=1e-5)
        drawn = Counter(choose(logits, seen, chosen, position) for position in range(4000))
        assert set(drawn) <= set(ids)
        np.testing.assert_allclose([drawn[i] / 4000 for i in ids], np.exp(expected[ids]), atol=0.03)

    @pytest.mark.parametrize("k", [1, 40, 64, 900, 5000])
    def test_the_short_cut_to_the_best_finds_them_all(self, k: int) -> None:
        logits = np.random.default_rng(k).standard_normal(100_003).astype(np.float32)
        logits[:3000] = logits[5]  # many ties, all in a few blocks
        ids, _ = candidates(logits, NOTHING, options(top_k=k))
        threshold = np.sort(logits)[-k]
        np.testing.assert_array_equal(np.sort(ids), np.flatnonzero(logits >= threshold))

    @pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0])
    def test_noise_for_tokens_that_can_win_is_noise_for_all(self, spread: float) -> None:
        """Flat or peaked, over a large vocabulary: the same token as adding noise to every one."""
        rng = np.random.default_rng(0)
        for position in range(40):
            logits = (rng.standard_normal(262_144) * spread).astype(np.float32)
            everywhere = logits + gumbel(np, 7, position, np.arange(len(logits)))
            assert choose(logits, NOTHING, options(seed=7), position) == everywhere.argmax()

    def test_the_best_token_survives_any_filter(self) -> None:
        logits = np.array([0.0, 1.0, 3.0], np.float32)
        assert set(draws(logits, 50, top_p=1e-50)) == {2}
        assert set(draws(logits, 50, min_p=1.0)) == {2}

    def test_equal_candidates_at_the_edge_of_top_k_all_stay(self) -> None:
        logits = np.array([1.0, 0.0, 0.0, -9.0], np.float32)
        assert set(draws(logits, 500, top_k=2)) == {0, 1, 2}


class TestOptions:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"max_tokens": 0}, "max_tokens is 0, expected a whole number of at least 1"),
            ({"max_tokens": -5}, "max_tokens is -5"),
            ({"max_tokens": 2.5}, "max_tokens is 2.5"),
            ({"max_tokens": True}, "max_tokens is True"),
            ({"temperature": float("nan")}, "temperature is nan, expected a number at least 0"),
            ({"temperature": -0.1}, "temperature is -0.1"),
            ({"temperature": float("inf")}, "temperature is inf"),
            ({"temperature": "hot"}, "temperature is 'hot'"),
            ({"top_k": -1}, "top_k is -1"),
            ({"top_p": 0}, "top_p is 0, expected a number above 0 and at most 1"),
            ({"top_p": 1.1}, "top_p is 1.1"),
            ({"min_p": 2}, "min_p is 2"),
            ({"repetition_penalty": 0}, "repetition_penalty is 0"),
            ({"repetition_penalty": 1e-50}, "repetition_penalty is 1e-50"),
            ({"seed": -1}, "seed is -1"),
            ({"seed": 1 << 64}, "seed is 18446744073709551616"),
            ({"stop": [""]}, "stop is"),
            ({"stop": [3]}, "stop is"),
            ({"maxtokens": 3}, "unknown option 'maxtokens', expected one of logprobs, max_tokens"),
        ],
    )
    def test_a_bad_option_is_named(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            GenerationOptions.merge({}, given)

    def test_defaults_come_from_the_checkpoint_and_a_caller_wins(self) -> None:
        stored = {"temperature": 0.3, "top_k": 7, "top_p": 0.5, "eos_token_id": [1, 106]}
        merged = GenerationOptions.merge(stored, {"top_k": 9, "top_p": None})
        assert (merged.temperature, merged.top_k, merged.top_p) == (0.3, 9, 0.5)
        assert GenerationOptions.merge({"do_sample": False}, {}).temperature == 0
        assert GenerationOptions.merge({"max_new_tokens": 7}, {}).max_tokens == 7
        with pytest.raises(OptionError, match=r"generation_config\.json: temperature is 'x'"):
            GenerationOptions.merge({"temperature": "x"}, {})

    def test_a_drawn_seed_can_be_used_again(self) -> None:
        first, second = GenerationOptions(), GenerationOptions()
        assert first.seed != second.seed
        assert GenerationOptions(seed=first.seed) == first


@pytest.fixture(scope="module")
def engine() -> Engine:
    return create_engine(tiny_checkpoint(), "mlx", "float32")


def decoding(
    session: Session, prompt: list[int], stops: Any = (), tie: float = 0.0, **given: Any
) -> Decoding:
    return Decoding(
        options(**given), [*session.ids.tolist(), *prompt], stops,
        context_length=session.context_length, tie=tie,
    )  # fmt: skip


def generate(session: Session, prompt: list[int], stops: Any = (), **given: Any) -> list[int]:
    return list(generate_tokens(session, prompt, decoding(session, prompt, stops, **given)))


class Only:
    """A constraint that allows the same tokens everywhere."""

    finished = False
    constraint = Constraint("mask", "", str)

    def __init__(self, mask: np.ndarray) -> None:
        self._mask = mask

    def allowed(self) -> np.ndarray:
        return self._mask

    def forced(self) -> list[int]:
        return []

    def take(self, token: int) -> None:
        assert self._mask[token]


class TestDecoding:
    """The state of one answer, without an engine."""

    LOGITS = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))

    def test_a_mask_leaves_what_it_allows(self) -> None:
        for given in ({"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}):
            matcher: Any = Only(np.array([True, False, True, False]))
            state = Decoding(options(max_tokens=100, **given), [2], (), matcher=matcher)
            rows = self.LOGITS[state.want.ids]  # type: ignore[union-attr]
            drawn = [state.next(rows) for _ in range(100)]
            assert set(drawn) <= {0, 2}
            assert drawn[0] == 2 or given.get("temperature") != 0

    def test_forced_tokens_count_and_stop_as_chosen_ones_do(self) -> None:
        state = Decoding(options(max_tokens=5), [2, 9], {7})
        assert state.force([4, 5]) == [4, 5]
        assert (state.tokens, state.position) == ([4, 5], 4)
        assert state.force([6, 7, 8]) == [6]
        assert state.finish_reason == "stop"
        assert state.next(self.LOGITS) is None
        short = Decoding(options(max_tokens=2), [2], ())
        assert short.force([4, 5, 6]) == [4, 5]
        assert short.finish_reason == "length"

    def test_a_forced_token_is_seen_and_moves_the_noise_on(self) -> None:
        """After it, the text is that of a decoding which had it in its prompt."""
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((20, 50)).astype(np.float32)
        given = {"repetition_penalty": 1.8, "seed": 3, "max_tokens": 99}
        forced, read = Decoding(options(**given), [2], ()), Decoding(options(**given), [2, 11], ())
        forced.force([11])
        assert [forced.next(row) for row in rows] == [read.next(row) for row in rows]

    def test_the_seen_tokens_are_those_of_a_fresh_look(self) -> None:
        rng = np.random.default_rng(1)
        prompt = rng.integers(0, 50, 200).tolist()
        state = Decoding(options(repetition_penalty=1.5, seed=1, max_tokens=999), prompt, ())
        for _ in range(100):
            logits = rng.standard_normal(80).astype(np.float32)
            seen = np.unique([*prompt, *state.tokens])
            expected = choose(logits, seen, state.options, len(prompt) + len(state.tokens))
            assert state.next(logits) == expected

    def test_ids_past_the_tokenizer_are_never_chosen(self) -> None:
        state = Decoding(options(max_tokens=50), [2], (), vocabulary=2)
        assert {state.next(self.LOGITS) for _ in range(50)} <= {0, 1}

    @pytest.mark.parametrize("given", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9}])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_logits_that_are_not_finite_are_an_error_that_says_so(
        self, given: dict, value: float
    ) -> None:
        logits = np.full(5, value, np.float32)
        state = Decoding(options(max_tokens=5, **given), [2], ())
        with pytest.raises(BackendError, match="the logits are not finite"):
            state.next(logits)

    def test_a_constraint_that_allows_nothing_is_an_error(self) -> None:
        matcher: Any = Only(np.zeros(4, bool))
        state = Decoding(options(max_tokens=5), [2], (), matcher=matcher)
        with pytest.raises(OptionError, match="allows no token at all here"):
            state.next(self.LOGITS)

    def test_a_flag_ends_it_before_the_next_token(self) -> None:
        state = Decoding(options(max_tokens=50), [2], ())
        assert state.next(self.LOGITS) is not None
        state.cancelled.set()
        assert state.next(self.LOGITS) is None
        assert state.force([1]) == []
        assert (state.finish_reason, len(state.tokens)) == ("cancelled", 1)


class TestLoop:
    def test_greedy_tokens_are_the_best_of_teacher_forced_logits(self, engine: Engine) -> None:
        prompt = [2, 40, 50, 60]
        made = generate(engine.session(), prompt, max_tokens=40, temperature=0.0)
        assert len(made) == 40
        logits = engine.session().read([*prompt, *made], ALL)
        np.testing.assert_array_equal(logits[3:-1].argmax(-1), made)

    def test_it_stops_at_a_stop_token_at_max_tokens_and_when_the_context_is_full(
        self, engine: Engine
    ) -> None:
        greedy = {"max_tokens": 30, "temperature": 0.0}
        made = generate(engine.session(), [2, 9], **greedy)
        stop, session = made[10], engine.session()
        until = decoding(session, [2, 9], {stop}, **greedy)
        assert list(generate_tokens(session, [2, 9], until)) == made[: made.index(stop)]
        assert until.finish_reason == "stop"
        session = engine.session(12)
        full = decoding(session, [2, 9], **greedy)
        # ten read after the prompt, and one nobody reads
        assert list(generate_tokens(session, [2, 9], full)) == made[:11]
        assert full.finish_reason == "length"
        with pytest.raises(ContextError):
            generate(engine.session(3), [2, 9, 8, 7], **greedy)

    def test_a_prompt_in_pieces_gives_the_text_of_a_prompt_at_once(self) -> None:
        engine = create_engine(tiny_checkpoint(max_position_embeddings=2048), "mlx", "float32")
        prompt = np.random.default_rng(0).integers(4, 320, 1300).tolist()
        made = generate(engine.session(), prompt, max_tokens=5, temperature=0.0)
        session = engine.session()
        logits = session.read(prompt)
        for token in made:
            assert int(logits.argmax()) == token
            logits = session.read([token])

    def test_another_thread_stops_a_long_prompt_and_a_long_answer(self, engine: Engine) -> None:
        session = engine.session()
        state = decoding(session, [2, 9], max_tokens=200, temperature=0.0)
        seen = []
        for token in generate_tokens(session, [2, 9], state):
            seen.append(token)
            if len(seen) == 3:
                threading.Thread(target=state.cancelled.set).start()
                while not state.cancelled.is_set():
                    time.sleep(0.001)
        assert (len(seen), state.finish_reason) == (3, "cancelled")
        long = create_engine(tiny_checkpoint(max_position_embeddings=4096), "mlx", "float32")
        session = long.session()
        state = decoding(session, [5] * 4000)
        state.cancelled.set()
        assert list(generate_tokens(session, [5] * 4000, state)) == []
        assert session.length < 1000

    def test_a_seed_names_one_text(self, engine: Engine) -> None:
        def run(seed: int) -> list[int]:
            return generate(engine.session(), [2, 9], max_tokens=30, seed=seed)

        assert run(1) == run(1)
        assert run(1) != run(2)


class TestPromptLookup:
    def test_it_guesses_what_followed_the_last_time(self) -> None:
        lookup = PromptLookup([2, 10, 11, 12, 13, 14, 15, 9, 10, 11])
        assert lookup.guess() == []
        lookup.add([12])
        assert lookup.guess() == [13, 14, 15, 9, 10, 11, 12]
        lookup.add([99])
        assert lookup.guess() == []
        lookup.add([10, 11, 12, 13])  # the later place counts, by the longer match
        assert lookup.guess()[:2] == [14, 15]

    def test_it_waits_after_wrong_guesses_longer_each_time(self) -> None:
        lookup, tried = PromptLookup([7] * 20), []
        for step in range(200):
            if lookup.guess():
                tried.append(step)
                lookup.judge(0)
            lookup.add([7])
        assert tried == [0, 8, 24, 56, 120]
        lookup.judge(9)
        lookup.add([7] * 300)
        assert lookup.guess()

    @pytest.mark.parametrize("backend", ["mlx", "keras"])
    @pytest.mark.parametrize("given", [
        {"temperature": 0.0}, {"seed": 5, "temperature": 0.3},
        {"temperature": 0.0, "repetition_penalty": 1.2},
    ])  # fmt: skip
    def test_the_text_is_what_it_is_without(self, backend: str, given: dict) -> None:
        """In float32, over a text that repeats itself."""
        engine = create_engine(tiny_checkpoint(), backend, "float32")
        prompt = [2, *([40, 50, 60, 70, 80, 90] * 6)]
        plain, session = (
            generate(engine.session(), prompt, max_tokens=80, **given),
            engine.session(),
        )
        state = decoding(session, prompt, max_tokens=80, **given)
        lookup = PromptLookup(prompt)
        tokens = list(generate_tokens(session, prompt, state, lookup=lookup))
        assert tokens == plain
        read = session.ids.tolist()
        assert read == [*prompt, *tokens][: len(read)]
        assert len(read) >= len(prompt) + len(tokens) - 1

    def test_what_is_nearly_as_likely_after_a_guess_is_noted(self) -> None:
        """With a tie as wide as half of all leads, those positions and no others, by the logits
        of a whole read; and none where nothing was guessed, or tokens are drawn."""
        engine = create_engine(tiny_checkpoint(), "keras", "float32")
        prompt = [2, *([40, 50, 60, 70, 80, 90] * 6)]

        def answer(tie: float, lookup: bool, **given: Any) -> tuple[list[int], Decoding]:
            session = engine.session()
            state = decoding(session, prompt, max_tokens=60, tie=tie, **given)
            guesses = PromptLookup(prompt) if lookup else None
            return list(generate_tokens(session, prompt, state, lookup=guesses)), state

        tokens, state = answer(0.0, True, temperature=0.0)
        assert state.guessed_tokens > 0
        assert state.near_ties == []
        best = np.sort(engine.session().read([*prompt, *tokens], ALL)[len(prompt) - 1 :])[:, -2:]
        leads = (best[:, 1] - best[:, 0])[: len(tokens)]
        tie = float(np.median(leads)) + 1e-4
        again, state = answer(tie, True, temperature=0.0)
        assert again == tokens
        first = min(state.near_ties)  # what came before the first guess was read is not looked at
        assert state.near_ties == [at for at in np.flatnonzero(leads < tie) if at >= first]
        assert len(state.near_ties) > len(tokens) // 4
        assert answer(tie, False, temperature=0.0)[1].near_ties == []
        assert answer(tie, True, temperature=0.5, seed=1)[1].near_ties == []

    def test_it_takes_fewer_reads_where_the_text_copies(self) -> None:
        """Of a model that says what its prompt said: each guess is right."""

        class Copier:
            context_length, length, reads = 500, 0, 0
            text = np.resize(np.random.default_rng(0).integers(4, 300, 90), 500).tolist()

            def __init__(self) -> None:
                self.ids = np.zeros(0, int)

            def check_room(self, ids: Any) -> None: ...

            def read(self, ids: Any, want: Any = None) -> Any:
                assert list(ids) == self.text[self.length : self.length + len(ids)]
                self.reads, self.length = self.reads + 1, self.length + len(ids)
                rows = np.eye(300, dtype=np.float32)[
                    self.text[self.length - len(ids) + 1 : self.length + 1]
                ]
                return rows if want is ALL else rows[-1]

            def truncate(self, length: int) -> None:
                assert length == self.length

        session: Any = Copier()
        prompt = session.text[:100]
        state = Decoding(options(temperature=0.0, max_tokens=64), prompt, ())
        tokens = list(generate_tokens(session, prompt, state, lookup=PromptLookup(prompt)))
        assert tokens == session.text[100:164]
        assert session.reads <= 1 + 64 // 16 + 1

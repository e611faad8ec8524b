"""The sampler and the loop, against transformers' filters and known distributions."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from goldens.make import FILTERS, FILTERS_FILE, filter_input
from tiny import tiny_checkpoint

from gemma_multi.engines import ALL, create_engine
from gemma_multi.engines.base import Engine
from gemma_multi.errors import ContextError, OptionError
from gemma_multi.generation import GenerationOptions, generate_tokens
from gemma_multi.generation.loop import Progress
from gemma_multi.sampling.sampler import candidates, choose, gumbel

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
            ({"maxtokens": 3}, "unknown option 'maxtokens', expected max_tokens"),
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


class TestLoop:
    def test_greedy_tokens_are_the_best_of_teacher_forced_logits(self, engine: Engine) -> None:
        prompt = [2, 40, 50, 60]
        greedy = options(max_tokens=40, temperature=0.0)
        made = list(generate_tokens(engine.session(), prompt, greedy, ()))
        assert len(made) == 40
        logits = engine.session().read([*prompt, *made], ALL)
        np.testing.assert_array_equal(logits[3:-1].argmax(-1), made)

    def test_it_stops_at_a_stop_token_at_max_tokens_and_when_the_context_is_full(
        self, engine: Engine
    ) -> None:
        greedy = options(max_tokens=30, temperature=0.0)
        made = list(generate_tokens(engine.session(), [2, 9], greedy, ()))
        progress = Progress()
        stop = made[10]
        until = list(generate_tokens(engine.session(), [2, 9], greedy, {stop}, progress))
        assert until == made[: made.index(stop)]
        assert progress.finish_reason == "stop"
        progress = Progress()
        full = list(generate_tokens(engine.session(12), [2, 9], greedy, (), progress))
        assert full == made[:11]  # ten read after the prompt, and one nobody reads
        assert progress.finish_reason == "length"
        with pytest.raises(ContextError):
            next(generate_tokens(engine.session(3), [2, 9, 8, 7], greedy, ()))

    def test_a_seed_names_one_text(self, engine: Engine) -> None:
        def run(seed: int) -> list[int]:
            chosen = options(max_tokens=30, seed=seed)
            return list(generate_tokens(engine.session(), [2, 9], chosen, ()))

        assert run(1) == run(1)
        assert run(1) != run(2)

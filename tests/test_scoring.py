"""Scores: what suits which rows, and figures that SciPy and scikit-learn's definitions agree on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from gemma_multi import OptionError
from gemma_multi.scoring import (
    EXACT,
    FIELDS,
    LABELS,
    LOSS,
    NO_LABEL,
    Scoring,
    choose_scoring,
    perplexity_score,
    score,
    share,
)


@pytest.mark.parametrize(("right", "count"), [(0, 5), (1, 5), (5, 5), (17, 40), (199, 200)])
def test_the_interval_is_wilsons(right: int, count: int) -> None:
    theirs = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    ours = share(right, count)
    assert (ours.value, ours.count) == (right / count, count)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_of_nothing_nothing_is_known() -> None:
    none = share(0, 0)
    assert math.isnan(none.value)
    assert (none.low, none.high) == (0, 1)


def test_the_interval_of_a_perplexity_is_scipys_bootstrap() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 40, 60)
    losses = tokens * rng.gamma(4, 0.5, 60)
    ours = perplexity_score(losses.tolist(), tokens.tolist()).estimate
    theirs = stats.bootstrap(
        (losses, tokens), lambda a, b, axis: np.exp(a.sum(axis) / b.sum(axis)), paired=True,
        method="percentile", n_resamples=4000, rng=2,
    ).confidence_interval  # fmt: skip
    assert ours.value == pytest.approx(math.exp(losses.sum() / tokens.sum()))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        (LABELS, ["yes", "no"] * 10),
        (LABELS, [" spam", "ham\n", "ham"] * 5),
        (FIELDS, [json.dumps({"name": name}) for name in "abcdefghij"]),
        (FIELDS, ['{"a": 1}', '{"a": 2}'] * 10),  # which are few, but more than labels
        (EXACT, [f"Paris, number {i}" for i in range(20)]),
        (LOSS, [f"Once upon a time there were {i} owls. " + "They flew. " * 30 for i in range(20)]),
        (LOSS, ["yes", "no", None] * 10),
    ],
)  # fmt: skip
def test_what_is_counted_follows_from_the_rows(kind: str, answers: list[str | None]) -> None:
    chosen = choose_scoring(answers)
    assert chosen.kind == kind
    assert chosen.why


def test_it_can_be_asked_for_where_it_can_be() -> None:
    assert choose_scoring(["yes", "no"] * 10, EXACT).kind == EXACT
    for answers, wanted, said in (
        (["yes"], "accuracy", "expected auto or one of labels"),
        (["yes", None], LABELS, "whose score is 'loss'"),
        (["yes", "no"], FIELDS, "needs JSON objects for answers, received 'yes'"),
    ):
        with pytest.raises(OptionError, match=said):
            choose_scoring(answers, wanted)


def test_labels_and_what_they_are_taken_for() -> None:
    expected = ["a", "a", "a", "b", "b", "c"]
    given = ["a", " a\n", "b", "b", "d", ""]
    found = score(Scoring(LABELS, "", ("a", "b", "c")), expected, given)
    assert found.right == (True, True, False, True, False, False)
    assert found.estimate.value == 0.5
    assert found.confusion == {
        "a": {"a": 2, "b": 1, "c": 0, NO_LABEL: 0},
        "b": {"a": 0, "b": 1, "c": 0, NO_LABEL: 1},
        "c": {"a": 0, "b": 0, "c": 0, NO_LABEL: 1},
    }


def test_fields_count_one_by_one_and_the_order_of_keys_does_not() -> None:
    """Precision 2/3, recall 2/4 of `who`, worked by hand."""
    expected = [
        {"who": ["Ann", "Ben"], "day": "Monday"}, {"who": ["Cy"], "day": "Friday"},
        {"who": ["Di"], "day": None},
    ]  # fmt: skip
    given = ['{"day": "Monday", "who": ["Ben", "Ann"]}', '{"who": ["Al"], "day": "Friday"}', "Di"]
    found = score(Scoring(FIELDS, ""), [json.dumps(one) for one in expected], given)
    assert found.right == (False, False, False)  # a list has an order
    who, day = found.fields["who"], found.fields["day"]
    assert (who.precision, who.recall, who.count) == (2 / 3, 2 / 4, 4)
    assert who.f1 == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert (day.precision, day.recall) == (1, 2 / 3)
    assert score(Scoring(FIELDS, ""), ['{"a": 1, "b": 2}'], ['{"b": 2, "a": 1}']).right == (True,)

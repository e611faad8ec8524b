"""What `ship` says of rows before anything is trained, and how it holds rows out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_multi import DataError, OptionError
from gemma_multi.scoring import LABELS, LOSS
from gemma_multi.shipping.held_out import split_rows, write_rows

Row = dict[str, Any]


def row(question: str, answer: str) -> Row:
    return {"prompt": question, "completion": answer}


ROWS = [row(f"Is {i} even?", "no" if i % 2 else "yes") for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "row: 0 rows are too few"),
        (ROWS[:3], r"row: 3 rows are too few .* give it 10 or more"),
        ([row(f"{i}?", "yes") for i in range(20)], "all 20 rows have the answer 'yes'"),
        ([row("Even?", answer) for answer in ("yes", "no")] * 10, "all 20 ask the same thing"),
        ([*ROWS, {"prompt": "Why?"}], r"row:41: has the keys \['prompt'\]"),
        ([*ROWS, row("Why?", " ")], "row:41: has no answer"),
        (7, "data is int"),
    ],
)
def test_rows_that_cannot_be_are_refused_in_a_sentence(rows: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        split_rows(rows, None, "auto", 0)


def test_a_validation_set_that_leaks_is_refused_and_the_rows_are_named(tmp_path: Path) -> None:
    """Spaces and capitals do not make a question another one."""
    held = tmp_path / "held.jsonl"
    leaking = [row("Is it?", "no"), row(" is 3  EVEN?", "no"), row("Is 5 even?", "yes")]
    held.write_text("".join(json.dumps(one) + "\n" for one in leaking))
    with pytest.raises(DataError) as caught:
        split_rows(ROWS, held, "auto", 0)
    said = str(caught.value)
    assert "2 of 3 held-out rows ask what the model is taught" in said
    assert "(held.jsonl:2 is row:4, held.jsonl:3 is row:6)" in said


def test_a_label_that_nobody_teaches_is_named() -> None:
    with pytest.raises(DataError, match="row:2: its label 'noo' is on no row"):
        split_rows(ROWS, [row("Is it?", "no"), row("Was it?", "noo")], "auto", 0)


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(OptionError, match="validation is"):
        split_rows(ROWS, share, "auto", 0)


def test_every_label_is_held_out_and_the_seed_says_which() -> None:
    rows = [*ROWS, *(row(f"Is {i}.5 even?", "neither") for i in range(5))]
    one, again, other = (split_rows(rows, None, "auto", seed) for seed in (0, 0, 1))
    assert one.scoring.kind == LABELS
    assert [r.where for r in one.held] == [r.where for r in again.held]
    assert [r.where for r in one.held] != [r.where for r in other.held]
    answers = [r.answer for r in one.held]
    assert {label: answers.count(label) for label in ("yes", "no", "neither")} == {
        "yes": 4, "no": 4, "neither": 1,
    }  # fmt: skip
    assert len(one.training) + len(one.held) == len(rows)


def test_rows_that_ask_the_same_stay_together() -> None:
    rows = [row(f"{'  ' * k}Is {i} EVEN?".lower(), "no" if i % 2 else "yes")
            for i in range(12) for k in range(3)]  # fmt: skip
    split = split_rows(rows, 0.3, "auto", 0)
    assert not {r.asks for r in split.training} & {r.asks for r in split.held}


def test_what_should_be_known_about_the_rows_is_said() -> None:
    split = split_rows([*ROWS, row("Is 2 even?", "no")], [row("Is it?", "no")] * 3, "auto", 0)
    assert split.notes == (
        "1 questions have more than one answer among the rows to learn from: the model cannot "
        "learn both",
        "always saying 'no' would be right on 100%",
        "3 held-out rows are few: see how wide the intervals are",
    )


def test_one_answer_can_be_wanted() -> None:
    split = split_rows([row(f"{i}?", "yes") for i in range(20)], None, LOSS, 0)
    assert (len(split.training), len(split.held)) == (16, 4)


def test_a_million_rows_do_not_take_an_hour_to_ask() -> None:
    rows = [row(f"Is {i} even?", "no" if i % 2 else "yes") for i in range(3000)]
    assert len(split_rows(rows, None, "auto", 0).held) == 200


def test_rows_are_written_as_they_came(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{i}?\ud800"},
                          {"role": "assistant", "content": "é"}]} for i in range(20)]  # fmt: skip
    split = split_rows(rows, 0.2, LOSS, 0)
    write_rows(split.training, tmp_path / "rows.jsonl")
    read = split_rows(tmp_path / "rows.jsonl", 0.5, LOSS, 0)
    assert len(read.training) + len(read.held) == len(split.training)

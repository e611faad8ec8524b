"""Batches over files: what `model.batch` gives, in each format, for each task, beside its key."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from batches.row_files import LABELS, read, reviews, write

import gemma_multi
from gemma_multi import Model
from gemma_multi.batch import run

VISIT = {"type": "object", "properties": {"person": {"type": "string", "maxLength": 12}},
         "required": ["person"]}  # fmt: skip
ALARM = {"name": "set_alarm", "description": "Sets an alarm.", "parameters": {
    "type": "object", "properties": {"hour": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["hour"]}}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return gemma_multi.load("storyteller", backend="litert", progress=False)


def asked(model: Model, tmp_path: Path, rows: list[dict[str, Any]], task: str, to: str = "o.jsonl",
          **options: Any) -> list[dict[str, Any]]:  # fmt: skip
    """What a batch writes for rows of which none fails."""
    source = write(tmp_path / "rows.jsonl", rows)
    report = run(model, source, tmp_path / to, task, progress=False, **options)
    assert (report.rows, report.failed, report.errors) == (len(rows), 0, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([to, "rows.jsonl"])
    found = read(tmp_path / to)
    (tmp_path / to).unlink()
    return found


@pytest.mark.parametrize("to", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("of", [".jsonl", ".csv", ".parquet"])
def test_each_format_in_and_out(model: Model, tmp_path: Path, of: str, to: str) -> None:
    rows = reviews(6)
    source = write(tmp_path / f"rows{of}", rows)
    output = tmp_path / f"found{to}"
    run(model, source, output, "classify", labels=LABELS, key="id", keep=["note"],
        rows_per_part=4, progress=False)  # fmt: skip
    found = read(output)
    assert [list(row) for row in found] == [
        ["id", "note", "label", "probability", "probabilities"]
    ] * 6
    expected = [found.value for found in model.batch(
        [row["text"] for row in rows], "classify", labels=LABELS, progress=False)]  # fmt: skip
    for row, one, answer in zip(rows, found, expected, strict=True):
        assert (one["id"], one["note"]) == (row["id"], row["note"])
        assert one["label"] == answer.label
        assert float(one["probability"]) == answer.probability
        shares = one["probabilities"]
        assert (json.loads(shares) if to == ".csv" else shares) == answer.probabilities


def test_generated_texts_and_objects(model: Model, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("Hi", "A story.")]
    plain = asked(model, tmp_path, rows, "generate", temperature=0, max_tokens=8)
    first = model.generate("Hi", temperature=0, max_tokens=8)
    assert plain[0] == {
        "row": 0, "text": first.text, "finish_reason": first.finish_reason,
        "prompt_tokens": first.prompt_tokens, "generated_tokens": first.generated_tokens,
    }  # fmt: skip
    formed = asked(model, tmp_path, rows, "generate", "o.parquet", schema=VISIT, temperature=0)
    assert [json.loads(row["parsed"]) for row in formed] == [json.loads(r["text"]) for r in formed]


def test_calls_objects_and_routes(model: Model, tmp_path: Path) -> None:
    rows = [{"query": "Wake me at 7."}, {"query": "Wake me at 8."}]
    found = asked(model, tmp_path, rows, "generate", tools=[ALARM], tool_choice="required", seed=1)
    for row in found:
        assert row["calls"]
        for call in row["calls"]:
            assert call["name"] == "set_alarm"
            assert 1 <= call["arguments"]["hour"] <= 9
    objects = asked(model, tmp_path, rows, "extract", "o.csv", schema=VISIT)
    assert [list(json.loads(row["object"])) for row in objects] == [["person"]] * 2
    routes = {"alarms": "clocks", "mail": "letters"}
    one = asked(model, tmp_path, rows, "route", routes=routes)[0]
    assert list(one) == ["row", "route", "probability", "probabilities"]
    assert one["route"] in ("alarms", "mail")


def test_embeddings_keep_every_bit(model: Model, tmp_path: Path) -> None:
    rows = reviews(3)
    expected = model.embed([row["text"] for row in rows], progress=False)
    for name in ("o.jsonl", "o.parquet"):
        found = asked(model, tmp_path, rows, "embed", name)
        assert np.array_equal(np.array([r["embedding"] for r in found], np.float32), expected)


def test_each_row_draws_with_a_seed_of_its_own(model: Model, tmp_path: Path) -> None:
    rows = [{"prompt": "Once upon"}] * 3
    found = asked(model, tmp_path, rows, "generate", seed=40, raw=True, temperature=1.0,
                  max_tokens=12)  # fmt: skip
    alone = [
        model.generate("Once upon", seed=seed, raw=True, temperature=1.0, max_tokens=12).text
        for seed in (40, 41, 42)
    ]
    assert [row["text"] for row in found] == alone
    assert len(set(alone)) > 1


def test_columns_that_are_carried_keep_their_types(model: Model, tmp_path: Path) -> None:
    rows = [
        {"text": "It broke.", "day": date(2026, 1, 2), "count": 3, "odd": None},
        {"text": "I love it.", "day": None, "count": 2**40, "odd": "x"},
    ]
    source = write(tmp_path / "rows.parquet", rows)
    options: Any = {"labels": LABELS, "keep": ["day", "count", "odd"], "progress": False}
    run(model, source, tmp_path / "o.parquet", "classify", **options)
    table = pyarrow.parquet.read_table(tmp_path / "o.parquet")
    assert table.select(options["keep"]).equals(
        pyarrow.parquet.read_table(source).select(options["keep"])
    )
    assert table["row"].to_pylist() == [0, 1]
    run(model, source, tmp_path / "o.jsonl", "classify", **options)
    assert [row["day"] for row in read(tmp_path / "o.jsonl")] == ["2026-01-02", None]


def test_rows_that_fail_go_to_a_file_beside(model: Model, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(
        '{"id": 1, "text": "It broke."}\n\n{"id": 2, "text": \n{"id": 3}\n[1]\n'
        '{"id": 5, "text": ""}\n{"text": "No key."}\n{"id": 7, "text": {"labels": ["a"]}}\n'
        '{"id": 8, "text": "' + "long " * 5000 + '"}\n{"id": 9, "text": "Half \\ud83d a pair."}\n'
    )
    report = run(model, source, tmp_path / "o.jsonl", "classify", labels=LABELS, key="id",
                 progress=False)  # fmt: skip
    found, failed = read(tmp_path / "o.jsonl"), read(tmp_path / "o.errors.jsonl")
    assert report.errors == tmp_path / "o.errors.jsonl"
    assert report.failed == len(failed)
    assert len(found) + len(failed) == report.rows == 9
    assert found[0]["id"] == 1
    said = {row["line"]: (row["row"], row["id"], row["error"]) for row in failed}
    for line, expected in {
        3: (1, None, "not valid JSON"), 4: (2, 3, "has no column 'text'"),
        5: (3, None, "is list, expected an object"), 6: (4, 5, "is ''"),
        7: (5, None, "has no 'id' to be known by"), 8: (6, 7, "labels"), 9: (7, 8, "context"),
    }.items():  # fmt: skip
        assert said[line][:2] == expected[:2]
        assert expected[2] in said[line][2]

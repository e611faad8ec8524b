"""What is wrong with a batch as a whole is said in a sentence, before any row is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from batches.row_files import LABELS, reviews, write

from gemma_multi import GemmaError
from gemma_multi.batch import run
from gemma_multi.cli import main


def refused(source: Path, words: str, output: str = "o.jsonl", task: str = "classify",
            **options: Any) -> None:  # fmt: skip
    """Neither an output nor anything unfinished is there afterwards."""
    before = sorted(path.name for path in source.parent.iterdir())
    given = {"labels": LABELS} if task == "classify" else {}
    with pytest.raises(GemmaError, match=words) as error:
        run("storyteller", source, source.parent / output, task, progress=False,
            load={"backend": "litert"}, **{**given, **options})  # fmt: skip
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in source.parent.iterdir()) == before


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_column_that_is_missing(tmp_path: Path, suffix: str) -> None:
    source = write(tmp_path / f"rows{suffix}", reviews(3))
    columns = "only 'id', 'text', 'note'"
    refused(source, f"rows{suffix}: has no column 'review', {columns}", column="review")
    refused(source, f"rows{suffix}: has no column 'number', {columns}", key="number")
    refused(source, f"rows{suffix}: has no column 'rating', {columns}", keep=["rating"])
    other = write(tmp_path / f"other{suffix}", [{"review": "It broke."}])
    refused(other, "has no column 'prompt', 'messages', 'text' or 'query', only 'review'; say")


def test_a_file_that_breaks_off(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.parquet", reviews(3000)).read_bytes()
    source = tmp_path / "rows.parquet"
    source.write_bytes(whole[: len(whole) // 2])
    refused(source, "rows.parquet:1: not valid Parquet")
    source.write_bytes(whole[:100] + bytes(2000) + whole[2100:])  # its footer is whole
    refused(source, "rows.parquet: cannot be read: Corrupt")
    source = tmp_path / "rows.csv"
    source.write_text('id,text\n1,"It broke\n')
    refused(source, "rows.csv:2: not valid CSV")
    source.write_bytes(b"id,text\n1,\xff\n")
    refused(source, "rows.csv: not UTF-8")


def test_what_is_no_file_of_rows(tmp_path: Path) -> None:
    refused(tmp_path / "rows.jsonl", "no such file")
    source = tmp_path / "rows.jsonl"
    source.write_text("\n")
    refused(source, "has no rows")
    write(source, reviews(2))
    refused(source, r"an output is a .jsonl, .csv, .parquet file, received '.txt'", "o.txt")
    refused(source, r"a list of errors is a .jsonl file", errors="errors.csv")
    refused(tmp_path / "rows.xlsx", r"an input is a .jsonl, .csv, .parquet file, received '.xlsx'")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"task": "judge"}, "task is 'judge', expected one of generate, classify"),
     ({"labels": []}, "labels is empty"),
     ({"task": "route"}, "task 'route': missing a required argument: 'routes'"),
     ({"schema": "{}"}, "task 'classify': got an unexpected keyword argument 'schema'"),
     ({"task": "generate", "logprobs": 2}, "no column for logprobs"),
     ({"task": "generate", "temperature": -1}, "temperature is -1"),
     ({"keep": ["note", "note"]}, "carried twice"),
     ({"keep": "note"}, "keep is 'note', expected names of columns"),
     ({"rows_per_part": 0}, "rows_per_part is 0, expected a whole number 1"),
     ({"seed": -1}, "seed is -1"),
     ({"engine": "spark"}, "engine is 'spark', expected local or ray"),
     ({"actors": 2}, "'actors' is an option of --engine ray"),
     ({"engine": "ray", "actors": 0}, "actors is 0"),
     ({"engine": "ray", "gpus": -1}, "gpus is -1"),
     ({"engine": "ray", "address": "ray://head:10001"}, "--address auto")],
)  # fmt: skip
def test_an_option_that_cannot_be(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    refused(write(tmp_path / "rows.jsonl", reviews(2)), words, **options)


def test_a_column_called_as_one_of_the_answers(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": "It broke.", "label": "negative"}])
    refused(source, "the column 'label' cannot be carried along", key="label")


def test_the_command_says_it_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [*reviews(3), {"id": "r3", "text": ""}]
    write(tmp_path / "rows.jsonl", rows)
    line = ["batch", "storyteller", "rows.jsonl", "found.csv", "--task", "classify", "-b", "litert",
            "-l", "positive", "-l", "negative", "--key", "id"]  # fmt: skip

    def said(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*line, *more])
        return ended.value.code, *capsys.readouterr()  # type: ignore[return-value]

    code, out, _ = said("--json")
    assert code == 1  # some rows failed
    report = json.loads(out)
    assert (report["rows"], report["failed"]) == (4, 1)
    assert report["errors"] == "found.errors.jsonl"
    code, out, error = said()
    assert (code, out) == (2, "")
    assert error == (
        "gemma-multi: found.csv: exists already; choose another name, or replace it with "
        "--overwrite\n"
    )
    code, out, _ = said("--overwrite")
    assert code == 1
    assert out.startswith("found.csv: 4 rows, 4 of them in ")
    assert out.endswith("1 failed, see found.errors.jsonl\n")
    code, _, error = said("--overwrite", "--tools", '{"a": 1}')
    assert (code, error) == (2, "gemma-multi: --tools is dict, expected a list\n")

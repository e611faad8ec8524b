"""Training data: every format, every kind of bad row, a million rows, and `data check`."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_checkpoint, tokenizer

from gemma_multi import DataError, OptionError, chat_template, finetune
from gemma_multi.cli import main
from gemma_multi.rows import read_row, read_rows
from gemma_multi.training.batches import IGNORE_INDEX, Batches
from gemma_multi.training.check import check_data
from gemma_multi.training.examples import Examples, prepare, tokenize
from training.conftest import ROWS

TOKENIZER = tokenizer()


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(tmp_path: Path, rows: Any, **options: Any) -> Examples:
    return prepare(rows, TOKENIZER, tmp_path / "data.i32", **{"max_length": 64, **options})


# Formats ------------------------------------------------------------------------------------------


def test_every_format_holds_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    files = [write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "r.csv", tmp_path / "r.parquet"]
    with files[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), files[2])
    expected = [row.turns for row in read_rows(ROWS)]
    assert len(expected) == len(ROWS)
    for file in files:
        assert [row.turns for row in read_rows(file)] == expected
    messages = [{"messages": [{"role": "user", "content": r["prompt"]},
                              {"role": "assistant", "content": r["completion"]}]}
                for r in ROWS]  # fmt: skip
    assert [row.turns for row in read_rows(messages)] == expected
    table = [{"messages": m["messages"]} for m in messages]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "m.parquet")
    assert [row.turns for row in read_rows(tmp_path / "m.parquet")] == expected


def test_the_tokens_are_those_the_model_will_see_and_say() -> None:
    """Up to the answer the ids are `generate`'s own; the loss is on the answer and its end."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello <end_of_turn> there"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
        {"role": "model", "content": " Bye. "},
    ]
    words = tokenize(TOKENIZER, read_row({"messages": messages}))
    ids, wanted = words & 0xFFFFF, words >= 1 << 30
    prompt = chat_template.encode_prompt(TOKENIZER, messages[:-1])
    assert ids[: len(prompt)].tolist() == prompt
    answer = [*TOKENIZER.encode("Bye."), TOKENIZER.end_of_turn_id]
    assert ids[len(prompt) :].tolist() == answer
    said = [*TOKENIZER.encode("Hi."), TOKENIZER.end_of_turn_id, *answer]
    assert ids[wanted].tolist() == said
    everything = tokenize(TOKENIZER, read_row({"messages": messages}), "all")
    assert (everything >= 1 << 30).sum() == len(everything) - 1
    text = tokenize(TOKENIZER, read_row({"text": "Once upon a time."}))
    assert text[-1] & 0xFFFFF == TOKENIZER.eos_id
    assert (text >= 1 << 30).sum() == len(text) - 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "a", "completion": "b"}, "unknown key 'promt', expected 'messages'"),
        ({"prompt": "a"}, r"has the keys \['prompt'\]"),
        ({"prompt": "a", "completion": " "}, "has no answer: 'completion' is empty"),
        ({"prompt": "", "completion": "b"}, "'prompt' is empty"),
        ({"prompt": "a", "completion": 3}, "'completion' is int, expected a text"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [{"role": "user", "content": "a"}]}, "has no answer: its last message"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "model", "content": ""}]},
         "has no answer"),
        ({"messages": [{"role": "model", "content": "a"}]}, "must end with a user's turn"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"},
                       {"role": "model", "content": "c"}]}, "it is the turn of 'model'"),
        ({"messages": [{"role": "boss", "content": "a"}, {"role": "model", "content": "c"}]},
         "role 'boss'"),
        ({"text": "   "}, "'text' is empty"),
        ([1, 2], "is list, expected"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_and_nothing_is_begun(tmp_path: Path, row: Any, message: str) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", [*ROWS[:2], row, *ROWS])
    with pytest.raises(DataError, match=f"train.jsonl:3: .*{message}"):
        finetune("storyteller", file, output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", b"", "a.jsonl: has no rows"),
        ("a.jsonl", b'{"text": "hello"}\n', "one row is too few"),
        ("a.jsonl", b'{"text": "\xff\xfe"}\n', "a.jsonl:1: not valid JSON"),
        ("a.csv", b"prompt,completion\na,b,c\n", "a.csv:2: has 3 fields, but the header"),
        ("a.csv", b'prompt,completion\n"a\nb",c\nd\n', "a.csv:4: has 1 fields"),
        ("a.csv", b"prompt,completion,completion\na,b,c\n", "names a column twice"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "a key is there twice"),
        ("a.jsonl", b'{"text": "hello"}\n' * 9, "all 9 rows are the same"),
        ("a.csv", b"question,answer\na,b\n", "a.csv:2: unknown key 'answer'"),
        ("a.csv", b"prompt,completion\na,\xff\n", "a.csv: not UTF-8"),
        ("a.parquet", b"not parquet", "a.parquet:1: not valid Parquet"),
        ("a.txt", b"hello", "rows come in a .jsonl, .csv, .parquet file"),
    ],
)
def test_a_file_that_is_no_data(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        finetune("storyteller", tmp_path / name, output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, "learning_rate is 0, expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"max_length": 7}, "max_length is 7, expected a whole number 8"),
        ({"max_length": 9999}, "max_length is 9999"),
        ({"method": "lora", "targets": ["q_proj", "x_proj"]}, "target 'x_proj' does not exist"),
        ({"targets": 5}, "targets is 5, expected names of layers"),
        ({"method": "dora"}, "method is 'dora', expected one of full, lora"),
        ({"method": "lora", "rank": 0}, "rank is 0"),
        ({"method": "lora", "rank": 100}, "rank is 100, but"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"lr": 1e-4}, "unknown option 'lr'"),
        ({"qat": 1}, "qat is 1, expected True or False"),
        ({"backend": "litert"}, "cannot train"),
        ({"backend": "torch"}, "unknown backend 'torch'"),
        ({"too_long": "drop"}, "too_long is 'drop'"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    from gemma_multi.errors import GemmaError

    with pytest.raises(GemmaError, match=message):
        finetune(tiny_checkpoint(vocab_size=4096), ROWS, output=tmp_path / "run", progress=False,
                 **options)  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_an_output_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="exists already"):
        finetune("storyteller", ROWS, output=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# Examples and batches -----------------------------------------------------------------------------


def test_rows_too_long_are_refused_cut_or_skipped(tmp_path: Path) -> None:
    long = {"prompt": "Why?", "completion": "because " * 80}
    rows = [*ROWS[:3], long, {"prompt": "why " * 90, "completion": "so"}]
    with pytest.raises(DataError, match=r"row:4: .* tokens, but max_length is 64"):
        prepared(tmp_path, rows)
    skipped = prepared(tmp_path, rows, too_long="skip")
    assert (len(skipped), skipped.skipped) == (3, 2)
    cut = prepared(tmp_path, rows, too_long="cut")
    # a cut that leaves nothing to learn is a skip, and is counted as one
    assert (len(cut), cut.cut, cut.skipped) == (4, 1, 1)
    assert cut.lengths.max() == 64


@pytest.mark.parametrize("packing", [False, True])
def test_every_epoch_reads_every_example_once(tmp_path: Path, packing: bool) -> None:
    examples = prepared(tmp_path, ROWS)
    batches = Batches(examples, 4, 64, accumulate=2, packing=packing, seed=3)
    orders = []
    for epoch in range(2):
        made = list(batches.epoch(epoch))
        assert len(made) == batches.count(epoch)
        order = [i for batch in made for i in batch.examples]
        assert sorted(order) == list(range(len(ROWS)))
        wanted = sum(int(examples.example(i)[1].sum()) for i in order)
        assert sum(batch.loss_tokens for batch in made) == wanted
        later = list(batches.epoch(epoch, first=1))
        assert [b.examples for b in later] == [b.examples for b in made[1:]]
        orders.append(order)
        for batch in made:
            assert batch.ids.shape[1:] == (4, 64 if packing else 32)
            assert not batch.labels[batch.segments == 0].max(initial=IGNORE_INDEX) > IGNORE_INDEX
    assert orders[0] != orders[1]


def test_what_is_held_out_was_not_trained_on(tmp_path: Path) -> None:
    """Rows that are there twice stay on one side."""
    training, held = prepared(tmp_path, ROWS * 3).split(0.2, seed=1)
    assert len(training) + len(held) == 3 * len(ROWS)
    assert 0 < len(held) < len(training)
    assert training.count_shared(held) == 0


def test_many_rows_stay_on_the_disk(tmp_path: Path) -> None:
    """A stream of 200,000 rows takes a few bytes each of memory, not their text."""
    import tracemalloc

    def stream() -> Iterator[dict[str, str]]:
        for i in range(200_000):
            yield {"text": f"{i}"}

    tracemalloc.start()
    examples = prepared(tmp_path, stream())
    batches = Batches(examples, 32, 64)
    assert batches.count(0) == 6250
    batch = next(batches.epoch(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6
    assert isinstance(examples.entries, np.memmap)
    assert batch.ids.shape == (1, 32, 32)


# data check ---------------------------------------------------------------------------------------


def test_data_check_finds_everything(tmp_path: Path) -> None:
    rows = [*ROWS, ROWS[3], {"text": "word " * 100}, {"prompt": "a"}, {"text": "Fine."}]
    file = write_jsonl(tmp_path / "train.jsonl", rows)
    held = write_jsonl(tmp_path / "held.jsonl", ROWS[:2])
    report = check_data(file, TOKENIZER, validation=held, max_length=64)
    count = len(ROWS)
    assert (report.rows, report.bad, report.ok) == (count + 4, 1, False)
    assert report.kinds == {"completion": count + 1, "text": 2}
    assert report.duplicate_lines == [count + 1]
    assert report.too_long_lines == [count + 2]
    assert report.leaked_lines == [1, 2]
    assert report.bad_rows[0].startswith(f"train.jsonl:{count + 3}: has the keys")
    assert sum(n for _, n in report.histogram) == count + 3


def test_data_check_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", [*ROWS, {"text": "word " * 600}])
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(file), "--max-length", "2000"])
    assert ended.value.code == 0
    assert "Training can begin." in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(file)])
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    for part in (f"train.jsonl: {len(ROWS) + 1} rows", "█", "longer than 512 tokens: line",
                 "unless told --too-long cut or skip"):  # fmt: skip
        assert part in shown
    assert max(map(len, shown.splitlines())) <= 80
    with pytest.raises(SystemExit):
        main(["data", "check", str(file), "--json"])
    assert json.loads(capsys.readouterr().out)["too_long"] == 1
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(tmp_path / "bad.jsonl")])
    assert ended.value.code == 1


def test_a_refused_run_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a", "answer": "b"}])
    done = subprocess.run(
        [sys.executable, "-m", "gemma_multi", "finetune", "storyteller", str(file), "-o",
         str(tmp_path / "run")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "train.jsonl:1: unknown key 'answer'" in done.stderr
    assert not (tmp_path / "run").exists()

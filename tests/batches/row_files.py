"""Rows in files of each format, as tests write them and read them back."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

LABELS = ["positive", "negative"]
THINGS = ["kettle", "lamp", "tent", "radio", "jacket", "chair", "phone", "watch"]
ENDS = ["broke after a week.", "works perfectly. Five stars.", "came in pieces."]
MARK = 'Größe "M", 5 €\nand a line'  # what CSV quotes and JSON escapes


def reviews(count: int) -> list[dict[str, Any]]:
    """Rows with an `id`, a `text` and more."""
    return [
        {"id": f"r{i}", "text": f"The {THINGS[i % 8]} no. {i} {ENDS[i % 3]}", "note": f"{MARK} {i}"}
        for i in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """As anybody's program reads them; of CSV all are texts."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    return pyarrow.parquet.read_table(path).to_pylist()

"""Rows of data, from files or from Python, one at a time.

Files are JSONL, CSV and Parquet; they are read as a stream, so a million rows take no more memory
than ten. To learn from, a row is a conversation (`messages`, or `prompt` and `completion`) or a
plain `text`. One with `tools` beside its messages may have `calls` for the content of a model's
turn, and then a turn of the role `tool` whose content is what they gave. Every such row is checked
here, and a bad one is named by file and line. Nothing is dropped.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_multi.chat_template import ROLES, Message, encode_answered, fold_system
from gemma_multi.errors import DataError, OptionError
from gemma_multi.files import unique_keys
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.tools import Tool, encode_with_tools, read_conversation, read_tools

Data = str | Path | Iterable[Mapping[str, Any]]
KINDS = {
    "messages": {"messages"},
    "completion": {"prompt", "completion"},
    "text": {"text"},
    "tools": {"tools", "messages"},
}
_EXPECTED = "expected 'messages' (and 'tools'), or 'prompt' and 'completion', or 'text'"


@dataclass(frozen=True)
class Row:
    """One example: a conversation that ends with the model's turn, or a text."""

    turns: tuple[tuple[str, Any], ...]  # (user|model, text); empty for a plain text
    text: str
    roles: tuple[str, ...]  # as the source named them
    line: int  # of the file, or the row's number in a Parquet file or an iterable, from 1
    # where there are some, turns may also be ("calls", Calls) and ("tool", results), and system
    # text is not in the first of them
    tools: tuple[Tool, ...] = ()
    system: str = ""

    @property
    def kind(self) -> str:
        """Of `KINDS`."""
        if not self.turns:
            return "text"
        if self.tools:
            return "tools"
        return "completion" if "prompt" in self.roles else "messages"


@dataclass(frozen=True)
class Given:
    """A row as it came and as it was read, to be asked."""

    row: Row
    raw: Mapping[str, Any]
    where: str  # file and line

    @property
    def question(self) -> list[Message] | None:
        """What the model is asked; None where its answer is no text, or nothing is asked."""
        if self.row.tools or not self.row.turns:
            return None
        return [{"role": role, "content": text} for role, text in self.row.turns[:-1]]

    @property
    def opening(self) -> list[Message]:
        """What is said before the last answer, or in a row with tools first; nothing in a text."""
        if self.row.tools:
            return [{"role": "user", "content": self.row.turns[0][1]}]
        return self.question or []

    @property
    def answer(self) -> str | None:
        return None if self.question is None else self.row.turns[-1][1]

    @property
    def asks(self) -> str:
        """Equal for rows that ask the same thing."""
        asked = self.row.turns[:-1] if self.row.turns else self.row.text
        return " ".join(f"{self.row.system} {asked}".casefold().split())


def read_given(data: Data) -> tuple[str, list[Given]]:
    """(what to call the data, all its rows). Raises DataError naming the first bad one."""
    name, numbered = open_data(data)
    return name, [Given(row, raw, f"{name}:{row.line}") for row, raw in _read_all(name, numbered)]


def read_rows(data: Data) -> Iterator[Row]:
    """Every row of `data`. Raises DataError naming the first bad one."""
    for row, _ in _read_all(*open_data(data)):
        yield row


def _read_all(name: str, numbered: Iterable[tuple[int, Any]]) -> Iterator[tuple[Row, Any]]:
    """Rows as they were read and as they came."""
    for line, raw in numbered:
        try:
            yield read_row(raw, line), raw
        except OptionError as error:
            raise DataError(f"{name}:{line}: {error}") from None


def encode_row(tokenizer: Tokenizer, row: Row) -> tuple[list[int], list[bool]]:
    """(token ids, which of them the model says); of a plain text it says all."""
    if row.tools:
        return encode_with_tools(tokenizer, row.turns, row.tools, row.system)
    if row.turns:
        return encode_answered(tokenizer, row.turns)
    ids = [tokenizer.bos_id, *tokenizer.encode(row.text)]
    return ids, [True] * len(ids)


class Unreadable(str):
    """Stands for a row that is not even a row, and says why."""


def data_name(data: Data) -> str:
    """What messages call the data."""
    return Path(data).name if isinstance(data, str | Path) else "row"


def open_data(data: Data) -> tuple[str, Iterator[tuple[int, Any]]]:
    """(what to call the data, its raw rows with their numbers)."""
    if isinstance(data, str | Path):
        path = Path(data)
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(
                f"{path}: rows come in a {', '.join(SUFFIXES)} file, received "
                f"{path.suffix or 'no suffix'!r}"
            )
        if not path.is_file():
            raise DataError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
        return data_name(data), _readable(path, reader(path))
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise DataError(
            f"data is {type(data).__name__}, expected a file or rows such as "
            "{'prompt': ..., 'completion': ...}"
        )
    return data_name(data), enumerate(iter(data), 1)


def read_row(raw: Any, line: int = 0) -> Row:
    """Checks one raw row. Raises OptionError saying what is wrong with it."""
    if isinstance(raw, Unreadable):
        raise OptionError(raw)
    if not isinstance(raw, Mapping):
        raise OptionError(f"is {type(raw).__name__}, {_EXPECTED}")
    keys = set(raw)
    kind = next((kind for kind, wanted in KINDS.items() if keys == wanted), None)
    if kind is None:
        known = set().union(*KINDS.values())
        unknown = sorted(map(str, keys - known))
        named = f"unknown key {unknown[0]!r}" if unknown else f"has the keys {sorted(keys)}"
        raise OptionError(f"{named}, {_EXPECTED}")
    if kind == "text":
        return Row((), _text(raw, "text"), (), line)
    if kind == "completion":
        turns = (
            ("user", _text(raw, "prompt").strip()),
            ("model", _text(raw, "completion").strip()),
        )
        return Row(turns, "", ("prompt", "completion"), line)
    if kind == "tools":
        return _with_tools(raw["tools"], raw["messages"], line)
    return _conversation(raw["messages"], line)


def _with_tools(given: Any, messages: Any, line: int) -> Row:
    tools = read_tools(given)
    system, turns = read_conversation(messages, tools)
    if not turns or turns[-1][0] not in ("model", "calls"):
        raise OptionError("has no answer: its last message is not the model's")
    roles = tuple(message["role"] for message in messages)
    return Row(tuple(turns), "", roles, line, tools, system)


def _conversation(messages: Any, line: int) -> Row:
    if not isinstance(messages, list | tuple) or not messages:
        raise OptionError("'messages' is empty or no list, expected {'role', 'content'} objects")
    *before, last = messages
    role = last.get("role") if isinstance(last, Mapping) else None
    if not isinstance(role, str) or ROLES.get(role) != "model":
        raise OptionError(f"has no answer: its last message is {role!r}'s, expected the model's")
    if set(last) != {"role", "content"}:
        raise OptionError(f"its last message has the keys {sorted(last)}")
    turns = (*fold_system(before), ("model", _text(last, "content").strip()))
    for i, (who, text) in enumerate(turns):
        if who == "model" and not text:
            raise OptionError(f"turn {i} is an empty answer")
    return Row(turns, "", tuple(m["role"] for m in messages), line)


def _text(raw: Mapping[str, Any], key: str) -> str:
    value = raw[key]
    if not isinstance(value, str):
        raise OptionError(f"{key!r} is {type(value).__name__}, expected a text")
    if not value.strip():
        what = "has no answer: " if key in ("completion", "content") else ""
        raise OptionError(f"{what}{key!r} is empty")
    return value


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            if not content.strip():
                continue
            try:
                yield line, json.loads(content, object_pairs_hook=unique_keys)
            except (ValueError, RecursionError) as error:
                yield line, Unreadable(f"not valid JSON: {error}")


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit((1 << 31) - 1)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path.name}:1: the header names a column twice: {', '.join(header)}")
        while True:
            line = reader.line_num + 1  # where the row begins; it may have several lines
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{path.name}:{line}: not valid CSV: {error}") from None
            if len(fields) == len(header):
                yield line, dict(zip(header, fields, strict=True))
            elif fields:  # a blank line is none
                many = f"has {len(fields)} fields, but the header names {len(header)}"
                yield line, Unreadable(many)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs: pip install pyarrow") from None
    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for raw in batch.to_pylist():
                    line += 1
                    yield line, raw
    except pyarrow.ArrowException as error:
        raise DataError(f"{path.name}:{line + 1}: not valid Parquet: {error}") from None


def _readable(path: Path, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet,
}  # fmt: skip
SUFFIXES = tuple(_READERS)

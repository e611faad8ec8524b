"""Rows with tools: what is trained on is what is asked and allowed later, token for token."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import gemma_multi
from gemma_multi import Model, OptionError
from gemma_multi.rows import encode_row, read_row, read_rows
from gemma_multi.tools import read_tools, tool_format
from tools.test_tools import STORYTELLER, function_gemma, spelled

BOOK = {"name": "book", "description": "Books a table.", "parameters": {
    "type": "object",
    "properties": {"people": {"type": "integer"}, "name": {"type": "string"},
                   "at": {"type": "object", "properties": {"h": {"type": "integer"},
                                                           "am": {"type": "boolean"}}}},
    "required": ["people"],
}}  # fmt: skip
CALL = {"name": "book", "arguments": {"name": "Em, }", "at": {"am": True, "h": 7}, "people": 4}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "A table for four."},
    {"role": "model", "calls": [CALL, {"name": "book", "arguments": {"people": 2}}]},
    {"role": "tool", "content": [{"ok": True}, "full"]},
    {"role": "assistant", "content": "Done."},
    {"role": "user", "content": "One more."},
    {"role": "model", "calls": [{"name": "book", "arguments": {"people": 1}}]},
]
ROW: dict[str, Any] = {"tools": [BOOK], "messages": MESSAGES}


@pytest.fixture(scope="module", params=["json", "functiongemma"])
def model(request: pytest.FixtureRequest) -> Model:
    checkpoint = STORYTELLER if request.param == "json" else function_gemma()
    return gemma_multi.load(checkpoint, backend="litert")


def said_parts(model: Model, ids: list[int], said: list[bool]) -> list[str]:
    """Runs of what the model says."""
    parts, run = [], []
    for token, flag in [*zip(ids, said, strict=True), (0, False)]:
        if flag:
            run.append(token)
        elif run:
            parts.append(spelled(model, run))
            run = []
    return parts


def test_it_learns_what_it_will_say(model: Model) -> None:
    ids, said = encode_row(model.tokenizer, read_row(ROW))
    if model.tokenizer.has_function_pieces:
        call = "<start_function_call>call:book{{{}}}<end_function_call>"
        long = call.format("at:{am:true,h:7},name:<escape>Em, }<escape>,people:4")
        opens = "<start_function_response>"
        assert said_parts(model, ids, said) == [
            long + call.format("people:2") + opens, "Done.<end_of_turn>",
            call.format("people:1") + opens,
        ]  # fmt: skip
        assert "response:book{ok:true}<end_function_response><start_function_response>" in spelled(
            model, ids
        )
    else:
        long = {"name": "book", "arguments": {"people": 4, "name": "Em, }",
                                              "at": {"h": 7, "am": True}}}  # fmt: skip
        short = {"name": "book", "arguments": {"people": 2}}
        assert said_parts(model, ids, said) == [
            json.dumps([long, short]) + "<end_of_turn>", "Done.<end_of_turn>",
            json.dumps([{**short, "arguments": {"people": 1}}]) + "<end_of_turn>",
        ]  # fmt: skip


def test_it_is_asked_as_it_learned(model: Model) -> None:
    """The beginning of a row is the prompt of a chat, and what it says is what may come."""
    ids, said = encode_row(model.tokenizer, read_row(ROW))
    chat = model.chat("Be brief.", tools=[BOOK])
    chat.send("A table for four.", tool_choice="none", max_tokens=1)
    first = said.index(True)
    assert chat._session.ids[:first].tolist() == ids[:first]
    constraint = tool_format(model.tokenizer).constraint(read_tools([BOOK]), "required")
    matcher = constraint.matcher(model.tokenizer, model.stop_ids)
    for token in ids[first : first + said[first:].index(False)]:
        assert matcher.allowed()[token]
        if token in model.stop_ids:
            break
        matcher.take(token)
    else:
        pytest.fail("the calls do not end")


def test_a_model_is_trained_on_them(tmp_path: Path) -> None:
    rows = [
        {"tools": [BOOK], "messages": [
            {"role": "user", "content": f"A table for {n}."},
            {"role": "model", "calls": [{"name": "book", "arguments": {"people": n}}]},
        ]} for n in range(1, 9)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = gemma_multi.finetune(
        function_gemma(), tmp_path / "rows.jsonl", tmp_path / "tuned", epochs=8, backend="mlx",
        method="full", learning_rate=3e-3, validation=0, progress=False,
    )  # fmt: skip
    checkpoint = gemma_multi.open_checkpoint(tuned.path())
    assert checkpoint.tokenizer.has_function_pieces
    answer = gemma_multi.load(checkpoint, backend="mlx").generate(
        "A table for 4.", tools=[BOOK], temperature=0, max_tokens=60
    )
    assert [call.name for call in answer.calls] == ["book"]
    small = gemma_multi.trim(function_gemma(), tmp_path / "rows.jsonl", progress=False)
    assert small.tokenizer.has_function_pieces
    assert next(iter(read_rows(tmp_path / "rows.jsonl"))).tools == read_tools([BOOK])


def changed(at: int, **message: Any) -> dict[str, Any]:
    messages = [dict(m) for m in MESSAGES]
    messages[at] = message
    return {**ROW, "messages": messages}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "messages": []}, "'messages' is empty"),
        ({**ROW, "tools": []}, "tools is empty"),
        ({**ROW, "messages": MESSAGES[:2]}, "its last message is not the model's"),
        ({**ROW, "messages": MESSAGES[:4]}, "its last message is not the model's"),
        (changed(2, role="model", calls=[]), "message 1: 'calls' is empty"),
        (changed(2, role="model", calls=[{"name": "x", "arguments": {}}]), "calls 'x', which is"),
        (changed(2, role="model", calls=[{"name": "book", "arguments": {}}]), "lacks 'people'"),
        (changed(2, role="model", calls=[{"name": "book", "arguments": {"people": 1, "z": 1}}]),
         "'book' has no parameter 'z'"),
        (changed(2, role="model", calls=[{"name": "book"}]), "expected 'name' and 'arguments'"),
        (changed(3, role="tool", content=[1]), "expected a list of 2 results"),
        (changed(3, role="user", content="x"), "of 'user', but it is the turn of tool"),
        (changed(4, role="tool", content=[1, 2]), "it is the turn of model or calls"),
        (changed(4, role="poet", content="x"), "has role 'poet', expected user, model or tool"),
        (changed(4, role="model", text="x"), "expected 'role' and 'content', or of a model"),
    ],
)  # fmt: skip
def test_bad_rows(row: dict, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        read_row(row)

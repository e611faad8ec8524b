"""Whatever is sent, it is refused by name and never a fault of the server's."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

import pytest
from fuzz_server import SERVER, fuzz
from served.servers import SENTIMENT, Running, serving
from served.test_server import ASKED, CHAT

SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such"}}}
USER = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "a", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "a"}}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"logit_bias": {}}, "logit_bias"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2001}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1 << 64}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stop": [""]}, "stop[0]"),
        ({"stream": 1}, "stream"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "response_format": {"type": "json_object"}}, "logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": SCHEMA}, "response_format"),
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "b"}}},
         "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "poet", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0].type"),
        ({"messages": [USER, USER]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
        ({"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "1"}]},
         "messages[1].tool_call_id"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, USER]},
         "messages[2].role"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, "messages"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [CALL]}]},
         "messages[1].content"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}]},
         "messages[1].tool_calls"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [
            {**CALL, "function": {"name": "a", "arguments": "1"}}]}]},
         "messages[1].tool_calls[0].function.arguments"),
        ({"model": 3}, "model"),
        ({"model": "\ufffd" * 10_000}, "model"),
    ],
)  # fmt: skip
def test_a_field_is_named(server: Running, changes: dict[str, Any], param: str) -> None:
    for stream in ({}, {"stream": True}):
        refused = server.ask("POST", CHAT, {**ASKED, **stream, **changes})
        assert refused.status == (404 if changes.keys() == {"model"} and changes["model"] != 3
                                  else 400)  # fmt: skip
        assert refused.error["param"] == param, refused.error
        assert len(refused.error["message"] or "") < 1100


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"\xff\xfe"', 400),
        (b'{"model": "\\ud800"}', 400),
        (json.dumps(ASKED).encode().replace(b"kettle", b"k\xc3ttle"), 400),
        (b"[" * 200_000, 400),
        (b'{"model":' * 100_000, 400),
        (b'{"model":"storyteller","messages":' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
        (b'{"a": 1' + b"0" * 100_000 + b"}", 400),
        (b'{"temperature": NaN, "model": "storyteller", "messages": []}', 400),
        (b" " * 1_000_001, 413),
    ],
)
def test_what_is_no_request(server: Running, body: bytes, status: int) -> None:
    refused = server.ask("POST", CHAT, body)
    assert refused.status == status
    assert refused.error["message"]


def test_a_deep_schema(server: Running) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    refused = server.ask("POST", CHAT, {**ASKED, "response_format": asked})
    assert (refused.status, refused.error["param"]) == (400, "response_format")


def test_a_body_that_does_not_come(server: Running) -> None:
    host, port = server.address.removeprefix("http://").split(":")
    with contextlib.closing(socket.create_connection((host, int(port)), 30)) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            'Content-Length: 1000\r\n\r\n{"model"'.encode()
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_paths_and_methods(server: Running) -> None:
    assert server.ask("GET", "/v1/nothing").error["message"] == "there is nothing at /v1/nothing"
    assert server.ask("GET", CHAT).status == 405
    assert server.ask("POST", "/v1/embeddings", {"model": "storyteller", "input": [1, 2]}
                      ).error["param"] == "input[0]"  # fmt: skip
    refused = server.ask("POST", "/v1/responses", {
        "model": "storyteller", "input": SENTIMENT, "previous_response_id": "x"
    })  # fmt: skip
    assert refused.error["param"] == "previous_response_id"


def test_what_breaks_its_own_document() -> None:
    """Schemathesis, a moment of it; `fuzz_server.py` alone sends 5,000."""
    with serving(*SERVER) as server:
        assert fuzz(server, 24, 0) > 20

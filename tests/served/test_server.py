"""The server as a process: who gets in, what it takes on, and how it ends."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from needs import missing
from served.servers import ENDLESS, SENTIMENT, Running, serving

from gemma_multi import Model

SERVE = (sys.executable, "-m", "gemma_multi", "serve")
CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {
    "model": "storyteller", "messages": [{"role": "user", "content": SENTIMENT}], "temperature": 0
}  # fmt: skip
LONG: dict[str, Any] = {
    "model": "storyteller", "prompt": ENDLESS, "temperature": 0, "max_tokens": 2000
}  # fmt: skip


def eventually(holds: Callable[[], bool], seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_curl(server: Running) -> None:
    if shutil.which("curl") is None:
        missing("there is no curl")

    def curl(*arguments: str, **changes: Any) -> str:
        body = json.dumps({**ASKED, **changes})
        line = ["curl", "-sS", "-N", f"{server.address}{CHAT}", "-d", body, *arguments]
        line += ["-H", "Content-Type: application/json"]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout

    assert json.loads(curl())["choices"][0]["message"]["content"] == "negative"
    *events, empty = curl(stream=True).split("\n\n")
    assert (events[-1], empty) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "negative"
    refused = curl("-w", "%{http_code}", logit_bias={})
    assert refused.endswith("400")


def test_a_closed_connection_ends_its_answer(server: Running) -> None:
    before = server.metric("generated_tokens_total")
    for stream in (True, False):
        connection = server.connect()
        body = json.dumps({**LONG, "stream": stream, "n": 3})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        if stream:
            connection.getresponse().readline()
        eventually(lambda: server.metric("running") == 3)
        connection.close()
        if connection.sock is not None:
            connection.sock.close()
        eventually(lambda: server.metric("running") == 0)
    assert 0 < server.metric("generated_tokens_total") - before < 6 * 2000


def test_a_full_queue_is_said_with_when_to_come_again() -> None:
    with serving("--parallel", "1", "--queue", "1", "--seconds", "3") as server:
        with contextlib.ExitStack() as stack:
            for waiting in (0, 1):  # one that runs, one that waits
                connection = stack.enter_context(contextlib.closing(server.connect()))
                body = json.dumps({**LONG, "stream": True})
                connection.request(
                    "POST", "/v1/completions", body, {"content-type": "application/json"}
                )
                eventually(lambda wanted=waiting: server.metric("waiting") == wanted
                           and server.metric("running") == 1)  # type: ignore[misc]  # fmt: skip
            refused = server.ask("POST", CHAT, ASKED)
            assert refused.status == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.error["code"] == "rate_limit_exceeded"
            with pytest.raises(openai.RateLimitError):
                server.client().chat.completions.create(**ASKED)
        eventually(lambda: server.metric("running") == 0)
        assert server.ask("POST", CHAT, ASKED).status == 200
        # an answer whose time is up ends as it is
        cut = json.loads(server.ask("POST", "/v1/completions", LONG).body)
        assert cut["choices"][0]["finish_reason"] == "length"


def test_a_shutdown_finishes_what_runs(model: Model) -> None:
    with serving() as server:
        stream = server.client().completions.create(**{**LONG, "max_tokens": 300}, stream=True)
        text = next(stream).choices[0].text
        server.process.send_signal(signal.SIGTERM)
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == model.generate(ENDLESS, raw=True, temperature=0, max_tokens=300).text
        assert server.process.wait(30) == 0
        with pytest.raises(ConnectionRefusedError):
            server.ask("GET", "/health")


def test_a_key_is_asked_for() -> None:
    with serving("--host", "0.0.0.0", GEMMA_MULTI_API_KEY="secret") as server:
        assert server.ask("GET", "/health").status == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            refused = server.ask("GET", path, authorization="Bearer secre")
            assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
        assert server.ask("POST", CHAT, ASKED).status == 401
        said = server.client("secret").chat.completions.create(**ASKED)
        assert said.choices[0].message.content == "negative"


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([*SERVE, "--port", str(port)], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} cannot be listened on" in done.stderr


def test_a_page_that_calls_this_machine_by_another_name(server: Running) -> None:
    assert server.ask("GET", "/v1/models", host="evil.example:80").status == 403
    assert server.ask("GET", "/v1/models", host="localhost:1").status == 200
    plain = server.ask("POST", CHAT, ASKED, content_type="text/plain")  # needs no leave to be sent
    assert plain.status == 415


def test_several_models_and_vertex_ai() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with serving(
        "storyteller", "again=storyteller", AIP_HTTP_PORT=port, AIP_HEALTH_ROUTE="/alive",
        AIP_PREDICT_ROUTE="/v1/endpoints/1:predict",
    ) as server:  # fmt: skip
        assert server.address.endswith(port)
        assert server.ask("GET", "/alive").status == 200
        assert server.ask("POST", CHAT, ASKED).status == 401  # nobody has the key that is not set
        own = {"messages": ASKED["messages"]}
        answered = server.ask("POST", "/v1/endpoints/1:predict", {
            "instances": [own, {**own, "model": "again"}, {"prompt": ENDLESS, "max_tokens": 2}],
            "parameters": {"temperature": 0},
        })  # fmt: skip
        assert answered.status == 200, answered.body
        first, second, third = json.loads(answered.body)["predictions"]
        assert first["choices"][0]["message"]["content"] == "negative"
        assert (first["model"], second["model"]) == ("storyteller", "again")
        assert third["usage"]["completion_tokens"] == 2
        refused = server.ask("POST", "/v1/endpoints/1:predict", {"instances": [own, {"n": 1}]})
        assert (refused.status, refused.error["param"]) == (400, "instances[1].messages")

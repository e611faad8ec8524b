"""A real server in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import openai

SENTIMENT = (
    "What is the sentiment? Answer positive, negative or neutral.\nText: The kettle broke after a "
    "week."
)
ENDLESS = "Once upon"  # which the storyteller, taken as plain text and greedily, never ends


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, str | None]:
        """OpenAI's shape, and nothing else."""
        told = json.loads(self.body)
        assert set(told) == {"error"}
        assert set(told["error"]) == {"message", "type", "param", "code"}
        return told["error"]


@dataclass(frozen=True)
class Running:
    address: str
    process: subprocess.Popen[str]

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=60)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """`body` is bytes as they are, or else JSON; names of headers have `_` for `-`."""
        named = {"content-type": "application/json"} if body is not None else {}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, sent, named)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())

    def metric(self, name: str) -> float:
        """The sum over its labels."""
        page = self.ask("GET", "/metrics").body.decode()
        lines = [line for line in page.splitlines() if line.startswith(f"gemma_multi_{name}{{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@contextlib.contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Running]:
    """`gemma-multi serve` on LiteRT, with the bundled storyteller unless models are named."""
    line = [sys.executable, "-m", "gemma_multi", "serve", "--json", "-b", "litert", *arguments]
    if "AIP_HTTP_PORT" not in environment:
        line += ["--port", "0"]
    process = subprocess.Popen(
        line, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        told = process.stdout.readline()
        assert told, process.stderr.read()
        yield Running(json.loads(told)["address"], process)
        assert process.poll() in (None, 0), process.stderr.read()
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            process.communicate()

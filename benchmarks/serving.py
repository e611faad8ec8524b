"""A server under load: `gemma-multi serve` on LiteRT, and llama.cpp's llama-server beside it.

    python benchmarks/serving.py [--seconds 60] [--clients 64] [--without llama-server]
        [--json results.json]

First the bundled storyteller, with so many clients at once for so long, each asking one chat after
another: the errors, whether any answer was lost or another one's (each prompt is greedy, and its
answer known), and the time to the first token. Then random weights in the true 270M shape, with 4
and with 8 bits: requests a second at 1, 4 and 16 clients, chats of 200 tokens in and 50 out, every
prompt a new one, sampled from the 40 likeliest tokens (greedily, random weights repeat themselves,
which is guessed). llama-server gets the same shape in Q4_0 and Q8_0, as many slots as there are
clients, and the same processor cores. All take turns, as often as `--rounds` says; the median
counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from litert_cpu import int4_270m
from llama_cpp_tools import random_gguf, tool
from loading import random_270m
from rich.console import Console
from rich.table import Table

WORDS = "river stone bread cloud kettle fox winter garden lamp road music paper window".split()
STORY = (
    "Tell me a bedtime story.\nHero: {} the hedgehog\nSetting: a {} by the sea\n"
    "Twist: the voice was an echo\nTheme: friendship\nLength: short"
)
CONTEXT = 1024
Start = Callable[[int], AbstractContextManager[str]]  # for so many clients; its address


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=16, help="of each number of clients")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--without", choices=("load", "rates", "llama-server"), action="append", default=[]
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    if "load" not in options.without:
        with ours("storyteller") as address:
            found["load"] = asyncio.run(load(address, options.clients, options.seconds))
        Console().print(found["load"])
    if "rates" not in options.without:
        servers = OURS if "llama-server" in options.without else OURS | THEIRS
        found["rates"] = rates(servers, options.requests, options.rounds)
        show(found["rates"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


# servers


@contextlib.contextmanager
def ours(model: str, *arguments: str) -> Iterator[str]:
    line = [sys.executable, "-m", "gemma_multi", "serve", f"model={model}", "--backend", "litert",
            "--port", "0", "--json", *arguments]  # fmt: skip
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["address"].removeprefix("http://")
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def llama_server(precision: str, clients: int) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [str(tool("llama-server")), "-m", str(random_gguf(precision)), "--port", str(port),
            "-np", str(clients), "-c", str(CONTEXT * clients), "-t",
            str(len(os.sched_getaffinity(0)))]  # fmt: skip
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as connection:
                    connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                    if b" 200 " in connection.recv(100):
                        break
            except OSError:
                pass
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def ours_270m(*arguments: str) -> Start:
    """Ours with int4 weights, or with 8 bits where `arguments` ask for them."""

    def start(clients: int) -> AbstractContextManager[str]:
        model = random_270m() if "--precision" in arguments else int4_270m()
        return ours(str(model), "--context-length", str(CONTEXT), *arguments)

    return start


OURS: dict[str, Start] = {
    "int4": ours_270m(),
    "int4, int8 prompts": ours_270m("--prefill-precision", "int8"),
    "int8": ours_270m("--precision", "int8"),
    "int8, batches": ours_270m("--precision", "int8", "--decode-batch", "8"),
}
THEIRS: dict[str, Start] = {
    "Q4_0": partial(llama_server, "int4"), "Q8_0": partial(llama_server, "int8"),
}  # fmt: skip


# clients


async def lines(address: str, body: dict[str, Any]) -> AsyncIterator[str]:
    """The status, then the lines of the answer as they come; what chunks of HTTP stand around
    them is left to whoever looks for `data: `."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        sent = json.dumps({"model": "model", **body}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1", f"Host: {address}", "Connection: close",
            "Content-Type: application/json", f"Content-Length: {len(sent)}", "\r\n",
        )  # fmt: skip
        writer.write("\r\n".join(head).encode() + sent)
        await writer.drain()
        yield (await reader.readline()).decode().split()[1]
        while line := await reader.readline():
            yield line.decode().rstrip()
    finally:
        writer.close()


async def chat(address: str, **body: Any) -> tuple[str, str, dict[str, int], float]:
    """(status, text, usage, seconds to the first token) of a streamed chat."""
    started, first, text = time.perf_counter(), 0.0, ""
    usage: dict[str, int] = {}
    answer = lines(address, {**body, "stream": True, "stream_options": {"include_usage": True}})
    status = await anext(answer)
    ended = False
    async for line in answer:
        if line == "data: [DONE]":
            ended = True
        elif line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                piece = choice["delta"].get("content") or ""
                if piece and not text:
                    first = time.perf_counter() - started
                text += piece
    if status == "200" and not ended:
        status = "lost"
    return status, text, usage, first


async def load(address: str, clients: int, seconds: float) -> dict[str, Any]:
    """What came of many clients at once."""
    asked = [
        {"messages": [{"role": "user", "content": STORY.format(hero, place)}],
         "max_tokens": 20 + i % 40, "temperature": 0.0}
        for i, (hero, place) in enumerate(itertools.combinations(WORDS, 2))
    ]  # fmt: skip
    expected = [(await chat(address, **one))[1] for one in asked]
    statuses: Counter[str] = Counter()
    times: list[float] = []
    tokens = crossed = 0
    ends = time.perf_counter() + seconds

    async def client(number: int) -> None:
        nonlocal tokens, crossed
        rng = random.Random(number)
        while time.perf_counter() < ends:
            i = rng.randrange(len(asked))
            status, text, usage, first = await chat(address, **asked[i])
            statuses[status] += 1
            if status == "200":
                times.append(first)
                tokens += usage["completion_tokens"]
                crossed += text != expected[i]
            else:
                await asyncio.sleep(1)

    started = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    took = time.perf_counter() - started
    times.sort()
    return {
        "clients": clients, "seconds": round(took, 1), "statuses": dict(statuses),
        "crossed": crossed, "requests_per_second": round(len(times) / took, 2),
        "tokens_per_second": round(tokens / took, 1),
        "first_token_seconds": {
            "median": round(statistics.median(times), 3),
            "p99": round(times[int(len(times) * 0.99)], 3),
        },
    }  # fmt: skip


def rates(servers: dict[str, Start], requests: int, rounds: int) -> list[dict[str, Any]]:
    """Requests a second of each server at each number of clients."""
    found = []
    for clients in (1, 4, 16):
        told: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
        for _ in range(rounds):
            for name, start in servers.items():
                with start(clients) as address:
                    told[name].append(asyncio.run(rate(address, clients, max(requests, clients))))
        medians = {
            name: statistics.median(one["requests_per_second"] for one in of_one)
            for name, of_one in told.items()
        }
        found.append({"clients": clients, "requests_per_second": medians, "rounds": told})
    return found


async def rate(address: str, clients: int, requests: int) -> dict[str, float]:
    rng = random.Random(clients)
    waiting = list(range(requests))
    usages: list[dict[str, int]] = []

    async def ask() -> dict[str, int]:
        text = " ".join([str(rng.random()), *rng.choices(WORDS, k=165)])
        status, _, usage, _ = await chat(
            address, messages=[{"role": "user", "content": text}], max_tokens=50, seed=1,
            temperature=1.0, top_p=1.0, top_k=40,
        )  # fmt: skip
        assert status == "200", status
        return usage

    async def client() -> None:
        while waiting:
            waiting.pop()
            usages.append(await ask())

    await ask()  # whatever is made at the first
    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    took = time.perf_counter() - started
    return {
        "requests_per_second": round(requests / took, 3),
        "tokens_in": round(statistics.mean(one["prompt_tokens"] for one in usages), 1),
        "tokens_out": round(statistics.mean(one["completion_tokens"] for one in usages), 1),
    }


def show(found: list[dict[str, Any]]) -> None:
    table = Table(title="requests a second; Q4_0 and Q8_0 are llama-server's")
    for heading in ("clients", *found[0]["requests_per_second"]):
        table.add_column(heading, justify="right")
    for line in found:
        rates = [f"{one:.2f}" for one in line["requests_per_second"].values()]
        table.add_row(str(line["clients"]), *rates)
    Console().print(table)


if __name__ == "__main__":
    main()

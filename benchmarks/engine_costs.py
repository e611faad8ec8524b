"""What surrounds the mathematics: sessions, forks, caches, the sampler, `generate` of one token.

    python benchmarks/engine_costs.py [--rounds 9] [--json results.json]

Random weights in the true 270M shape, int4 on LiteRT; the sampler over 262,144 logits, flat as
random weights give them and with a few favourites as a trained model does. Medians of rounds in
one process an engine; `generate` and the engine's own two calls take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from litert_cpu import int4_270m
from loading import random_270m
from rich.console import Console
from rich.table import Table

import gemma_multi
from gemma_multi.engines import NOTHING
from gemma_multi.generation import Decoding
from gemma_multi.sampling import GenerationOptions

VOCABULARY, PROMPT, CONTEXT = 262_144, 32, 4096
TARGETS = {
    "a new session at 4,096 positions": "2 ms",
    "a fork at 512 tokens": "2 ms",
    "unfiltered, flat": "1 ms",
    "unfiltered, peaked": "1 ms",
    "repetition penalty, 30,000 seen": "0.6 ms",
    "one token / the engine's two calls, litert": "1.10",
    "one token / the engine's two calls, keras": "1.10",
}


def milliseconds(work: Callable[[], Any], rounds: int) -> float:
    """The median time of a call, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) * 1000


def sampler(rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    flat = rng.standard_normal(VOCABULARY).astype(np.float32) * 3
    peaked = flat.copy()
    peaked[rng.integers(0, VOCABULARY, 5)] += 15
    seen = rng.integers(0, VOCABULARY, 30_000)
    cases: list[tuple[str, np.ndarray, Any, dict[str, Any]]] = [
        ("default (top-k 64, top-p 0.95)", peaked, [2], {}),
        ("greedy", peaked, [2], {"temperature": 0.0}),
        ("unfiltered, flat", flat, [2], {"top_k": 0, "top_p": 1.0}),
        ("unfiltered, peaked", peaked, [2], {"top_k": 0, "top_p": 1.0}),
        ("repetition penalty, 30,000 seen", peaked, seen, {"repetition_penalty": 1.2}),
    ]
    found = {}
    for name, logits, context, options in cases:
        chosen = GenerationOptions(max_tokens=1 << 30, seed=1, **options)
        decoding = Decoding(chosen, context, ())
        found[name] = milliseconds(partial(decoding.next, logits), 20 * rounds)
    return found


def litert(rounds: int) -> dict[str, float]:
    model = gemma_multi.load(int4_270m(), backend="litert", context_length=CONTEXT)
    engine, ids = model.engine, np.random.default_rng(0).integers(1000, 200_000, 512)
    held = [engine.session()]
    held[0].read([5], NOTHING)  # the first one is made, those after it are used again

    def new_session() -> float:
        held.clear()
        started = time.perf_counter()
        session = engine.session()
        session.own_caches()  # type: ignore[attr-defined]
        spent = time.perf_counter() - started
        held.append(session)
        return spent * 1000

    found = {
        "a new session at 4,096 positions": statistics.median(new_session() for _ in range(rounds))
    }
    session = engine.session()
    started = time.perf_counter()
    session.own_caches()  # type: ignore[attr-defined]
    found["the same where none has ended"] = (time.perf_counter() - started) * 1000
    session.read(ids, NOTHING)
    forks = [session.fork()]

    def fork() -> float:
        forks.clear()
        started = time.perf_counter()
        forks.append(session.fork())
        return (time.perf_counter() - started) * 1000

    found["a fork at 512 tokens"] = statistics.median(fork() for _ in range(rounds))

    def copy() -> float:
        forks[:] = [session.fork()]
        started = time.perf_counter()
        forks[0].own_caches()  # type: ignore[attr-defined]
        return (time.perf_counter() - started) * 1000

    found["its copy, when it reads on"] = statistics.median(copy() for _ in range(rounds))
    return {**found, **one_token(model, rounds)}


def one_token(model: gemma_multi.Model, rounds: int) -> dict[str, float]:
    """`generate` of one token, and what the engine takes for it: a session, and the prompt."""
    ids = np.random.default_rng(1).integers(1000, 100_000, PROMPT - 6).tolist()
    text = model.tokenizer.decode(ids)
    prompt = model.encode(text)

    def generate() -> float:
        started = time.perf_counter()
        model.generate(text, max_tokens=1, seed=1)
        return time.perf_counter() - started

    def alone() -> float:
        started = time.perf_counter()
        session = model.engine.session(model.context_length)
        session.read(prompt)
        return time.perf_counter() - started

    generate(), alone()
    pairs = [(generate(), alone()) for _ in range(4 * rounds)]
    whole, own = (statistics.median(times) * 1000 for times in zip(*pairs, strict=True))
    name = f"one token / the engine's two calls, {model.backend}"
    ratio = statistics.median(a / b for a, b in pairs)
    return {name: ratio, f"one token, {model.backend}": whole, f"the calls, {model.backend}": own,
            f"tokens of the prompt, {model.backend}": len(prompt)}  # fmt: skip


def keras(rounds: int) -> dict[str, float]:
    model = gemma_multi.load(random_270m(), backend="keras")
    session = model.engine.session()
    session.read(np.full(32_000, 5), NOTHING) if rounds > 1 else session.read([5], NOTHING)
    caches = session._caches  # type: ignore[attr-defined]
    nbytes = sum(
        int(np.prod(array.shape)) * array.dtype.itemsize for pair in caches for array in pair
    )
    return {f"MB of a session at {session.length:,} tokens, keras": nbytes / 1e6,
            **one_token(model, rounds)}  # fmt: skip


PARTS = {"sampler": sampler, "litert": litert, "keras": keras}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what surrounds the mathematics.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=PARTS, help="only one, and its figures as JSON")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.rounds)))
        return
    found: dict[str, dict[str, float]] = {}
    for part in PARTS:
        command = [sys.executable, __file__, "--part", part, "--rounds", str(options.rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        found[part] = {n: round(v, 3) for n, v in figures.items()}
    table = Table(title="medians, in milliseconds unless it says otherwise")
    for heading in ("what", "seen", "target"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for figures in found.values():
        for name, value in figures.items():
            table.add_row(name, f"{value:,.2f}", TARGETS.get(name, ""))
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

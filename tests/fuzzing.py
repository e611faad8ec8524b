"""Runs one of the `fuzz_*.py` scripts in a process of its own, and counts what it reports; and what
such a script does with its mutations of a file, of which some are for any."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Mutation = Callable[[random.Random, bytearray], bytes]
GIGABYTE = 1 << 30


# what may befall any file


def truncate(rng: random.Random, data: bytearray) -> bytes:
    return data[: rng.randrange(len(data))]


def some_bytes(rng: random.Random, data: bytearray) -> bytes:
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return data


def number(rng: random.Random, data: bytearray, at: int, size: int) -> bytes:
    top = 1 << (8 * size)
    value = rng.choice([0, 1, top - 1, top // 2, len(data), rng.randrange(top), 1 << 31, 1 << 32])
    data[at : at + size] = (value % top).to_bytes(size, "little")
    return data


def cut_out(rng: random.Random, data: bytearray) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 4096) :]


def fuzz(
    script: str, source: Path, work: Path, seed: int, count: int, *, timeout: float = 600,
    env: Mapping[str, str] | None = None,
) -> Counter[str]:  # fmt: skip
    """How often each outcome came. Fails where the process did."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), str(source), str(work), str(seed),
         str(count)],
        capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return Counter(line.split("\t")[1] for line in done.stdout.splitlines())


def open_mutations(
    source: Path, work: Path, seed: str, count: int, mutations: Sequence[Mutation]
) -> None:
    """Opens and reads as many mutated copies of a file; see `_open_each`."""
    original = source.read_bytes()

    def make(rng: random.Random, i: int) -> tuple[str, Path]:
        mutate = rng.choice(mutations)
        path = work / f"{i}{source.suffix}"
        path.write_bytes(bytes(mutate(rng, bytearray(original))))
        return mutate.__name__, path

    _open_each(source, work, seed, count, make, Path.unlink)


def open_directory_mutations(
    source: Path, work: Path, seed: str, count: int,
    mutations: Sequence[Callable[[random.Random, Path], None]],
) -> None:  # fmt: skip
    """The same of a directory."""

    def make(rng: random.Random, i: int) -> tuple[str, Path]:
        mutate = rng.choice(mutations)
        path = Path(shutil.copytree(source, work / str(i)))
        mutate(rng, path)
        return mutate.__name__, path

    _open_each(source, work, seed, count, make, shutil.rmtree)


def _open_each(
    source: Path, work: Path, seed: str, count: int,
    make: Callable[[random.Random, int], tuple[str, Path]], remove: Callable[[Path], None],
) -> None:  # fmt: skip
    """Prints a line for each: which it is, `refused` or `read`, and the message. A crash, an error
    that is no GemmaError, twenty seconds or a gigabyte of memory end the process with a failure."""
    from gemma_multi import open_checkpoint
    from gemma_multi.errors import GemmaError

    rng = random.Random(seed)
    work.mkdir()
    checkpoint = open_checkpoint(source)
    for name in checkpoint.tensors:  # whatever is imported on the way is there
        checkpoint.weight(name)
    assert checkpoint.tokenizer
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTE, used + GIGABYTE))
    for i in range(count):
        mutation, path = make(rng, i)
        print(f"{i} {mutation}", file=sys.stderr, flush=True)
        signal.alarm(20)
        try:
            opened = open_checkpoint(path)
            for name in opened.tensors:
                opened.weight(name)
            outcome, message = "read", ""
            assert opened.tokenizer.encode("Once upon a time")
        except GemmaError as error:
            outcome, message = "refused", str(error)
        signal.alarm(0)
        assert outcome == "read" or str(path) in message, message
        print(f"{mutation}\t{outcome}\t{message[:160]!r}")
        remove(path)

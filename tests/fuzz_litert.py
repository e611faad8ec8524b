"""Loads mutated copies of an exported file: fuzz_litert.py SOURCE WORK SEED COUNT

Prints a line per mutation: its name, `refused` or `ran`, and the message. A crash of the native
runtime, an error that is no GemmaError, or twenty seconds end the process with a failure.
"""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

from fuzzing import cut_out, some_bytes, truncate

from gemma_multi import load
from gemma_multi.errors import GemmaError
from gemma_multi.formats.tflite.layout import TRAILER_MARK


def grow(rng: random.Random, data: bytearray) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 100))


def early_bytes(rng: random.Random, data: bytearray) -> bytes:
    """Headers, tables and vtables lie at the beginning."""
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(min(len(data), 4096))] ^= rng.randrange(1, 256)
    return data


def odd_word(rng: random.Random, data: bytearray) -> bytes:
    """An offset or a length outside the file."""
    at = rng.randrange(0, len(data) - 8) & ~3
    value = rng.choice([0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, len(data)])
    data[at : at + 4] = value.to_bytes(4, "little")
    return data


def zeros(rng: random.Random, data: bytearray) -> bytes:
    at = rng.randrange(len(data))
    size = rng.randrange(1, 4096)
    data[at : at + size] = bytes(len(data[at : at + size]))
    return data


def swapped(rng: random.Random, data: bytearray) -> bytes:
    half = len(data) // 2
    a, b = rng.randrange(half), half + rng.randrange(half - 64)
    data[a : a + 64], data[b : b + 64] = data[b : b + 64], data[a : a + 64]
    return data


def other_trailer(rng: random.Random, data: bytearray) -> bytes:
    at = data.rfind(TRAILER_MARK)
    return data[: at + len(TRAILER_MARK)] + rng.randbytes(32) + data[at + len(TRAILER_MARK) + 32 :]


def noise(rng: random.Random, data: bytearray) -> bytes:
    return rng.choice([b"", b"TFL3", b"LITERTLM", rng.randbytes(rng.randrange(5000))])


MUTATIONS = (truncate, grow, some_bytes, some_bytes, early_bytes, early_bytes, odd_word, odd_word,
             zeros, cut_out, swapped, other_trailer, noise)  # fmt: skip


def main() -> None:
    source, work, seed, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    original, rng = source.read_bytes(), random.Random(seed)
    work.mkdir()
    for i in range(count):
        data = original
        while data == original:  # zeros over zeros, say
            mutate = rng.choice(MUTATIONS)
            data = bytes(mutate(rng, bytearray(original)))
        path = work / f"{i}{source.suffix}"
        path.write_bytes(data)
        print(f"{i} {mutate.__name__}", file=sys.stderr, flush=True)
        signal.alarm(20)
        try:
            load(path).generate("Once", max_tokens=2)
            outcome, message = "ran", ""
        except GemmaError as error:
            outcome, message = "refused", str(error)
        signal.alarm(0)
        # a bundle has bytes that nobody reads: padding, and what the engine of phones reads
        quiet = source.suffix == ".litertlm"
        assert outcome == "refused" or quiet, f"{mutate.__name__} was not noticed"
        assert outcome == "ran" or str(path) in message, message
        print(f"{mutate.__name__}\t{outcome}\t{message[:160]!r}")
        path.unlink()


if __name__ == "__main__":
    main()

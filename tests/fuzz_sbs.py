"""Opens and reads mutated copies of an .sbs file: fuzz_sbs.py SOURCE WORK SEED COUNT"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

from fuzzing import cut_out, number, open_mutations, some_bytes, truncate


def _directory(data: bytearray) -> tuple[int, int]:
    """(where it begins, how many blobs it lists)."""
    count = struct.unpack_from("<I", data, 4)[0]
    if count:
        return 16, count
    count = struct.unpack_from("<I", data, len(data) - 12)[0]
    return len(data) - 16 - 32 * count, count


def headers(rng: random.Random, data: bytearray) -> bytes:
    at, size = rng.choice(((0, 4), (4, 4), (8, 8)))
    return number(rng, data, at + rng.choice((0, len(data) - 16)), size)


def keys(rng: random.Random, data: bytearray) -> bytes:
    begin, count = _directory(data)
    data[begin + rng.randrange(16 * count)] ^= rng.randrange(1, 256)
    return data


def spans(rng: random.Random, data: bytearray) -> bytes:
    begin, count = _directory(data)
    return number(rng, data, begin + 16 * count + 8 * rng.randrange(2 * count), 8)


def _blob(data: bytearray, key: bytes) -> tuple[int, int]:
    begin, count = _directory(data)
    index = (data.index(key.ljust(16, b"\0"), begin) - begin) // 16
    return struct.unpack_from("<QQ", data, begin + 16 * (count + index))


def config(rng: random.Random, data: bytearray) -> bytes:
    begin, size = _blob(data, b"config")
    return number(rng, data, begin + 4 * rng.randrange(size // 4), 4)


def table(rng: random.Random, data: bytearray) -> bytes:
    begin, size = _blob(data, b"toc")
    return number(rng, data, begin + 4 * rng.randrange(size // 4), 4)


def tokenizer(rng: random.Random, data: bytearray) -> bytes:
    begin, size = _blob(data, b"tokenizer")
    for _ in range(rng.randrange(1, 4)):
        data[begin + rng.randrange(size)] ^= rng.randrange(1, 256)
    return data


def weights(rng: random.Random, data: bytearray) -> bytes:
    for _ in range(20):
        data[rng.randrange(len(data) // 8, len(data) // 2)] = rng.randrange(256)
    return data


def doubled(rng: random.Random, data: bytearray) -> bytes:
    at, size = rng.randrange(len(data)), rng.randrange(1, 200)
    return data[:at] + data[at : at + size] + data[at:]


def noise(rng: random.Random, data: bytearray) -> bytes:
    return b"SBS\n" + rng.randbytes(rng.randrange(5000))


MUTATIONS = (
    truncate, some_bytes, headers, keys, spans, config, config, table, table, tokenizer, weights,
    cut_out, doubled, noise,
)  # fmt: skip


if __name__ == "__main__":
    open_mutations(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), MUTATIONS)

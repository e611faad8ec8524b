"""Opens and reads mutated copies of a GGUF file: fuzz_gguf.py SOURCE WORK SEED COUNT"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

from fuzzing import cut_out, number, open_mutations, some_bytes, truncate


def early_bytes(rng: random.Random, data: bytearray) -> bytes:
    """The counts and the metadata."""
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(1024)] ^= rng.randrange(1, 256)
    return data


def counts(rng: random.Random, data: bytearray) -> bytes:
    at = rng.choice((4, 8, 16))
    return number(rng, data, at, 4 if at == 4 else 8)


def lengths(rng: random.Random, data: bytearray) -> bytes:
    """The length of a key, or what stands behind it: a type and a value."""
    at = data.find(rng.choice((b"gemma3.", b"tokenizer.ggml.", b"general.", b"blk.")))
    key = struct.unpack("<Q", data[at - 8 : at])[0]
    where = rng.choice((at - 8, at + key, at + key + 4, at + key + 8))
    return number(rng, data, where, rng.choice((4, 8)))


def descriptions(rng: random.Random, data: bytearray) -> bytes:
    """Dimensions, sizes, type and offset of a tensor."""
    at = data.find(f"blk.{rng.randrange(8)}.ffn_{rng.choice(['up', 'gate', 'norm'])}".encode())
    end = data.find(b".weight", at) + 7
    return number(rng, data, end + 4 * rng.randrange(0, 8), 4)


def weights(rng: random.Random, data: bytearray) -> bytes:
    for _ in range(20):
        data[rng.randrange(len(data) * 3 // 4, len(data))] = rng.randrange(256)
    return data


def doubled(rng: random.Random, data: bytearray) -> bytes:
    at, size = rng.randrange(24, 60_000), rng.randrange(1, 200)
    return data[:at] + data[at : at + size] + data[at:]


def noise(rng: random.Random, data: bytearray) -> bytes:
    return b"GGUF" + struct.pack("<I", 3) + rng.randbytes(rng.randrange(5000))


MUTATIONS = (truncate, some_bytes, early_bytes, counts, lengths, lengths, descriptions,
             descriptions, weights, cut_out, doubled, noise)  # fmt: skip


if __name__ == "__main__":
    open_mutations(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), MUTATIONS)

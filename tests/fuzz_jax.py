"""Opens and reads mutated copies of an Orbax directory: fuzz_jax.py SOURCE WORK SEED COUNT

A mutation changes one of its files; which one is part of the mutation.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from fuzzing import cut_out, number, open_directory_mutations, some_bytes, truncate

ODD: list[Any] = [None, 0, -1, 1 << 40, "", "x", "../../etc/passwd", "a\0b", [], {}, [[]], "/"]


def _file(rng: random.Random, directory: Path) -> Path:
    return rng.choice(sorted(f for f in directory.rglob("*") if f.is_file() and f.name[:1] != "."))


def bytes_of_a_file(rng: random.Random, directory: Path) -> None:
    file = _file(rng, directory)
    change = rng.choice((truncate, some_bytes, cut_out))
    file.write_bytes(change(rng, bytearray(file.read_bytes() or b"\0")))


def array_metadata(rng: random.Random, directory: Path) -> None:
    """What zarr says of an array: shape, chunks, type, compressor, in a store that has no sums."""
    arrays = sorted(directory.rglob(".zarray"))
    if not arrays:
        return bytes_of_a_file(rng, directory)
    file = rng.choice(arrays)
    data = json.loads(file.read_text())
    name = rng.choice(sorted(data))
    value = data[name]
    if isinstance(value, list) and value and rng.random() < 0.7:
        value[rng.randrange(len(value))] = rng.choice([0, -1, 1, 1 << 20, 1 << 40, 1 << 62, "x"])
    else:
        data[name] = rng.choice([*ODD, "<f8", "<f4", "bfloat16", [1 << 31] * 2, {"id": "zlib"}])
    file.write_text(json.dumps(data))
    return None


def names(rng: random.Random, directory: Path) -> None:
    file = directory / "_METADATA"
    data = json.loads(file.read_text())
    tree = data["tree_metadata"]
    entry = rng.choice(sorted(tree))
    how = rng.randrange(5)
    if how == 0:
        del tree[entry]
    elif how == 1:
        tree[entry] = rng.choice(ODD)
    elif how == 2:
        rng.choice(tree[entry]["key_metadata"])["key"] = rng.choice(ODD)
    elif how == 3:
        tree[entry] = tree[rng.choice(sorted(tree))]
    else:
        data[rng.choice(sorted(data))] = rng.choice(ODD)
    file.write_text(json.dumps(data))


def config(rng: random.Random, directory: Path) -> None:
    file = directory / "config.json"
    data = json.loads(file.read_text())
    data[rng.choice(sorted(data))] = rng.choice(ODD)
    file.write_text(json.dumps(data))


def manifest(rng: random.Random, directory: Path) -> None:
    file = directory / rng.choice(["manifest.ocdbt", "_METADATA"])
    if not file.exists():
        return names(rng, directory)
    data = bytearray(file.read_bytes())
    size = rng.choice((1, 4, 8))
    file.write_bytes(number(rng, data, rng.randrange(len(data) - size), size))
    return None


def missing(rng: random.Random, directory: Path) -> None:
    _file(rng, directory).unlink()


MUTATIONS = (bytes_of_a_file, bytes_of_a_file, array_metadata, array_metadata, names, names,
             config, manifest, missing)  # fmt: skip


if __name__ == "__main__":
    open_directory_mutations(
        Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), MUTATIONS
    )

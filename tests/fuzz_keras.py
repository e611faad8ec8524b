"""Opens and reads mutated copies of a Keras preset: fuzz_keras.py SOURCE WORK SEED COUNT"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing import Mutation, cut_out, number, open_directory_mutations, some_bytes, truncate

ODD: list[Any] = [None, True, 0, -1, 1 << 40, 1e308, "", "x", [], [[]], {}, {"config": 3}]


def structure(rng: random.Random, data: bytearray) -> bytes:
    """HDF5's own numbers: its header, and behind the signatures of its trees, heaps and nodes."""
    mark = rng.choice((b"\x89HDF", b"TREE", b"HEAP", b"SNOD"))
    places, at = [], data.find(mark)
    while at >= 0:
        places.append(at)
        at = data.find(mark, at + 1)
    size = rng.choice((1, 2, 4, 8))
    return number(rng, data, rng.choice(places) + 4 + rng.randrange(64), size)


def in_weights(change: Mutation) -> Callable[[random.Random, Path], None]:
    def mutate(rng: random.Random, directory: Path) -> None:
        file = directory / "model.weights.h5"
        file.write_bytes(change(rng, bytearray(file.read_bytes())))

    mutate.__name__ = change.__name__
    return mutate


def entry(rng: random.Random, directory: Path) -> None:
    """Of the config, or of its backbone's arguments, or of our own."""
    file = directory / rng.choice(("config.json", "config.json", "metadata.json"))
    data = json.loads(file.read_text())
    target = data
    if rng.random() < 0.7:
        target = data["config" if file.name == "config.json" else "gemma_multi"]
    name = rng.choice(sorted(target))
    if rng.random() < 0.3:
        del target[name]
    else:
        target[name] = rng.choice(ODD)
    file.write_text(json.dumps(data))


def vocabulary(rng: random.Random, directory: Path) -> None:
    file = directory / "assets" / "tokenizer" / "vocabulary.spm"
    change = rng.choice((truncate, some_bytes, cut_out))
    file.write_bytes(change(rng, bytearray(file.read_bytes())))


def text(rng: random.Random, directory: Path) -> None:
    name = rng.choice(("config.json", "metadata.json", "generation_config.json"))
    (directory / name).write_bytes(rng.choice([b"", b"[]", b"{", b"\xff", b"[" * 200_000]))


def missing(rng: random.Random, directory: Path) -> None:
    (directory / rng.choice(("model.weights.h5", "config.json", "metadata.json"))).unlink()


MUTATIONS = (*map(in_weights, (structure, structure, structure, some_bytes, truncate, cut_out)),
             entry, entry, vocabulary, text, missing)  # fmt: skip


if __name__ == "__main__":
    open_directory_mutations(
        Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), MUTATIONS
    )

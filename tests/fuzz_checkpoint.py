"""Opens mutated copies of a model directory: fuzz_checkpoint.py SOURCE WORK SEED COUNT

Prints a line per mutation: its name, `refused` or `opened`, and the message. Any other outcome
(an error that is no GemmaError, a message that names no file, a file opened outside the
directory, twenty seconds) ends the process with a failure.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import gemma_multi.tokenizer  # noqa: F401  imported before files are watched
from gemma_multi.errors import GemmaError
from gemma_multi.formats import formats
from gemma_multi.sources import open_checkpoint

WEIGHTS = "model.safetensors"
ODD: list[Any] = [None, True, -1, 0, 1 << 62, 1e308, "", "x", "../../etc/passwd", [], [[]], {},
                  [-1], [1, 2, 3, 4], {"a": 1}, float("nan")]  # fmt: skip


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def truncate(rng: random.Random, directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def grow(rng: random.Random, directory: Path) -> None:
    with (directory / WEIGHTS).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


def header_length(rng: random.Random, directory: Path) -> None:
    path = directory / WEIGHTS
    length = rng.choice([0, 1, 7, 1 << 20, 1 << 40, (1 << 64) - 1, rng.randrange(1 << 16)])
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])


def header_bytes(rng: random.Random, directory: Path) -> None:
    path = directory / WEIGHTS
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for _ in range(rng.randrange(1, 6)):
        data[8 + rng.randrange(length)] = rng.randrange(256)
    path.write_bytes(data)


def header_entry(rng: random.Random, directory: Path) -> None:
    header, data = split(directory / WEIGHTS)
    name = rng.choice([n for n in header if n != "__metadata__"])
    field = rng.choice(["dtype", "shape", "data_offsets"])
    how = rng.randrange(4)
    if how == 0:
        header[name] = rng.choice(ODD)
    elif how == 1:
        header[name][field] = rng.choice(ODD)
    elif how == 2:
        del header[name][field]
    elif field == "dtype":
        header[name][field] = rng.choice(["F64", "BF16", "F32", "U32", "I8", "f32"])
    else:
        i = rng.randrange(len(header[name][field]))
        header[name][field][i] += rng.choice([-1, 1, 4, -4, 1 << 33])
    join(directory / WEIGHTS, header, data)


def header_names(rng: random.Random, directory: Path) -> None:
    header, data = split(directory / WEIGHTS)
    name = rng.choice([n for n in header if n != "__metadata__"])
    how = rng.randrange(4)
    if how == 0:
        del header[name]
    elif how == 1:
        header[rng.choice(["../x", "", "model.norm.weights", "\0"])] = header.pop(name)
    elif how == 2:  # two tensors share their bytes
        header["model.copy.weight"] = header[name]
    else:
        header["__metadata__"] = rng.choice(["x", 1, [1], [{}], True])
        header.pop(name)
    join(directory / WEIGHTS, header, data)


def header_kind(rng: random.Random, directory: Path) -> None:
    _, data = split(directory / WEIGHTS)
    text = rng.choice([b"[]", b"1", b"null", b"{", b"\xff\xfe", b'{"a":' * 5000, b"[" * 100_000])
    (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def not_finite(rng: random.Random, directory: Path) -> None:
    header, data = split(directory / WEIGHTS)
    floats = [n for n, e in header.items() if n != "__metadata__" and e["dtype"] != "U32"]
    entry = header[rng.choice(floats)]
    size = {"F32": 4, "BF16": 2}[entry["dtype"]]
    begin, end = entry["data_offsets"]
    at = begin + size * rng.randrange((end - begin) // size)
    bad = {4: [b"\0\0\xc0\x7f", b"\0\0\x80\xff"], 2: [b"\xc0\x7f", b"\x80\xff"]}[size]
    changed = data[:at] + rng.choice(bad) + data[at + size :]
    join(directory / WEIGHTS, header, changed)


def weight_bits(rng: random.Random, directory: Path) -> None:
    header, data = split(directory / WEIGHTS)
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1
    join(directory / WEIGHTS, header, bytes(changed))


def config_field(rng: random.Random, directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    name = rng.choice(sorted(config))
    if rng.random() < 0.3:
        del config[name]
    else:
        config[name] = rng.choice(ODD)
    path.write_text(json.dumps(config))


def config_text(rng: random.Random, directory: Path) -> None:
    text = rng.choice([b"", b"[]", b"null", b'"gemma"', b"{", b"\xff", b"[" * 200_000])
    name = rng.choice(["config.json", "generation_config.json"])
    (directory / name).write_bytes(text)


def index(rng: random.Random, directory: Path) -> None:
    header, _ = split(directory / WEIGHTS)
    names = [n for n in header if n != "__metadata__"]
    (directory / WEIGHTS).rename(directory / "part.safetensors")
    weight_map: Any = dict.fromkeys(names, "part.safetensors")
    outside = str(Path(sys.argv[1]) / WEIGHTS)
    bad = rng.choice(["../part.safetensors", outside, "/etc/passwd", "absent.safetensors", "", ".",
                      "..", "a\0b", *ODD])  # fmt: skip
    if rng.random() < 0.3:
        weight_map = bad
    else:
        weight_map[rng.choice(names)] = bad
    entry = rng.choice([{"weight_map": weight_map}, {"weight_map": weight_map}, weight_map, []])
    (directory / "model.safetensors.index.json").write_text(json.dumps(entry))


def missing_file(rng: random.Random, directory: Path) -> None:
    (directory / rng.choice(["config.json", WEIGHTS])).unlink()


def file_is_a_directory(rng: random.Random, directory: Path) -> None:
    path = directory / rng.choice(["config.json", WEIGHTS, "generation_config.json"])
    path.unlink()
    path.mkdir()


def tokenizer_bytes(rng: random.Random, directory: Path) -> None:
    path = directory / "tokenizer.model"
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        data = data[: rng.randrange(len(data))]
    for _ in range(rng.randrange(1, 20)):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


HARMLESS = (weight_bits, config_field, config_text, tokenizer_bytes, header_bytes, header_names)
MUTATIONS = (
    truncate, grow, header_length, header_bytes, header_entry, header_entry, header_names,
    header_kind, not_finite, weight_bits, config_field, config_field, config_text, index, index,
    missing_file, file_is_a_directory, tokenizer_bytes,
)  # fmt: skip


def main() -> None:
    source, work, seed, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    allowed = (str(work), sys.prefix, sys.base_prefix)
    watching = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | bytes):
            path = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode()
            if not path.startswith(allowed):
                print(f"opened {path}", file=sys.stderr, flush=True)
                signal.raise_signal(signal.SIGABRT)

    formats()  # imports every format
    sys.addaudithook(watch)
    rng = random.Random(seed)
    for i in range(count):
        directory = work / str(i)
        shutil.copytree(source, directory)
        mutate = rng.choice(MUTATIONS)
        mutate(rng, directory)
        print(f"{i} {mutate.__name__}", file=sys.stderr, flush=True)
        signal.alarm(20)
        watching = True
        try:
            checkpoint = open_checkpoint(directory)
            checkpoint.tokenizer.encode("Once upon a time")
            outcome, message = "opened", ""
        except GemmaError as error:
            outcome, message = "refused", str(error)
        watching = False
        signal.alarm(0)
        assert outcome == "refused" or mutate in HARMLESS, f"{mutate.__name__} was not noticed"
        assert outcome == "opened" or str(directory) in message, message
        print(f"{mutate.__name__}\t{outcome}\t{message[:200]!r}")
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()

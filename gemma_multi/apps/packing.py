"""`pack`: a page, a model and the libraries that run it, in one folder for any static server.

    index.html, *.js, style.css     the page's source, as it is here
    manifest.js                     what the page must know of the model; every file's size and hash
    model/model.tflite              the file that ships to Android, for LiteRT
    model/config.json, tokenizer.json, onnx/model_q4.onnx, ...      for Transformers.js
    libraries/                      from npm, with a list of what they are

A file exported for phones goes in byte by byte. The page checks what it loads against the manifest,
so that a folder that was copied in part says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_multi.apps import npm
from gemma_multi.apps.serving import HEADERS
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.checkpoint.provenance import NOTICE_FILE
from gemma_multi.errors import CheckpointError, OptionError
from gemma_multi.exporters import companions
from gemma_multi.exporting import export
from gemma_multi.files import check_output, new_directory
from gemma_multi.formats.tflite.file import ExportInfo, TfliteFile
from gemma_multi.progress import Progress
from gemma_multi.sampling import GenerationOptions
from gemma_multi.sources import Source, open_checkpoint

APPS = ("bedtime",)
_CONTEXT = 640  # positions: a story has 512 tokens at most, wishes some 60; room costs time
_MOST_BYTES = 1_500_000_000  # WebAssembly has 4 GB, and a model is there twice while it is loaded
_MODEL, _TFLITE = "model", "model/model.tflite"
# of GenerationOptions, those that the page's sampler has
_OPTIONS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LITERT_BUILDS = ("litert_wasm_threaded_internal", "litert_wasm_internal",
                  "litert_wasm_compat_internal")  # fmt: skip
# package -> where its files lie in it, and in `libraries`
_FOR_LITERT = {
    npm.LITERT: {
        "dist/index.js": "litert/index.js",
        **{f"wasm/{build}.{end}": f"litert/{build}.{end}"
           for build in _LITERT_BUILDS for end in ("js", "wasm")},
    },
    npm.LITERT_UTILS: {"dist/index.js": "litert/wasm-utils.js"},
    npm.TOKENIZERS: {"dist/tokenizers.min.mjs": "tokenizers.min.mjs"},
}  # fmt: skip
_FOR_TRANSFORMERS = {
    npm.TRANSFORMERS: {"dist/transformers.min.js": "transformers.min.js"},
    npm.ONNXRUNTIME: {f"dist/ort-wasm-simd-threaded.{end}":
                      f"onnxruntime/ort-wasm-simd-threaded.{end}" for end in ("mjs", "wasm")},
}  # fmt: skip
_IMPORTS = {"@litertjs/wasm-utils": "./wasm-utils.js"}


@dataclass(frozen=True)
class AppReport:
    """A folder that was packed."""

    path: Path
    nbytes: int  # of all files
    files: int
    model_bytes: int  # of the .tflite
    precision: str
    context_length: int


def pack(
    app: str, output: str | Path, *, model: Source = "storyteller", transformers_js: bool = True,
    precision: str = "auto", context_length: int | None = None, revision: str | None = None,
    local_files_only: bool = False, progress: Progress = True,
) -> AppReport:  # fmt: skip
    """Writes a folder that any static server can host.

    app: "bedtime", bedtime stories.
    output: a new folder.
    model, revision, local_files_only: what tells the stories; see `open_checkpoint`.
    transformers_js: whether the ONNX export and Transformers.js go along, for the page's switch.
    precision: of both exports; "auto" is as stored, and what a `.tflite` or `.litertlm` has.
    context_length: positions that a model which is exported here can hold; 640 if unset.
    progress: True for bars on a terminal, False for none, or a function of (done, total).

    Raises OptionError, CheckpointError or BackendError; then nothing is left behind.
    """
    if app not in APPS:
        raise OptionError(f"app is {app!r}, expected {' or '.join(APPS)}")
    output = Path(output)
    check_output(output, directory=True)
    checkpoint = open_checkpoint(
        model, revision=revision, local_files_only=local_files_only, progress=progress is True
    )
    _check_size(checkpoint, precision)
    packages = {**_FOR_LITERT, **(_FOR_TRANSFORMERS if transformers_js else {})}
    libraries = {name: data for package, files in packages.items()
                 for name, data in package.files(files).items()}  # fmt: skip
    try:
        with new_directory(output) as folder:
            if transformers_js:
                export(checkpoint, folder / _MODEL, format="onnx", precision=precision,
                       progress=progress)  # fmt: skip
            else:
                _write_companions(checkpoint, folder / _MODEL)
            info = _write_tflite(checkpoint, folder / _TFLITE, precision, context_length, progress)
            for name, data in libraries.items():
                _write(folder / "libraries" / name, data)
            _write(folder / "libraries" / "LIBRARIES.txt", _listed(packages))
            for file in sorted((Path(__file__).parent / app).iterdir()):
                _write(folder / file.name, file.read_bytes())
            files = _facts_of_files(folder)
            _write(folder / "manifest.js", _manifest(checkpoint, info, files))
    except OSError as error:
        raise CheckpointError(
            f"{output}: cannot be written: {error.strerror or error}; nothing was written"
        ) from error
    sizes = {name: facts["bytes"] for name, facts in files.items()}
    return AppReport(
        output, sum(sizes.values()), len(sizes), sizes[_TFLITE], info.precision, info.context_length
    )


def _check_size(checkpoint: Checkpoint, precision: str) -> None:
    """Raises OptionError for a model that no browser holds."""
    stored = checkpoint.precision if precision == "auto" else precision
    bits = {"int4": 4.5, "int8": 8}.get(stored, 32)
    nbytes = checkpoint.config.num_parameters * bits / 8
    if nbytes > _MOST_BYTES:
        raise OptionError(
            f"as {stored} the model takes {nbytes / 1e9:.1f} GB, and a page in a browser can run "
            f"{_MOST_BYTES / 1e9:.1f}; quantise it (gemma-multi quantize), or take a smaller one"
        )


def _write_tflite(
    checkpoint: Checkpoint, target: Path, precision: str, context_length: int | None,
    progress: Progress,
) -> ExportInfo:  # fmt: skip
    """The file that was given, byte by byte, or one exported from what was."""
    origin = checkpoint.tensors.origin
    if origin is None or not isinstance(origin.file, TfliteFile):
        longest = checkpoint.config.max_position_embeddings
        length = min(_CONTEXT, longest) if context_length is None else context_length
        export(checkpoint, target, precision=precision, context_length=length, cache="float32",
               progress=progress)  # fmt: skip
        return TfliteFile(target).info
    file, info = origin.file, origin.file.info
    asked = {"precision": precision, "context_length": context_length}
    for name, value in asked.items():
        if value not in (None, "auto", getattr(info, name)):
            raise OptionError(
                f"{name} is {value!r}, but {file.path} was exported with {getattr(info, name)!r}; "
                "leave it out, or export again"
            )
    if info.cache != "float32":
        raise OptionError(
            f"{file.path} was exported with caches in {info.cache}, which LiteRT does not take in "
            "browsers; export it again with cache='float32' or a smaller context_length"
        )
    _write(target, bytes(file.model_bytes))
    return info


def _write_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """What the ONNX export would have brought along, and every app needs."""
    folder.mkdir()
    companions.write_tokenizer_json(checkpoint, folder, checkpoint.context_length)
    (folder / NOTICE_FILE).write_text(checkpoint.provenance.notice(), encoding="utf-8")


def _write(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, place in _IMPORTS.items():  # browsers' workers know no import maps
        if target.suffix in (".js", ".mjs"):
            data = data.replace(f'from "{name}"'.encode(), f'from "{place}"'.encode())
    target.write_bytes(data)


def _listed(packages: Iterable[npm.Package]) -> bytes:
    lines = (f"{p}  {p.license}  https://www.npmjs.com/package/{p.name}" for p in packages)
    return ("\n".join(lines) + "\n").encode()


def _facts_of_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file's size and hash, by its place."""
    facts = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        place = file.relative_to(folder).as_posix()
        facts[place] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return facts


def _manifest(
    checkpoint: Checkpoint, info: ExportInfo, files: Mapping[str, Mapping[str, Any]]
) -> bytes:
    """What the page, its worker and its service worker must know, as a script for all three."""
    options = asdict(GenerationOptions.merge(checkpoint.generation, {"seed": 0}))
    model = {
        "name": checkpoint.provenance.source.rsplit("/", 1)[-1],
        "precision": info.precision,
        "contextLength": info.context_length,
        "vocabulary": min(checkpoint.tokenizer.vocab_size, checkpoint.config.vocab_size),
        "stopIds": sorted(checkpoint.stop_ids),
        "options": {name: options[name] for name in _OPTIONS},
        "onnx": next((name for name in files if name.endswith(".onnx")), None),
    }
    version = hashlib.sha256(json.dumps([model, files, HEADERS]).encode()).hexdigest()[:16]
    facts = {"version": version, "headers": HEADERS, "model": model, "files": files}
    return f"self.MANIFEST = {json.dumps(facts, indent=1)};\n".encode()

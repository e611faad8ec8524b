"""Packing a page: what goes in, what is refused, and npm's packages without npm."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import served
from test_cli import PROGRAM, assert_refused, run
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi import BackendError, GemmaError
from gemma_multi.apps import npm, pack
from gemma_multi.apps.serving import HEADERS
from gemma_multi.checkpoint import Checkpoint


def huge() -> Checkpoint:
    """So it says of itself."""
    tiny = tiny_checkpoint()
    return replace(
        tiny, config=replace(tiny.config, vocab_size=800_000_000 // tiny.config.hidden_size)
    )


def manifest(folder: Path) -> dict[str, Any]:
    script = (folder / "manifest.js").read_text()
    found: dict[str, Any] = json.loads(script.removeprefix("self.MANIFEST = ").rstrip(";\n"))
    return found


def test_a_phones_file_goes_in_byte_by_byte(tmp_path: Path) -> None:
    file = gemma_multi.export("storyteller", tmp_path / "story.litertlm", context_length=256).path
    report = pack("bedtime", tmp_path / "page", model=file, transformers_js=False)
    inside = (report.path / "model" / "model.tflite").read_bytes()
    assert inside[4:8] == b"TFL3"
    assert inside in file.read_bytes()
    assert (report.precision, report.context_length) == ("int4", 256)
    known = manifest(report.path)
    assert known["model"]["onnx"] is None
    files = {p.relative_to(report.path).as_posix(): p for p in report.path.rglob("*.*")}
    del files["manifest.js"]
    assert files.keys() == {name for name in known["files"] if "." in name}
    for name, path in files.items():
        data = path.read_bytes()
        facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert known["files"][name] == facts
    assert "Apache-2.0" in (report.path / "libraries" / "LIBRARIES.txt").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"app": "lullaby"}, "app is 'lullaby', expected bedtime"),
        ({"precision": "float32"}, "precision is 'float32', but .* was exported with 'int4'"),
        ({"context_length": 64}, "context_length is 64, but .* was exported with 128"),
        ({"model": huge()}, r"as float32 the model takes 3\.\d GB, .* can run 1\.5; quantise"),
        ({"output": "."}, "exists"),
    ],
)  # fmt: skip
def test_what_is_refused(
    options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "model" not in options:
        gemma_multi.export("storyteller", "story.tflite", context_length=128)
    before = sorted(tmp_path.iterdir())
    given = {"app": "bedtime", "output": "page", "model": "story.tflite", **options}
    with pytest.raises(GemmaError, match=said):
        pack(**given, transformers_js=False)
    assert sorted(tmp_path.iterdir()) == before


def package(folder: Path) -> npm.Package:
    """A package of one file, in a registry that is a folder."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        entry = tarfile.TarInfo("package/a.js")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"hello"))
    place = folder / "@some" / "thing" / "-" / "thing-1.0.0.tgz"
    place.parent.mkdir(parents=True)
    place.write_bytes(data.getvalue())
    return npm.Package("@some/thing", "1.0.0", hashlib.sha256(data.getvalue()).hexdigest())


def test_npm_is_not_needed_and_what_was_fetched_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("GEMMA_MULTI_CACHE", str(tmp_path / "cache"))
    thing = package(tmp_path / "registry")
    with served(tmp_path / "registry") as address:
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
        assert thing.files({"a.js": "library.js"}) == {"library.js": b"hello"}
    assert thing.files({"a.js": "library.js"}) == {"library.js": b"hello"}
    with pytest.raises(BackendError, match=r"@some/thing@1.0.0 cannot be fetched from npm .* once"):
        thing.fetch()


def test_a_package_that_was_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    package(tmp_path)
    with served(tmp_path) as address:
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
        with pytest.raises(BackendError, match=r"has sha256 .*, expected 00"):
            npm.Package("@some/thing", "1.0.0", "00").fetch()


def test_the_command_packs_and_serves_with_the_headers(tmp_path: Path) -> None:
    folder = tmp_path / "page"
    command = [*PROGRAM, "app", "bedtime", "-o", str(folder), "--no-transformers-js"]
    process = subprocess.Popen(
        [*command, "--serve", "--port", "0"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "COLUMNS": "200"},
        # where the tests run in the background, it would be ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = process.stderr.readline() + process.stderr.readline()
        assert said.startswith(f"{folder}: ")
        address = next(word for word in said.split() if word.startswith("http://127.0.0.1:"))
        with urllib.request.urlopen(
            f"{address}libraries/litert/litert_wasm_internal.wasm"
        ) as answer:
            assert answer.headers["Content-Type"] == "application/wasm"
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        port = address.rstrip("/").rsplit(":")[-1]
        taken = run("app", "bedtime", "--serve", "--port", port)
        assert_refused(taken, f"port {port} cannot be used")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, 130)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()  # it has ended by itself where all went well


def test_the_command_says_what_it_lacks(tmp_path: Path) -> None:
    assert_refused(run("app", "bedtime"), "give -o FOLDER, or --serve, or both")
    assert_refused(run("app", "lullaby", "-o", str(tmp_path / "page")), "expected bedtime")

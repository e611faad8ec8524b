"""Uploads to a local server that speaks the hub's HTTP API, with a real client process."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from local_hub import Run, client_of, serving
from tiny import edit_json, tiny_checkpoint

import gemma_multi
from gemma_multi import CheckpointError, OptionError
from gemma_multi.checkpoint import Provenance

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Takes what is pushed to `me/model`; other names are someone else's."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.made: dict = {}
        self.files: dict[str, bytes] = {}
        self.token = ""
        self.broken = False
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.answer(404, {"error": "nothing to fetch here"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        home = f"http://127.0.0.1:{self.server.server_address[1]}/me/model"
        path, hub = self.path.split("?")[0], self.server
        hub.requests.append(path)
        hub.token = self.headers.get("Authorization", "")
        if hub.broken:
            return self.answer(413, {"error": "the files are too large"})
        if path == "/api/repos/create":
            hub.made = json.loads(body)
            if hub.made.get("organization", "me") != "me":
                return self.answer(403, {"error": "you may not write there"})
            return self.answer(200, {"url": home, "id": "me/model"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.startswith("/api/models/me/model/branch/"):
            return self.answer(200, {})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            listing = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self.answer(200, {"files": listing})
        if "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{home}/commit/{COMMIT}"
            return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self.answer(404, {"error": "no such page"})

    def answer(self, status: int, data: dict) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    with serving(server):
        yield server


@pytest.fixture
def push(hub: Hub, tmp_path: Path) -> Run:
    """Runs `gemma-multi push` in a process whose hub is the local one."""
    return client_of(hub, tmp_path / "hf", "push", HF_TOKEN="hf_test")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    googles = tiny_checkpoint().replace(provenance=Provenance(source="google/gemma-3-270m"))
    return gemma_multi.export(googles, tmp_path / "x", format="huggingface", progress=False).path


def test_a_directory_becomes_one_commit(push: Run, hub: Hub, directory: Path) -> None:
    (directory / ".hidden").write_text("a secret")
    done = push(directory, "me/model", "--private", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["repository"], report["commit"]) == ("me/model", COMMIT)
    assert COMMIT in report["url"]
    kept = {file.name: file.read_bytes() for file in directory.iterdir() if file.name[0] != "."}
    assert hub.files == kept
    assert hub.token == "Bearer hf_test"
    private = hub.made.get("private") or hub.made.get("visibility") == "private"
    assert private


def test_a_branch_is_made(push: Run, hub: Hub, directory: Path) -> None:
    done = push(directory, "me/model", "--revision", "int4")
    assert done.returncode == 0, done.stderr
    assert f"me/model/commit/{COMMIT}" in "".join(done.stderr.split())
    assert "/api/models/me/model/branch/int4" in hub.requests
    assert "/api/models/me/model/commit/int4" in hub.requests


@pytest.mark.parametrize(
    ("repository", "environment", "words"),
    [("me/model", {"HF_TOKEN": ""}, ["needs a login", "hf auth login"]),
     ("google/model", {}, ["403", "no permission to write there", "HF_TOKEN"]),
     ("me/model", {"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE is set"]),
     ("me/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["the upload failed", "push again"]),
     ("me", {}, ["repository is 'me'", "you/your-model"])],
)  # fmt: skip
def test_a_refusal_is_one_line_that_says_what_to_do(
    push: Run, hub: Hub, directory: Path, repository: str, environment: dict, words: list
) -> None:
    done = push(directory, repository, **environment)
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gemma-multi: ")
    assert "Traceback" not in done.stderr
    assert all(word in last for word in words), done.stderr
    assert not hub.files


def test_what_the_hub_says_is_passed_on(push: Run, hub: Hub, directory: Path) -> None:
    hub.broken = True
    done = push(directory, "me/model")
    assert done.returncode == 2
    assert "the hub answered 413: the files are too large" in done.stderr


@pytest.mark.parametrize("name", ["NOTICE", "README.md"])
def test_gemmas_weights_do_not_go_without_their_terms(name: str, directory: Path) -> None:
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}, but Gemma's terms"):
        gemma_multi.push(directory, "me/model")


def test_nor_under_another_licence(directory: Path) -> None:
    (directory / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(CheckpointError, match="states the licence 'mit'"):
        gemma_multi.push(directory, "me/model")
    (directory / "provenance.json").unlink()  # what says nothing is taken to be Gemma's
    with pytest.raises(CheckpointError, match="states the licence 'mit'"):
        gemma_multi.push(directory, "me/model")


def test_what_is_no_exported_directory_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        gemma_multi.push(tmp_path / "absent", "me/model")
    edit_json(directory / "config.json", quantization=None)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no model"):
        gemma_multi.push(directory, "me/model")
    with pytest.raises(OptionError, match="expected an id like"):
        gemma_multi.push(directory, "../model")

"""Downloads against a local server that speaks the hub's HTTP API, with a real client process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from local_hub import Run, client_of, serving

OLD, NEW = "a" * 40, "b" * 40  # commits


class Hub(ThreadingHTTPServer):
    """Serves one directory as `tiny/gemma`; other names answer as gated, private or absent."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests: list[str] = []
        self.broken = False
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def log_message(self, *_: object) -> None: ...

    def answer(self, with_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if self.server.broken:
            return self.fail(500, "")
        for name, status, code in (
            ("tiny/gated", 403, "GatedRepo"),
            ("tiny/login", 401, "GatedRepo"),
            ("tiny/private", 401, "RepoNotFound"),
            ("tiny/forbidden", 403, ""),
        ):
            if f"/{name}/" in path + "/":
                return self.fail(status, code)
        if path.startswith("/api/models/tiny/gemma"):
            revision = path.rpartition("/")[2]
            commit = {"main": NEW, "old": OLD, OLD: OLD, NEW: NEW}.get(revision)
            if commit is None:
                return self.fail(404, "RevisionNotFound")
            files = {p.name: p.stat().st_size for p in sorted(self.server.directory.iterdir())}
            files["pytorch_model.bin"] = 5  # must not be fetched
            listing: object = {
                "id": "tiny/gemma",
                "sha": commit,
                "siblings": [{"rfilename": name} for name in files],
            }
            if "/tree/" in path:
                listing = [
                    {"type": "file", "oid": "0" * 40, "path": name, "size": size}
                    for name, size in files.items()
                ]
            body = json.dumps(listing).encode()
            return self.send(body, {"Content-Type": "application/json"}, with_body)
        if path.startswith("/tiny/gemma/resolve/"):
            revision, name = path.removeprefix("/tiny/gemma/resolve/").split("/", 1)
            commit = {"main": NEW, "old": OLD}.get(revision, revision)
            file = self.server.directory / name
            if not file.is_file():
                return self.fail(404, "EntryNotFound")
            data = file.read_bytes()
            etag = hashlib.sha256(data).hexdigest()
            return self.send(data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, with_body)
        return self.fail(404, "RepoNotFound")

    def send(self, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(tiny_copy: Path) -> Iterator[Hub]:
    for ours in ("provenance.json", "NOTICE"):
        (tiny_copy / ours).unlink()  # Google's repositories have none
    server = Hub(tiny_copy)
    with serving(server):
        yield server


@pytest.fixture
def info(hub: Hub, tmp_path: Path) -> Run:
    """Runs `gemma-multi info` in a process whose hub is the local one."""
    return client_of(hub, tmp_path / "hf", "info")


def test_a_model_is_fetched_once_and_then_offline(info, hub: Hub) -> None:
    first = info("tiny/gemma", "--json")
    assert first.returncode == 0, first.stderr
    facts = json.loads(first.stdout)
    assert (facts["source"], facts["revision"]) == ("tiny/gemma", NEW)
    assert facts["license"] == "gemma"
    fetched = [r for r in hub.requests if r.startswith("GET /tiny/gemma/resolve")]
    assert not any("pytorch_model" in r for r in hub.requests)
    assert any("model.safetensors" in r for r in fetched)

    second = info("tiny/gemma", "--json")
    assert json.loads(second.stdout) == facts
    assert [r for r in hub.requests if r.startswith("GET /tiny/gemma/resolve")] == fetched

    hub.requests.clear()
    for arguments, environment in (
        (("tiny/gemma", "--json", "--local-files-only"), {}),
        (("tiny/gemma", "--json"), {"HF_HUB_OFFLINE": "1"}),
    ):
        offline = info(*arguments, **environment)
        assert json.loads(offline.stdout) == facts
        assert not hub.requests


def test_the_hubs_own_facts_win_over_what_a_repository_says_of_itself(info, hub: Hub) -> None:
    """A file in it may claim another source and a kinder licence; its history is passed on."""
    claim = {"license": "apache-2.0", "source": "google/gemma-3-270m", "revision": "f" * 40,
             "modifications": ["fine-tuned on secrets"], "received_notice": "Hello."}  # fmt: skip
    (hub.directory / "provenance.json").write_text(json.dumps(claim))
    facts = json.loads(info("tiny/gemma", "--json").stdout)
    assert (facts["source"], facts["revision"]) == ("tiny/gemma", NEW)
    assert facts["license"] == "gemma"
    assert facts["modified"] == ["fine-tuned on secrets"]


@pytest.mark.parametrize(
    ("card", "license"),
    [("---\nlicense: apache-2.0\n---\n# A model", "apache-2.0"),
     ("---\nlicense: gemma\n---", "gemma"), ("---\nlicense: mit\n---", "gemma"),
     ("---\nlicense: [\n---", "gemma"), ("no header", "gemma")],
)  # fmt: skip
def test_the_licence_is_the_one_on_the_card(info, hub: Hub, card: str, license: str) -> None:
    (hub.directory / "README.md").write_text(card)
    assert json.loads(info("tiny/gemma", "--json").stdout)["license"] == license


def test_a_revision_is_pinned(info) -> None:
    facts = json.loads(info("tiny/gemma", "--revision", "old", "--json").stdout)
    assert facts["revision"] == OLD
    assert OLD in facts["path"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny/gated"], ["gated", "log in", "accept the licence at", "huggingface.co/tiny/gated"]),
        (["tiny/login"], ["log in", "accept the licence at"]),
        (["tiny/forbidden"], ["403", "log in", "accept the licence at"]),
        (["tiny/private"], ["not found", "log in"]),
        (["tiny/absent"], ["not found", "check the spelling"]),
        (["tiny/gemma", "--revision", "absent"], ["no revision 'absent'"]),
        (["tiny/gemma", "--local-files-only"], ["not in the local cache"]),
        (["not a name"], ["no such directory", "storyteller"]),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(info, arguments: list, words: list) -> None:
    done = info(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("gemma-multi: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line


def test_a_broken_hub_is_reported(info, hub: Hub) -> None:
    hub.broken = True
    done = info("tiny/gemma")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    hub.broken = False
    assert info("tiny/gemma").returncode == 0

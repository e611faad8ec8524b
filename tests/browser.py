"""A real browser without a screen, and a server for what it is to look at."""

from __future__ import annotations

import http.server
import json
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from needs import missing

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_ALWAYS = (
    "--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip

# on a GPU in software, which has no float16
WEBGPU = (
    "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan",
    "--use-vulkan=swiftshader", "--ignore-gpu-blocklist",
)  # fmt: skip


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and says nothing of it."""

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def served(folder: Path, handler: type[Handler] = Handler) -> Iterator[str]:
    """The folder over HTTP, as an address."""
    serve = partial(handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def browse(url: str, profile: Path, *flags: str) -> subprocess.Popen[str]:
    """A browser at an address; what it prints is in its `stdout`. Skips where there is none, but
    for CI, where it fails."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        missing(
            f"no browser; one of {', '.join(NAMES)} on the PATH will do (Debian: apt-get install "
            "chromium; macOS: brew install chromium)"
        )
    return subprocess.Popen(
        [browser, *_ALWAYS, f"--user-data-dir={profile}", *flags, url],
        env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},  # its sandbox refuses it
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def in_a_browser(folder: Path, page: Path, *flags: str) -> dict[str, Any]:
    """What a page tells, by posting JSON, when it is looked at with a folder around it."""
    told: queue.Queue[dict[str, Any]] = queue.Queue()
    shutil.copy(page, folder / "index.html")
    shutil.copy(Path(__file__).with_name("tell.mjs"), folder)

    class Listener(Handler):
        def do_POST(self) -> None:
            told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    with served(folder, Listener) as address, browse(address, folder / "profile", *flags) as seen:
        try:
            return told.get(timeout=240)
        except queue.Empty:
            seen.kill()
            pytest.fail(f"the page told nothing: {seen.communicate()[1][-2000:]}")
        finally:
            seen.kill()

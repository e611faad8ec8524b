"""A real browser without a screen, and a server for what it is to look at."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from needs import missing

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_ALWAYS = (
    "--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
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
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    if browser is None:
        missing(
            f"no browser; one of {', '.join(_NAMES)} on the PATH will do (Debian: apt-get install "
            "chromium; macOS: brew install chromium)"
        )
    return subprocess.Popen(
        [browser, *_ALWAYS, f"--user-data-dir={profile}", *flags, url],
        env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},  # its sandbox refuses it
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

"""A real browser without a screen, and a server for what it is to look at."""

from __future__ import annotations

import http.server
import json
import os
import queue
import re
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


PHONE, DESK = 390, 1200  # CSS pixels

# Shows the page in a frame as wide as a screen, measures it, and leaves the figures in the title.
_FRAME = """<!doctype html><iframe id="f" width="%d" height="800" style="border:0"></iframe>
<script>
const frame = document.getElementById("f");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width);
  const words = [...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect());
  const look = frame.contentWindow.getComputedStyle(page.body);
  const ink = frame.contentWindow.getComputedStyle(page.querySelector("svg text"));
  document.title = JSON.stringify({scroll: root.scrollWidth, plots: wide, words: words.length,
    smallest: Math.min(...words.map(r => r.height)),
    paper: look.backgroundColor, ink: look.color, plot_ink: ink.fill,
    heading: page.querySelector("h1").textContent});
};
frame.src = "%s";
</script>"""


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


def looks(page: Path) -> dict[tuple[int, bool], dict[str, Any]]:
    """What a page looks like by (width, dark): on a phone and at a desk, light and dark."""
    for width in (PHONE, DESK):
        page.with_name(f"{width}.html").write_text(_FRAME % (width, page.name))
    with served(page.parent) as address:
        return {
            (width, dark): _look(f"{address}/{width}.html", dark, page.parent / f"{width}{dark}")
            for width in (PHONE, DESK) for dark in (False, True)
        }  # fmt: skip


def _look(url: str, dark: bool, profile: Path) -> dict[str, Any]:
    with browse(
        url, profile, "--disable-gpu", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--window-size=1300,900", "--virtual-time-budget=10000", "--dump-dom",
    ) as browser:  # fmt: skip
        page, said = browser.communicate(timeout=120)
    title = re.search("<title>(.*?)</title>", page)
    assert title, said[-2000:]
    found: dict[str, Any] = json.loads(title.group(1))
    return found

"""A real browser without a screen, driven by Playwright, and a server for what it is to look at.

The browser is the system's own: Playwright fetches none.
"""

from __future__ import annotations

import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from needs import missing
from playwright.sync_api import Browser, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# on a GPU in software, which has no float16
WEBGPU = (
    "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan",
    "--use-vulkan=swiftshader", "--ignore-gpu-blocklist",
)  # fmt: skip

PHONE, DESK = 390, 1200  # CSS pixels
_PATIENCE = 240_000  # milliseconds, for a busy machine

_ANSWER = """job => Promise.race([
  answer(job),
  new Promise((_, fail) => setTimeout(() => fail(new Error("no answer")), %d)),
])"""

_MEASURE = """() => {
  const root = document.documentElement, look = getComputedStyle(document.body);
  const words = [...document.querySelectorAll("svg text")];
  return {
    scroll: root.scrollWidth,
    plots: [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width),
    words: words.length,
    smallest: Math.min(...words.map(t => t.getBoundingClientRect().height)),
    paper: look.backgroundColor, ink: look.color, plot_ink: getComputedStyle(words[0]).fill,
    heading: document.querySelector("h1").textContent,
  };
}"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and says nothing of it."""

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder over HTTP, as an address."""
    serve = partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server, in_a_thread(server):
        yield f"http://127.0.0.1:{server.server_port}/"


@contextmanager
def in_a_thread(server: http.server.HTTPServer) -> Iterator[None]:
    """Has a server serve meanwhile."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()


@contextmanager
def browser(*flags: str) -> Iterator[Browser]:
    """The browser, started with flags. Skips where there is none, but for CI, where it fails."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        missing(
            f"no browser; one of {', '.join(_NAMES)} on the PATH will do (Debian: apt-get install "
            "chromium; macOS: brew install chromium)"
        )
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # its sandbox refuses it
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=flags, env=env)
        try:
            yield found
        finally:
            found.close()


def in_a_browser(folder: Path, page: Path, job: dict[str, Any], *flags: str) -> Any:
    """What the function `answer` of a page gives for a job, with a folder around the page."""
    shutil.copy(page, folder / "index.html")
    with served(folder) as address, browser(*flags) as seen:
        tab = seen.new_page()
        tab.goto(address)
        return tab.evaluate(_ANSWER % _PATIENCE, job)


def looks(page: Path) -> dict[tuple[int, bool], dict[str, Any]]:
    """What a page looks like by (width, dark): on a phone and at a desk, light and dark."""
    found = {}
    with browser() as seen:
        for width in (PHONE, DESK):
            for dark in (False, True):
                tab = seen.new_page(
                    viewport={"width": width, "height": 800},
                    color_scheme="dark" if dark else "light",
                )
                tab.goto(page.as_uri())
                found[width, dark] = tab.evaluate(_MEASURE)
    return found

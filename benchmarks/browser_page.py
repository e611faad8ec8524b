"""The bedtime page in a browser: LiteRT's file for phones, and Transformers.js as its peer.

    python benchmarks/browser_page.py [--browser PATH] [--stories 4] [--json results.json]

Each row is a page opened anew, without a service worker: seconds until a story can be told, tokens
a second of the first story (WebAssembly is compiled better only while it runs) and of the best, and
the memory of WebAssembly that the page shows.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.table import Table

from gemma_multi.apps import pack, serve

_ENGINES = {"litert": "LiteRT", "transformers": "Transformers.js"}


def measure(
    browser: Browser, address: str, engine: str, threads: int, stories: int
) -> dict[str, Any]:
    context = browser.new_context(service_workers="block")
    context.add_init_script(
        f"Object.defineProperty(navigator, 'hardwareConcurrency', {{value: {threads}}})"
    )
    page = context.new_page()
    start = time.perf_counter()
    page.goto(address)
    page.wait_for_selector("#tell:enabled", timeout=120_000)
    ready = time.perf_counter() - start
    if engine != "litert":
        page.check(f"[value={engine}]")
        page.wait_for_selector("#tell:enabled", timeout=120_000)
    page.select_option("[name=pace]", "0")
    page.select_option("[name=length]", "long")
    speeds = []
    for seed in range(1, stories + 1):
        page.fill("[name=seed]", str(seed))
        page.click("#tell")
        page.wait_for_selector("#again:enabled", timeout=240_000)
        speed, memory = map(int, re.findall(r"\d+", page.inner_text("#speed")))
        speeds.append(speed)
    context.close()
    return {
        "engine": _ENGINES[engine], "threads": threads,
        "seconds_to_ready": ready if engine == "litert" else None,
        "first_tokens_per_second": speeds[0], "best_tokens_per_second": max(speeds),
        "megabytes": memory,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--browser", default=shutil.which("chromium"))
    parser.add_argument("--stories", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.browser is None:
        parser.error("no chromium on the PATH; say --browser PATH")
    rows = []
    with tempfile.TemporaryDirectory() as work, sync_playwright() as playwright:
        folder = pack("bedtime", Path(work, "page")).path
        with serve(folder) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            for engine in _ENGINES:
                for threads in (2, 1):
                    browser = playwright.chromium.launch(executable_path=options.browser)
                    address = f"http://127.0.0.1:{server.server_port}/"
                    rows.append(measure(browser, address, engine, threads, options.stories))
                    browser.close()
            server.shutdown()
    table = Table("engine", "threads", "ready, s", "first story", "best, tokens/s", "MB")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v or "") for v in row.values()))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""`serve`: a folder at 127.0.0.1, with the headers that a page needs for threads.

Browsers share memory between threads only where the page has cut itself off from other sites
(COOP and COEP). The same headers forbid it to ask any other site for anything (CSP), so nothing
that is written there can leave it. A packed page's service worker gives them as well, from the
second visit on, so another static server without them will do.
"""

from __future__ import annotations

import contextlib
import http.server
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gemma_multi.errors import OptionError

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval' blob:; "
    "worker-src 'self' blob:; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'",
}


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012  as its base has it; some systems know neither
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm",
    }  # fmt: skip

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")  # asked for again, and then not sent again
        super().end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a page that was left while it loaded
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve(folder: str | Path, port: int = 0) -> Iterator[http.server.ThreadingHTTPServer]:
    """A server for a folder, on this machine alone; its `server_port` is `port`, or a free one for
    0. Whoever holds it calls `serve_forever`. Raises OptionError for a port that is taken."""
    handler = partial(_Handler, directory=str(folder))
    try:
        server = _Server(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise OptionError(
            f"port {port} cannot be used ({error}); choose another, or 0 for any that is free"
        ) from error
    with server:
        yield server

"""A hub on this machine, and a real client process that knows no other."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield
    server.shutdown()
    server.server_close()
    thread.join()


def client_of(server: ThreadingHTTPServer, home: Path, command: str, **always: str) -> Run:
    """Runs `gemma-multi COMMAND` with what it is given, and environment variables."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            **always,
            **environment,
        }
        line = [sys.executable, "-m", "gemma_multi", command, *map(str, arguments)]
        return subprocess.run(line, env=env, capture_output=True, text=True, timeout=120)

    return run

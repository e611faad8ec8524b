"""Sends a server requests that its own OpenAPI document allows, and requests that it does not.

    python tests/fuzz_server.py [--requests 5000] [--seed 0]

Schemathesis makes them, and looks at every answer: none is a fault of the server's (5xx), and each
has a status and a type that the document names. Prints how many were sent, and what memory the
server took before the last nine tenths of them and after. Exits with 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from served.servers import Running, serving

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"
OPERATIONS = 4  # that take a body; the others are asked once
SERVER = ("storyteller", "--max-tokens", "8", "--body-seconds", "2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with serving(*SERVER) as server:
        first = fuzz(server, options.requests // 10, options.seed)
        before = resident(server)
        rest = fuzz(server, options.requests - first, options.seed + 1)
        after = resident(server)
        print(json.dumps({"requests": first + rest, "mb_before": before, "mb_after": after}))
        if after > 1.1 * before:
            raise SystemExit("the server has grown by more than a tenth")


def fuzz(server: Running, requests: int, seed: int) -> int:
    """How many requests were sent. Fails where an answer was not as it should be."""
    sent = server.metric("requests_total")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("schemathesis")), "run",
             f"{server.address}/openapi.json", "--checks", CHECKS, "--phases", "fuzzing",
             "--mode", "all", "--max-examples", str(max(1, requests // OPERATIONS)),
             "--seed", str(seed), "--no-color", "--continue-on-failure", "--no-shrink",
             "--suppress-health-check", "all"],
            capture_output=True, text=True, cwd=folder,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}")
    assert server.ask("GET", "/health").status == 200
    return int(server.metric("requests_total") - sent)


def resident(server: Running) -> float:
    """Megabytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()

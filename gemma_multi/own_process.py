"""Work in a process of its own: what it holds in memory is the work's alone, and an engine that
ends its process ends no other.

Such a module is run by `python -m`, gets its job as a line of JSON on standard input, and tells
what it has to as a JSON object a line: whatever it likes on its way, in the end `facts`, `error`,
or what the `disk` says. It ends with the process that asked for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from gemma_multi.errors import BackendError, GemmaError

_SAID = 300  # characters of what a process said before it ended


def ask(
    module: str, job: Mapping[str, Any], hear: Callable[[dict[str, Any]], None], doing: str
) -> dict[str, Any]:
    """The facts of a job; `hear` is told what comes before them. Raises BackendError where it tells
    of an error, or ends without a word while it was `doing` something, and OSError of its disk."""
    with subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        complaints: list[str] = []
        listener = threading.Thread(target=lambda: complaints.extend(process.stderr or ()))
        listener.start()
        try:
            with suppress(BrokenPipeError):  # its own words tell more
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()  # and left open: its end is ours
            for line in process.stdout:
                told = json.loads(line)
                if "facts" in told:
                    return dict(told["facts"])
                if "error" in told:
                    raise BackendError(told["error"])
                if "disk" in told:
                    raise OSError(*told["disk"])
                hear(told)
            process.wait()
        finally:
            process.kill()
            listener.join()
    said = " ".join("".join(complaints[-3:]).split()) or "nothing was said"
    raise BackendError(f"{_ended(process.returncode)} while it {doing}: {said[-_SAID:]}")


def _ended(code: int) -> str:
    if code == -9:  # SIGKILL
        return "the process was killed, as systems do where memory runs out,"
    return f"the engine ended with exit status {code}"


def answer(work: Callable[[dict[str, Any], Callable[..., None]], dict[str, Any]]) -> None:
    """The other side: the facts of `work(job, tell)`, where `tell(name=value)` says more before."""
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # whatever an engine prints, in Python or below it, is no JSON
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(**said: Any) -> None:
        print(json.dumps(said), file=out, flush=True)

    try:
        tell(facts=work(given, tell))
    except GemmaError as error:
        tell(error=str(error))
    except OSError as error:
        tell(disk=[error.errno, error.strerror or str(error)])


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)

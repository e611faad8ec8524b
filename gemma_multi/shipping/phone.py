"""A process of its own that runs the shipped file as a phone does, asks it, and measures it.

    python -m gemma_multi.shipping.phone < job.json

It is alone so that what it holds in memory is what the file takes, and so that an engine that ends
the process ends no other. LiteRT-LM runs the file where it is installed, else the LiteRT engine
of this package. What it says on standard output is a JSON object a line: `done` and `of` as rows
are asked, in the end `facts`, `error`, or what the `disk` says. It ends with the process that asked
for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from gemma_multi.chat_template import Message
from gemma_multi.errors import BackendError, GemmaError
from gemma_multi.litert_lm import in_litert_lm, litert_lm_speed, litert_lm_version
from gemma_multi.loading import load
from gemma_multi.machine import available_cores, peak_memory
from gemma_multi.progress import Progress, reporting
from gemma_multi.scoring import LOSS, Scoring
from gemma_multi.shipping.asking import Answers, Questions, ask

_INSTEAD = (
    "the LiteRT engine of this package; for Google's own: pip install 'gemma-multi[litert-lm]'"
)
_PREFILL, _DECODE = 256, 64  # tokens that speed is measured with, where the context holds them


def run_as_on_a_phone(
    file: Path, context_length: int, questions: Questions, scoring: Scoring, answers: Path,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Asks the file what was not asked yet; what runs it, and how quick and large that is. Raises
    BackendError where the engine ends without a word, and what asking raises."""
    job = {
        "file": str(file), "context": context_length, "questions": questions.to_dict(),
        "answers": str(answers), "kind": scoring.kind,
    }  # fmt: skip
    command = [sys.executable, "-m", "gemma_multi.shipping.phone"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, encoding="utf-8") as process,
        reporting(progress, "asking the file") as report,
    ):  # fmt: skip
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
                report(told["done"], told["of"])
            process.wait()
        finally:
            process.kill()
            listener.join()
    said = " ".join("".join(complaints[-3:]).split()) or "nothing was said"
    raise BackendError(
        f"{file.name}: the engine ended with exit status {process.returncode} while it ran the "
        f"file: {said[-300:]}"
    )


def _serve(job: dict[str, Any], out: TextIO) -> None:
    def tell(**said: Any) -> None:
        print(json.dumps(said), file=out, flush=True)

    file, questions = Path(job["file"]), Questions.from_dict(job["questions"])
    answers, scoring = Answers(Path(job["answers"])), Scoring(job["kind"], "")
    try:
        facts = run_file(file, questions, answers, scoring, lambda i, n: tell(done=i, of=n))
        prefill, decode = _speed(file, job["context"])
        tell(facts={**facts, "prefill_tokens_per_second": round(prefill, 1),
                    "decode_tokens_per_second": round(decode, 1)})  # fmt: skip
    except GemmaError as error:
        tell(error=str(error))
    except OSError as error:
        tell(disk=[error.errno, error.strerror or str(error)])


def run_file(
    file: Path, questions: Questions, answers: Answers, scoring: Scoring, progress: Progress
) -> dict[str, Any]:
    """Runs the file in this process, and asks what was not asked yet."""
    version, started, python = litert_lm_version(), time.monotonic(), peak_memory()
    before = len(answers.found)
    if version is None or scoring.kind == LOSS:  # which only our engine tells
        model = load(file, backend="litert", progress=False)
        loaded = time.monotonic()
        ask(model, questions, answers, scoring, progress)
    else:
        with in_litert_lm(file, questions.max_tokens) as say:
            loaded = time.monotonic()
            answers.keep(_said(say, questions.messages, before, progress))
    asked, memory = time.monotonic(), peak_memory()
    count = len(answers.found) - before
    return {
        "runtime": f"LiteRT-LM {version}" if version else _INSTEAD,
        "asked_in": "LiteRT" if version is None or scoring.kind == LOSS else "LiteRT-LM",
        "cores": available_cores(), "load_seconds": round(loaded - started, 3),
        "rows_per_second": round(count / (asked - loaded), 2) if count else None,
        "memory_bytes": memory and memory - (python or 0),
    }  # fmt: skip


def _said(
    say: Any, messages: list[list[Message]], first: int, progress: Any
) -> Iterator[dict[str, str]]:
    for i in range(first, len(messages)):
        yield {"answer": say(messages[i])}
        progress(i + 1, len(messages))


def _speed(file: Path, context_length: int) -> tuple[float, float]:
    """Tokens a second (read, written)."""
    prefill, decode = min(_PREFILL, context_length // 2), min(_DECODE, context_length // 4)
    if litert_lm_version():
        return litert_lm_speed(file, prefill, decode)
    model = load(file, backend="litert", progress=False)
    session, ids = model.new_session(), [model.tokenizer.bos_id] * prefill
    session.read(ids)
    session.truncate(0)  # once more, warm
    start = time.monotonic()
    session.read(ids)
    middle = time.monotonic()
    for token in ids[:decode]:
        session.read([token])
    return prefill / (middle - start), decode / (time.monotonic() - middle)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    words, sys.stdout = sys.stdout, sys.stderr  # whatever an engine prints
    _serve(given, words)

"""A process of its own that runs the shipped file as a phone does, asks it, and measures it.

    python -m gemma_multi.shipping.phone < job.json

See `own_process`; it tells `done` and `of` as rows are asked. LiteRT-LM runs the file where it is
installed, else the LiteRT engine of this package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemma_multi import own_process
from gemma_multi.chat_template import Message
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
    with reporting(progress, "asking the file") as report:
        return own_process.ask(
            "gemma_multi.shipping.phone", job, lambda told: report(told["done"], told["of"]),
            f"ran {file.name}",
        )  # fmt: skip


def _work(job: dict[str, Any], tell: Callable[..., None]) -> dict[str, Any]:
    file, questions = Path(job["file"]), Questions.from_dict(job["questions"])
    answers, scoring = Answers(Path(job["answers"])), Scoring(job["kind"], "")
    facts = run_file(file, questions, answers, scoring, lambda i, n: tell(done=i, of=n))
    prefill, decode = _speed(file, job["context"])
    return {**facts, "prefill_tokens_per_second": round(prefill, 1),
            "decode_tokens_per_second": round(decode, 1)}  # fmt: skip


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


if __name__ == "__main__":
    own_process.answer(_work)

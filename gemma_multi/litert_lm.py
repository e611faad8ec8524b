"""LiteRT-LM, Google's engine for `.litertlm` on Android, iOS, desktops and the web: asks it, and
measures it, through its own Python package."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gemma_multi.chat_template import Message, fold_system

Ask = Callable[[str | Sequence[Message]], str]


def litert_lm_version() -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version("litert-lm-api")
    except importlib.metadata.PackageNotFoundError:
        return None


def litert_lm_speed(path: Path, prefill: int, decode: int) -> tuple[float, float]:
    """Tokens a second that LiteRT-LM reads and writes, by its own benchmark."""
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
    with tempfile.TemporaryDirectory() as cache:  # else it writes beside the file
        found = litert_lm.Benchmark(
            str(path), litert_lm.Backend.CPU(), prefill_tokens=prefill, decode_tokens=decode,
            cache_dir=cache,
        ).run()  # fmt: skip
    return found.last_prefill_tokens_per_second, found.last_decode_tokens_per_second


def ask_litert_lm(path: Path, prompt: str) -> str:
    """LiteRT-LM's greedy answer to one user's turn."""
    with in_litert_lm(path) as ask:
        return ask(prompt)


@contextmanager
def in_litert_lm(path: Path, max_tokens: int | None = None) -> Iterator[Ask]:
    """What asks LiteRT-LM for its greedy answer, of at most so many tokens, to a prompt or to
    messages, each time in a conversation of its own."""
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
    greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
    with (
        tempfile.TemporaryDirectory() as cache,
        litert_lm.Engine(str(path), cache_dir=cache) as engine,
    ):

        def ask(prompt: str | Sequence[Message]) -> str:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            # system text goes into the first turn, as it does here, whatever a template would do
            turns = [{"role": role, "content": text} for role, text in fold_system(messages)]
            with engine.create_conversation(
                sampler_config=greedy, messages=turns[:-1]
            ) as conversation:
                answer = conversation.send_message(turns[-1], max_output_tokens=max_tokens)
            return "".join(part.get("text", "") for part in answer["content"])

        yield ask

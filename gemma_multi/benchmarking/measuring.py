"""What is measured of one model on one engine, in a process of its own (see `own_process`).

    python -m gemma_multi.benchmarking.measuring < job.json

Speeds are the engine's alone: the prompt read at once, then greedy steps behind it, the best of
three passes, as `benchmarks/litert_cpu.py` has them. The time to the first token is that of
`generate`, with tokenizer and sampler. The conversations of `workload` go through the package's own
loop. What is compiled or packed on first use happens before, and is timed on its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from gemma_multi import own_process
from gemma_multi.benchmarking.energy import meter
from gemma_multi.benchmarking.places import loaded
from gemma_multi.benchmarking.traffic import Traffic
from gemma_multi.benchmarking.workload import (
    PROMPT,
    QUESTION,
    QUESTIONS,
    STEPS,
    WARM_UP,
    Turn,
    conversations,
    drawn_ids,
)
from gemma_multi.engines import Engine, Session
from gemma_multi.generation import Decoding, generate_tokens
from gemma_multi.machine import peak_memory
from gemma_multi.model import Model
from gemma_multi.sampling import GenerationOptions

PASSES = 3  # of which the best counts
_PROMPT_TOKENS_OF_A_TURN = 6  # that `generate` puts around a question, and <bos>
Ids = Any  # anything NumPy reads as i32[T]
Tell = Callable[..., None]


def speeds(engine: Engine, ids: Ids, prompt: int, steps: int) -> dict[str, float]:
    """Tokens a second of reading the first `prompt` of `ids`, and of greedy steps after all."""
    best = {"prefill": 0.0, "decode": 0.0}
    for _ in range(PASSES):
        session = engine.session()
        start = time.perf_counter()
        session.read(ids[:prompt])
        best["prefill"] = max(best["prefill"], prompt / (time.perf_counter() - start))
        session.truncate(0)
        logits, start = session.read(ids), time.perf_counter()
        for _ in range(steps):
            logits = session.read([int(logits.argmax())])
        best["decode"] = max(best["decode"], steps / (time.perf_counter() - start))
    return best


def first_token(model: Model) -> float:
    """Seconds from a question to the first token of its answer; a median."""
    vocabulary = model.tokenizer.vocab_size
    ids = drawn_ids(1, QUESTION - _PROMPT_TOKENS_OF_A_TURN, vocabulary)
    text, taken = model.tokenizer.decode(ids), []
    for _ in range(QUESTIONS + 1):
        start = time.perf_counter()
        model.generate(text, max_tokens=1, seed=1)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


class Conversing:
    """The conversations, and what they took."""

    def __init__(self, model: Model) -> None:
        self._model, self._traffic = model, Traffic.of(model)
        self._turns: list[tuple[int, int, int]] = []  # tokens before each, read and written
        self.waits: list[float] = []  # seconds to the first token of each turn

    @property
    def written(self) -> int:
        """Tokens; a short context may have ended an answer."""
        return sum(write for _, _, write in self._turns)

    @property
    def bytes(self) -> int:
        return sum(self._traffic.turn(*turn) for turn in self._turns)

    def run(self, conversation: Sequence[Turn]) -> None:
        model = self._model
        session, said = model.new_session(), [model.tokenizer.bos_id]
        for turn in conversation:
            ids = drawn_ids(len(self._turns), turn.read, model.config.vocab_size)
            said += ids if session.length else ids[1:]  # behind <bos>
            if len(said) + turn.write > session.context_length:  # as a chat that is full
                session, said = model.new_session(), said[-turn.read :]
            said += self._answer(session, said[session.length :], turn.write)

    def _answer(self, session: Session, prompt: list[int], write: int) -> list[int]:
        options, before = GenerationOptions(max_tokens=write, seed=len(self._turns)), session.length
        decoding = Decoding(
            options, [*session.ids.tolist(), *prompt], (), vocabulary=self._model.config.vocab_size,
            context_length=session.context_length, ahead=self._model.engine.steps_ahead,
        )  # fmt: skip
        start = time.perf_counter()
        tokens = generate_tokens(session, prompt, decoding)
        said = [next(tokens)]
        self.waits.append(time.perf_counter() - start)
        said += tokens
        self._turns.append((before, len(prompt), len(said)))
        return said


def measure(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """A round of one combination."""
    start = time.perf_counter()
    model = loaded(job)
    ready = time.perf_counter()
    # of a short context a half, and a quarter
    prompt = min(PROMPT, model.context_length // 2)
    steps = min(STEPS, model.context_length // 4)
    ids = drawn_ids(0, prompt, model.config.vocab_size)
    session = model.engine.session()
    session.read(ids)
    session.read(ids[:1])
    Conversing(model).run(WARM_UP)
    warm = time.perf_counter()
    found = speeds(model.engine, ids, prompt, steps)
    return {
        "load_seconds": ready - start, "warm_up_seconds": warm - ready,
        "prefill_tokens_per_second": found["prefill"],
        "decode_tokens_per_second": found["decode"],
        "first_token_seconds": first_token(model),
        **_conversations(model, job, tell),
        "peak_memory_bytes": peak_memory(),
        "place": model.describe(), "prompt": prompt, "steps": steps,
        "decode_step_bytes": Traffic.of(model).read(prompt + steps // 2, 1),
        "weight_bytes": Traffic.of(model).weights,
    }  # fmt: skip


def _conversations(model: Model, job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    conversing, work = Conversing(model), conversations(job["conversations"])
    energy = meter(job["powermetrics"])
    start, worked = time.perf_counter(), time.process_time()
    for i, conversation in enumerate(work):
        tell(done=i, of=len(work))
        conversing.run(conversation)
        if not isinstance(energy, str):
            energy.joules()  # before its counter comes round
    seconds, cpu = time.perf_counter() - start, time.process_time() - worked
    counted: dict[str, Any] = {"joules": None, "energy": energy}
    if not isinstance(energy, str):
        counted = {"joules": energy.joules(), "energy": energy.of}
        energy.close()
    waits = statistics.quantiles(conversing.waits, n=20) if len(conversing.waits) > 1 else None
    return {
        "conversations_seconds": seconds, "cpu_seconds": cpu, "bytes_moved": conversing.bytes,
        "written_tokens_per_second": conversing.written / seconds,
        "wait_median_seconds": statistics.median(conversing.waits),
        "wait_p95_seconds": waits[-1] if waits else conversing.waits[0], **counted,
    }  # fmt: skip


if __name__ == "__main__":
    own_process.answer(measure)

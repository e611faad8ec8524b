"""The worker on its own: who is read beside whom, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from tiny import tiny_checkpoint
from training.test_adapters import random_adapter

import gemma_multi
from gemma_multi import Model, OptionError
from gemma_multi.serving.tickets import Generation, Piece, Ticket
from gemma_multi.serving.worker import Cancelled, Full, Worker

ASKED = {"temperature": 0, "max_tokens": 20}
PROMPTS = ["Tell me a bedtime story.", "Hi", "Who are you?", "A"]


def load(backend: str) -> Model:
    model = gemma_multi.load(tiny_checkpoint(vocab_size=4096), backend=backend, precision="float32")
    model.add_adapter("a", random_adapter(0))
    model.add_adapter("b", random_adapter(1))
    return model


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(lambda: load("mlx"), seats=4, queue=8)
    yield worker
    worker.close()
    assert not worker.alive


@pytest.fixture(scope="module")
def alone() -> Model:
    return load("mlx")


def ticket(*prompts: str, adapter: str | None = None, **options: Any) -> Ticket:
    jobs = [Generation(prompt, {**ASKED, **options}) for prompt in prompts]
    return Ticket(jobs, adapter, lambda event: None)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await work()

    asyncio.run(bounded())


def text_of(outcomes: list[Any]) -> list[str]:
    return [outcome.text for outcome in outcomes]


def test_a_request_joins_those_that_run(
    worker: Worker, alone: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read in one batch with them, and does not wait for their end."""
    engine, batches = worker.model.engine, []
    together = engine._read_together

    def counted(sessions: Any, ids: Any, wants: Any) -> Any:
        batches.append(len(sessions))
        return together(sessions, ids, wants)

    monkeypatch.setattr(engine, "_read_together", counted)
    monkeypatch.setattr(engine, "steps_ahead", 1)

    async def work() -> None:
        long, short = ticket(PROMPTS[0], max_tokens=80), ticket(PROMPTS[1], max_tokens=5)
        worker.submit(long)
        events = long.events()
        assert isinstance((await anext(events))[1], Piece)
        worker.submit(short)
        assert text_of(await short.outcomes()) == [
            alone.generate(PROMPTS[1], temperature=0, max_tokens=5).text
        ]
        assert 2 in batches
        assert worker.running == 1  # the long one goes on
        pieces = [event async for _, event in events]
        result = pieces[-1].outcome  # type: ignore[union-attr]
        assert result.text == alone.generate(PROMPTS[0], temperature=0, max_tokens=80).text

    run(work)


def test_one_that_is_cancelled_ends_before_its_next_token(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever leaves while a token is read: nothing is read after it."""
    engine, reads = worker.model.engine, []
    read = engine.read

    async def work() -> None:
        left = ticket(PROMPTS[0], max_tokens=80)

        def watched(*given: Any) -> Any:
            reads.append(given)
            if len(reads) == 5:
                left.cancel()
            return read(*given)

        monkeypatch.setattr(engine, "read", watched)
        monkeypatch.setattr(engine, "steps_ahead", 1)
        worker.submit(left)
        (result,) = await left.outcomes()
        assert (result.finish_reason, len(reads)) == ("cancelled", 5)
        assert result.generated_tokens <= 5
        assert worker.running == 0

    run(work)


def test_an_adapter_belongs_to_a_request(worker: Worker, alone: Model) -> None:
    names = ["a", None, "b", "a"]

    async def work() -> None:
        asked = [ticket(*PROMPTS[:2], adapter=name, max_tokens=9) for name in names]
        for one in asked:
            worker.submit(one)
        for name, found in zip(names, await asyncio.gather(*(t.outcomes() for t in asked)),
                               strict=True):  # fmt: skip
            alone.switch_adapter(name)
            assert text_of(found) == [
                alone.generate(p, temperature=0, max_tokens=9).text for p in PROMPTS[:2]
            ]
        alone.switch_adapter(None)

    run(work)


def test_a_request_for_many_keeps_nobody_waiting(worker: Worker) -> None:
    async def work() -> None:
        ended: list[str] = []

        async def follow(name: str, asked: Ticket) -> None:
            worker.submit(asked)
            await asked.outcomes()
            ended.append(name)

        many = asyncio.create_task(follow("many", ticket(*PROMPTS * 3)))
        await asyncio.sleep(0)
        await asyncio.gather(many, *(follow(f"one {i}", ticket("Hi")) for i in range(3)))
        assert ended[-1] == "many"

    run(work)


def test_a_full_queue_and_those_who_left_it(worker: Worker) -> None:
    async def work() -> None:
        running = ticket(*PROMPTS, max_tokens=230)
        worker.submit(running)
        while worker.running < 4:
            await asyncio.sleep(0.005)
        waiting = [ticket("Hi") for _ in range(8)]
        for one in waiting:
            worker.submit(one)
        with pytest.raises(Full):
            worker.submit(ticket("Hi"))
        waiting[0].cancel()
        worker.submit(ticket("Hi"))  # has the place of the one who left
        with pytest.raises(Cancelled):
            await waiting[0].outcomes()
        running.cancel()
        await asyncio.gather(*(one.outcomes() for one in waiting[1:]))

    run(work)


def test_one_that_fails_is_alone_with_it(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        bad, good = ticket("Hi", schema={"type": "none"}), ticket("Hi")
        worker.submit(bad)
        worker.submit(good)
        with pytest.raises(OptionError, match="schema"):
            await bad.outcomes()
        assert len(await good.outcomes()) == 1
        broken = ticket("Hi")
        with monkeypatch.context() as patch:  # a fault of ours
            patch.setattr(worker.model, "stream", lambda *_, **__: 1 / 0)
            worker.submit(broken)
            with pytest.raises(ZeroDivisionError):
                await broken.outcomes()
        after = ticket("Hi")
        worker.submit(after)
        assert len(await after.outcomes()) == 1

    run(work)


def test_what_cannot_be_loaded_is_said_where_it_is_asked_for() -> None:
    def fails() -> Model:
        raise OptionError("no")

    with pytest.raises(OptionError, match="no"):
        Worker(fails, 1, 1)

"""Texts whose tokens are chosen ahead are those of the plain loop, and end where those end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi import BackendError, Model
from gemma_multi.engines import Chosen, Engine, Session, create_engine
from gemma_multi.generation import Decoding, answer, generate_tokens
from gemma_multi.reads import next_read
from gemma_multi.sampling import GenerationOptions
from gemma_multi.sampling.on_device import can_choose

STORY = "Tell me a bedtime story.\nHero: Nora the otter\nTheme: sharing\nLength: short"
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"seed": 1}, {"seed": 2, "top_k": 0, "top_p": 1.0, "temperature": 0.7},
    {"seed": 3, "min_p": 0.1, "top_p": 1.0}, {"seed": 4, "repetition_penalty": 1.2},
    {"seed": 5, "top_k": 0, "top_p": 0.9}, {"temperature": 0.0, "prompt_lookup": True},
]  # fmt: skip


@pytest.fixture(scope="module", params=["mlx", "keras"])
def model(request: pytest.FixtureRequest) -> Model:
    """The storyteller, whose texts are int4, and end by themselves."""
    return gemma_multi.load("storyteller", backend=request.param)


@pytest.fixture(params=["mlx", "keras"])
def tiny(request: pytest.FixtureRequest) -> Model:
    checkpoint = tiny_checkpoint(vocab_size=4096)
    return gemma_multi.load(checkpoint, backend=request.param, precision="float32")


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Has a model choose 16 tokens ahead from here on."""

    def switch(model: Model) -> None:
        monkeypatch.setattr(model.engine, "steps_ahead", 16)

    return switch


def counted(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each read had chosen ahead."""
    counts: list[int] = []
    original = model.engine._read

    def read(sessions: Any, ids: Any, wants: Any) -> Any:
        counts.extend(want.count for want in wants if isinstance(want, Chosen))
        return original(sessions, ids, wants)

    monkeypatch.setattr(model.engine, "_read", read)
    return counts


def same(one: Any, other: Any) -> None:
    for name in ("text", "tokens", "finish_reason", "prompt_tokens", "generated_tokens"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("given", WAYS, ids=lambda given: "-".join(map(str, given)))
def test_whole_texts_are_the_same(
    model: Model, ahead: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That end at a stop token in the middle, or after a number that is no multiple of 16."""
    plain = [model.generate(STORY, max_tokens=count, **given) for count in (18, 400)]
    ahead(model)
    counts = counted(model, monkeypatch)
    for result in plain:
        count = result.generated_tokens if result.finish_reason == "length" else 400
        same(model.generate(STORY, max_tokens=count, **given), result)
    assert bool(counts) == can_choose(GenerationOptions(**given))


def test_a_stop_text_ends_it_in_the_middle(model: Model, ahead: Any) -> None:
    whole = model.generate(STORY, seed=1).text
    stops = (whole[40:47], whole[100:101], whole[60:90])
    plain = [model.generate(STORY, seed=1, stop=["never said", stop]) for stop in stops]
    ahead(model)
    for stop, result in zip(stops, plain, strict=True):
        same(model.generate(STORY, seed=1, stop=["never said", stop]), result)
        stream = model.stream(STORY, seed=1, stop=["never said", stop])
        assert "".join(stream) == result.text


def test_a_conversation_goes_on(model: Model, ahead: Any) -> None:
    """After a stop token, a stop text, and a turn that was closed early."""

    def talk() -> list[Any]:
        chat = model.chat()
        said = [chat.send(STORY, seed=1, max_tokens=60)]
        said.append(chat.send(STORY, seed=2, stop=["the"]))
        stream = chat.stream(STORY, seed=3)
        pieces = [next(stream) for _ in range(4)]
        stream.close()
        assert stream.result.text == "".join(pieces)
        said.append(stream.result)
        said.append(chat.send("And the end?", temperature=0, max_tokens=33))
        return [*said, chat.messages]

    plain = talk()
    ahead(model)
    *found, messages = talk()
    assert messages == plain[-1]
    for one, other in zip(found, plain[:-1], strict=True):
        assert (one.text, one.tokens, one.finish_reason) == (
            other.text, other.tokens, other.finish_reason
        )  # fmt: skip


def test_a_flag_ends_it_at_what_was_said(model: Model, ahead: Any) -> None:
    whole = list(model.stream(STORY, seed=1))
    ahead(model)
    for count in (1, 2, 5, 20):
        stream = model.stream(STORY, seed=1)
        pieces = [next(stream) for _ in range(count)]
        stream.cancelled.set()
        assert list(stream) == []
        assert stream.result.text == "".join(pieces) == "".join(whole[:count])
        assert stream.result.finish_reason == "cancelled"
        assert model.tokenizer.decode(stream.result.tokens).startswith(stream.result.text)


def test_the_first_token_is_waited_for_alone(model: Model, ahead: Any) -> None:
    ahead(model)
    stream = model.stream(STORY, seed=1)
    next(stream)
    assert len(stream._decoding.tokens) == 1


def test_a_full_context_ends_it(ahead: Any) -> None:
    for backend in ("mlx", "keras"):
        small = gemma_multi.load("storyteller", backend=backend, context_length=90)
        plain = small.generate(STORY, seed=1)
        assert plain.finish_reason == "length"
        ahead(small)
        same(small.generate(STORY, seed=1), plain)


def test_rows_of_a_batch_choose_ahead_too(
    tiny: Model, ahead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by its own options, beside rows that cannot."""
    rows = [
        {"prompt": prompt, **given, "max_tokens": 10 + 7 * i}
        for i, (prompt, given) in enumerate(zip(["Hi", STORY, "Who?", "A", "b", "c", "d"], WAYS,
                                                strict=True))
    ]  # fmt: skip
    rows.append({"prompt": "Hi", "choices": ["a lot", "nothing"], "seed": 1})
    plain = [tiny.generate(**row) for row in rows]
    ahead(tiny)
    counts = counted(tiny, monkeypatch)
    for width in (3, None):
        for row, result in zip(tiny.batch(rows, width=width), plain, strict=True):
            same(row.value, result)
    assert max(counts) > 8


class TestSession:
    """What the session has read when an answer has ended, whatever ended it."""

    @pytest.fixture(params=["mlx", "keras"])
    def engine(self, request: pytest.FixtureRequest) -> Engine:
        return create_engine(tiny_checkpoint(), request.param, "float32")

    def decoding(self, session: Session, ahead: int, stops: Any = (), **given: Any) -> Decoding:
        options = GenerationOptions(seed=7, top_k=0, top_p=1.0, **given)
        return Decoding(
            options, [2, 9], stops, context_length=session.context_length, ahead=ahead
        )  # fmt: skip

    @pytest.mark.parametrize("ends", ["stop token", "length", "context"])
    def test_it_is_that_of_the_plain_loop(self, engine: Engine, ends: str) -> None:
        made = list(
            generate_tokens(one := engine.session(), [2, 9], self.decoding(one, 1, max_tokens=40))
        )
        stop = next(token for i, token in enumerate(made) if i >= 20 and token not in made[:i])
        read = []
        for ahead in (1, 16):
            session = engine.session(30 if ends == "context" else None)
            stops = {stop} if ends == "stop token" else ()
            most = 27 if ends == "length" else 100
            state = self.decoding(session, ahead, stops, max_tokens=most)
            found = list(generate_tokens(session, [2, 9], state))
            read.append((found, state.finish_reason, session.ids.tolist()))
        assert read[0] == read[1]
        assert len(read[0][0]) > 19

    def test_an_answer_that_is_cut_is_taken_back(self, engine: Engine) -> None:
        """By whoever hears the tokens, in the middle of those that came at once."""
        read = []
        for ahead in (1, 16):
            session = engine.session()
            state = self.decoding(session, ahead, max_tokens=90)
            heard: list[int] = []

            def hear(tokens: Any, state: Any = state, heard: Any = heard) -> None:
                for token in tokens:
                    heard.append(token)
                    if len(heard) == 21:
                        state.cut(21, "stop")
                        return

            reads, result = answer(session, [2, 9], state, hear), None
            while (one := next_read(reads, result)) is not None:
                result = one.session.read(one.ids, one.want)
            read.append((heard, state.tokens, session.ids.tolist()))
        assert read[0] == read[1]

    def test_a_flag_before_the_tokens_come_gives_none_of_them(self, engine: Engine) -> None:
        session = engine.session()
        state = self.decoding(session, 16, max_tokens=90)
        tokens = generate_tokens(session, [2, 9], state)
        first = next(tokens)
        state.cancelled.set()
        assert list(tokens) == []
        assert state.tokens == [first]
        assert session.ids.tolist() == [2, 9, first]

    @pytest.mark.parametrize("backend", ["mlx", "keras"])
    def test_logits_that_are_not_finite_are_the_same_error(self, backend: str) -> None:
        checkpoint = tiny_checkpoint()
        engine = create_engine(checkpoint, backend, "float32")
        session = engine.session()
        tokens = generate_tokens(session, [2, 9], self.decoding(session, 16))
        next(tokens)
        embedding = np.full_like(checkpoint.weight("model.embed_tokens.weight"), np.nan)
        engine.assign({"model.embed_tokens.weight": embedding})
        with pytest.raises(BackendError, match="the logits are not finite"):
            next(tokens)

"""The server, asked by OpenAI's own client: the same answers as the library gives."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import openai
import pytest
from pydantic import BaseModel
from served.servers import ENDLESS, SENTIMENT, Running

from gemma_multi import Model

MODEL = "storyteller"
TURN: list[Any] = [{"role": "user", "content": SENTIMENT}]
STORY = (
    "Tell me a bedtime story.\nHero: Pip the hedgehog\nSetting: an old lighthouse by the sea\n"
    "Twist: the voice was an echo\nTheme: friendship\nLength: short"
)
TOOL: dict[str, Any] = {
    "name": "alarm", "description": "Sets an alarm.",
    "parameters": {"type": "object", "properties": {"hour": {"enum": [7, 8]}},
                   "required": ["hour"]},
}  # fmt: skip


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.client()


def test_a_chat_is_what_generate_gives(client: openai.OpenAI, model: Model) -> None:
    parts = [{"type": "text", "text": SENTIMENT[:20]}, {"type": "text", "text": SENTIMENT[20:]}]
    for content in (SENTIMENT, parts):
        said = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}], temperature=0
        )  # type: ignore[misc,list-item]
        alone = model.generate(SENTIMENT, temperature=0)
        assert said.choices[0].message.content == alone.text == "negative"
        assert said.choices[0].finish_reason == "stop"
        assert said.usage is not None
        assert said.usage.prompt_tokens == alone.prompt_tokens
        assert said.usage.completion_tokens == alone.generated_tokens
    turns: list[Any] = [
        {"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, *TURN,
    ]  # fmt: skip
    said = client.chat.completions.create(model=MODEL, messages=turns, temperature=0, max_tokens=9)
    folded = [{"role": "system", "content": "Be brief.\n\nBe kind."}, *turns[2:]]
    alone = model.generate(folded, temperature=0, max_tokens=9)
    assert said.choices[0].message.content == alone.text


def test_a_stream_is_the_same_in_pieces(client: openai.OpenAI, model: Model) -> None:
    chunks = list(client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": STORY}], seed=3, max_tokens=40,
        temperature=0.8, top_p=0.9, logprobs=True, top_logprobs=2, stream=True,
        stream_options={"include_usage": True},
    ))  # fmt: skip
    alone = model.generate(STORY, seed=3, max_tokens=40, temperature=0.8, top_p=0.9, logprobs=2)
    *spoken, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in spoken) == alone.text
    assert len(spoken) > 10
    assert spoken[-1].choices[0].finish_reason == {"stop": "stop"}.get(
        alone.finish_reason, "length"
    )
    assert last.usage is not None
    assert last.usage.completion_tokens == alone.generated_tokens
    told = [one for chunk in spoken if chunk.choices[0].logprobs
            for one in chunk.choices[0].logprobs.content or ()]  # fmt: skip
    assert [one.logprob for one in told] == [one.logprob for one in alone.logprobs]
    pieces = [bytes(one.bytes or ()) for one in told]
    assert pieces == [model.tokenizer.token_bytes(one.token) for one in alone.logprobs]
    assert [len(one.top_logprobs) for one in told] == [2] * len(told)


def test_each_of_n_has_a_seed_of_its_own(client: openai.OpenAI, model: Model) -> None:
    said = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": STORY}], seed=5, n=3, max_tokens=12,
        stop=["the", "fox"],
    )  # fmt: skip
    for i, choice in enumerate(said.choices):
        alone = model.generate(STORY, seed=5 + i, max_tokens=12, stop=("the", "fox"))
        assert (choice.index, choice.message.content) == (i, alone.text)


def test_formats_are_obeyed(client: openai.OpenAI) -> None:
    class Kettle(BaseModel):
        broken: bool
        weeks: Literal[1, 2]

    parsed = client.chat.completions.parse(
        model=MODEL, messages=TURN, response_format=Kettle, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Kettle)
    said = client.chat.completions.create(
        model=MODEL, messages=TURN, response_format={"type": "json_object"}, max_tokens=300, seed=1
    )
    text = said.choices[0].message.content or ""
    assert text.startswith("{")
    assert said.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict)


def test_tools_are_called_and_told_what_they_gave(client: openai.OpenAI, model: Model) -> None:
    tools: Any = [{"type": "function", "function": {**TOOL, "strict": True}}]
    only: Any = {"type": "function", "function": {"name": "alarm"}}
    asked: dict[str, Any] = {"model": MODEL, "tools": tools, "temperature": 0, "max_tokens": 60}
    said = client.chat.completions.create(messages=TURN, tool_choice=only, **asked)
    message = said.choices[0].message
    assert said.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    arguments = json.loads(message.tool_calls[0].function.arguments)  # type: ignore[union-attr]
    alone = model.generate(SENTIMENT, tools=[TOOL], tool_choice="alarm", temperature=0)
    assert arguments == alone.calls[0].arguments
    chunks = list(client.chat.completions.create(
        messages=TURN, tool_choice=only, stream=True, **asked
    ))  # fmt: skip
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [json.loads(d.function.arguments) for d in deltas] == [arguments]  # type: ignore
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
    after = client.chat.completions.create(
        messages=[*TURN, message.model_dump(exclude_none=True), result], tool_choice="none", **asked
    )
    called = {"role": "model", "calls": [{"name": "alarm", "arguments": arguments}]}
    alone = model.generate(
        [*TURN, called, {"role": "tool", "content": ["done"]}],  # type: ignore[list-item]
        tools=[TOOL], tool_choice="none", temperature=0, max_tokens=60,
    )  # fmt: skip
    assert after.choices[0].message.content == alone.text


def test_completions(client: openai.OpenAI, model: Model) -> None:
    said = client.completions.create(
        model=MODEL, prompt=[ENDLESS, "The fox"], n=2, temperature=0, logprobs=1
    )
    texts = [model.generate(p, raw=True, temperature=0, max_tokens=16, logprobs=1)
             for p in (ENDLESS, "The fox")]  # fmt: skip
    assert [c.text for c in said.choices] == [texts[0].text] * 2 + [texts[1].text] * 2
    told = said.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs == [one.logprob for one in texts[0].logprobs]
    assert "".join(told.tokens or ()) == texts[0].text
    stream = client.completions.create(model=MODEL, prompt=ENDLESS, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == texts[0].text


def test_embeddings(client: openai.OpenAI, model: Model) -> None:
    texts = ["a red fox", "the kettle broke after a week"]
    found = client.embeddings.create(model=MODEL, input=texts)  # which asks for base64
    rows = np.array([one.embedding for one in found.data], np.float32)
    assert np.array_equal(rows, model.embed(texts))
    plain = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float")
    assert np.array_equal(np.float32(plain.data[0].embedding), model.embed(texts[0]))


def test_responses(client: openai.OpenAI, model: Model) -> None:
    said = client.responses.create(model=MODEL, input=SENTIMENT, temperature=0)
    assert (said.output_text, said.status) == ("negative", "completed")
    with client.responses.stream(
        model=MODEL, input=STORY, instructions="Be brief.", temperature=0, max_output_tokens=20
    ) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[-1] == "response.incomplete"  # for want of tokens
    whole = events[-1].response  # type: ignore[union-attr]
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": STORY}]
    alone = model.generate(prompt, temperature=0, max_tokens=20)
    assert whole.output_text == alone.text
    assert whole.usage is not None
    assert whole.usage.output_tokens == alone.generated_tokens
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds.count("response.output_text.delta") > 0


def test_responses_with_tools(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **TOOL, "strict": True}]
    only: Any = {"type": "function", "name": "alarm"}
    asked: dict[str, Any] = {"model": MODEL, "tools": tools, "temperature": 0}
    said = client.responses.create(input=SENTIMENT, tool_choice=only, **asked)
    (call,) = said.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["hour"] in (7, 8)
    with client.responses.stream(input=SENTIMENT, tool_choice=only, **asked) as stream:
        done = [e for e in stream if e.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == [call.arguments]
    after = client.responses.create(
        input=[
            {"role": "user", "content": SENTIMENT},
            call.model_dump(include={"type", "call_id", "name", "arguments"}),
            {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
        ],
        tool_choice="none", max_output_tokens=8, **asked,
    )  # type: ignore[misc]  # fmt: skip
    assert after.output[0].type == "message"


def test_models(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="no model is called 'gpt'") as failed:
        client.chat.completions.create(model="gpt", messages=TURN)
    assert (failed.value.param, failed.value.code) == ("model", "model_not_found")


def test_many_at_once_are_each_what_they_are_alone(client: openai.OpenAI, model: Model) -> None:
    stories = [STORY.replace("Pip", f"Pip {i}") for i in range(24)]

    def ask(i: int) -> str | None:
        asked = [{"role": "user", "content": stories[i]}]
        chosen: dict[str, Any] = {"seed": i, "max_tokens": 10 + i}
        if i % 2:
            return client.chat.completions.create(
                model=MODEL, messages=asked, **chosen
            ).choices[0].message.content  # type: ignore[call-overload]  # fmt: skip
        stream = client.chat.completions.create(model=MODEL, messages=asked, stream=True, **chosen)  # type: ignore[call-overload]
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(24) as pool:
        texts = list(pool.map(ask, range(24)))
    for i, text in enumerate(texts):
        assert (
            text == model.generate(STORY.replace("Pip", f"Pip {i}"), seed=i, max_tokens=10 + i).text
        )

"""Constrained text: it fits what was asked, on every engine, and costs no steps it need not."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import jsonschema
import numpy as np
import pydantic
import pytest
from other_peoples_files import json_schemas
from typing_extensions import TypedDict

import gemma_multi
from gemma_multi import ConstraintError, Model, OptionError
from gemma_multi.constraints import Constraint, ConstraintOptions, Matcher
from gemma_multi.engines import LAST, Rows
from gemma_multi.generation import Decoding
from gemma_multi.sampling import GenerationOptions, choose

PROMPT = "Emma lives in Paris and works at Globex."
STOPS = (1, 106)


@dataclass
class Person:
    name: str
    role: Literal["cook", "pilot", "nurse"]


class Place(TypedDict):
    city: Literal["Paris", "New York", "Rio de Janeiro"]
    large: bool


class Order(pydantic.BaseModel):
    items: list[Literal["bread", "red apples"]] = pydantic.Field(min_length=1, max_length=3)
    note: str = pydantic.Field(max_length=12)
    where: Place | None


@pytest.fixture(scope="module", params=["mlx", "keras", "litert"])
def model(request: pytest.FixtureRequest) -> Model:
    return gemma_multi.load("storyteller", backend=request.param, context_length=256)


@pytest.fixture(scope="module")
def one_model() -> Model:
    return gemma_multi.load("storyteller", backend="litert")


def matcher(model: Model, **asked: Any) -> Matcher:
    constraint = ConstraintOptions(**asked).compile()
    assert constraint is not None
    return constraint.matcher(model.tokenizer, STOPS)


def follow(matcher: Matcher, tokens: list[int]) -> int:
    """How many of `tokens` the matcher lets through, one by one."""
    for i, token in enumerate(tokens):
        if matcher.finished or not matcher.allowed()[token]:
            return i
        matcher.take(token)
    return len(tokens)


# what comes out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", [Person, Place, Order])
def test_a_type_comes_back_as_its_own_value(model: Model, kind: Any, temperature: float) -> None:
    result = model.generate(PROMPT, schema=kind, temperature=temperature, seed=4, max_tokens=120)
    adapter: Any = pydantic.TypeAdapter(kind)
    assert result.parsed == adapter.validate_json(result.text)
    assert isinstance(result.parsed, dict if kind is Place else kind)
    jsonschema.validate(json.loads(result.text), adapter.json_schema())
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("seed", range(3))
def test_choices_regexes_and_grammars(model: Model, seed: int) -> None:
    choices = ["yes", "yes, of course", "no thank you"]
    result = model.generate(PROMPT, choices=choices, seed=seed, temperature=3.0)
    assert result.parsed == result.text
    assert result.text in choices
    pattern = r"[A-Z][a-z]{2,8} [0-9]{2}:[0-9]{2}"
    assert re.fullmatch(pattern, model.generate(PROMPT, regex=pattern, seed=seed).text)
    lark = 'start: item ("; " item)~1..2\nitem: NAME " = " /[0-9]{1,3}/\nNAME: "x" | "long name"'
    text = model.generate(PROMPT, grammar=lark, seed=seed).text
    assert re.fullmatch(r"((x|long name) = \d{1,3}(; )?){2,3}", text)


def test_a_text_can_hold_spaces_and_any_letters(one_model: Model) -> None:
    """What pieces spell `▁` is a space to the grammar."""
    text = '{"a b": "Die Möwe 海鸥 🌊 und \\"mehr\\""}'
    asked = {"type": "object", "properties": {"a b": {"type": "string"}}, "required": ["a b"]}
    following = matcher(one_model, schema=asked)
    tokens = one_model.tokenizer.encode(text)
    assert follow(following, tokens) == len(tokens)
    assert following.finished or following.accepting
    assert not matcher(one_model, schema=asked).allowed()[one_model.tokenizer.id("\u2581the")]


def test_only_stop_tokens_may_follow_or_end_a_whole_text(one_model: Model) -> None:
    following = matcher(one_model, choices=["yes", "yes, please"])
    follow(following, one_model.tokenizer.encode("yes"))
    allowed = set(np.flatnonzero(following.allowed()).tolist())
    assert set(STOPS) < allowed
    assert following.accepting
    assert not following.finished
    steering = {one_model.tokenizer.id(p) for p in ("<bos>", "<pad>", "<start_of_turn>")}
    assert not steering & allowed


def test_whitespace_only_if_asked_for(one_model: Model) -> None:
    """Else as `json.dumps` writes, which forces most of it."""
    asked = {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "integer"}},
             "required": ["a"]}}  # fmt: skip
    value = [{"a": 1}, {"a": 22}]
    indented, tight = json.dumps(value, indent=2), json.dumps(value, separators=(",", ":"))
    either, free = (True, True), (False, True)  # without and with `whitespace`
    for text, fits in ((json.dumps(value), either), (indented, free), (tight, free)):
        tokens = one_model.tokenizer.encode(text)
        for whitespace, fit in zip((False, True), fits, strict=True):
            following = matcher(one_model, schema=asked, whitespace=whitespace)
            assert (follow(following, tokens) == len(tokens)) is fit, (text, whitespace)


def test_in_a_stream_and_in_a_chat(one_model: Model) -> None:
    stream = one_model.stream(PROMPT, schema=Person, temperature=0)
    text = "".join(stream)
    assert stream.result.text == text
    assert isinstance(stream.result.parsed, Person)
    chat = one_model.chat()
    first = chat.send(PROMPT, choices=["a red kite", "a blue kite"], temperature=0)
    second = chat.send("And then?", schema=Place, temperature=0)
    assert [m["content"] for m in chat.messages[1::2]] == [first.text, second.text]
    assert second.reused_tokens > 0
    with pytest.raises(ConstraintError):
        chat.send("And?", regex="[a-z]{100}", max_tokens=3)
    assert len(chat.messages) == 4  # that turn never happened
    assert chat.send("And then?", choices=["so", "no"]).text in ("so", "no")


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    if depth:
        kinds += ["array", "object", "object", "anyOf"]
        kinds += ["ref"] * (depth == 3)  # whose target stands at the root
    low = rng.randint(-50, 50)
    match rng.choice(kinds):
        case "string":
            least = rng.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 9)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-f]{2,4}$", "^a+b?$", "^(x|yz)-"])}
        case "integer":
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
        case "number":
            return {"type": "number", "minimum": low, "exclusiveMaximum": low + rng.randint(1, 9)}
        case "enum":
            return {"enum": rng.sample(["a", "b c", 'd"e', 1, 2.5, None, True, {"k": [1]}], 3)}
        case "const":
            return {"const": rng.choice(["é 海", 0, [1, "x"], {"a": None}])}
        case "array":
            least = rng.randint(0, 2)
            return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": least,
                    "maxItems": least + rng.randint(0, 3)}  # fmt: skip
        case "object":
            names = rng.sample(["id", "a name", "x", "größe", "n/1", 'q"'], rng.randint(1, 4))
            return {"type": "object", "additionalProperties": rng.choice([True, False]),
                    "properties": {name: random_schema(rng, depth - 1) for name in names},
                    "required": rng.sample(names, rng.randint(0, len(names)))}  # fmt: skip
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
        case "ref":
            return {"$defs": {"t": random_schema(rng, depth - 1)}, "$ref": "#/$defs/t"}
        case kind:
            return {"type": kind}


def at_random(matcher: Matcher, rng: random.Random, closing: list[int]) -> list[int] | None:
    """A text of a model that knows nothing but which tokens end things; None if it never ends."""
    tokens: list[int] = []
    while not matcher.finished and len(tokens) < 600:
        forced = matcher.forced()
        if not forced:
            allowed = matcher.allowed()
            if allowed[list(STOPS)].any() and rng.random() < 0.7:
                return tokens
            closes = [token for token in closing if allowed[token]]
            if not (closes and rng.random() < 0.5):
                closes = np.flatnonzero(allowed).tolist()
            forced = [rng.choice([t for t in closes if t not in STOPS] or closes)]
            if forced[0] in STOPS:
                return tokens
        for token in forced:
            matcher.take(token)
        tokens += forced
    return tokens if matcher.finished or matcher.accepting else None


def test_a_thousand_schemas(one_model: Model) -> None:
    """The published suite's and random ones: what is written validates, or is refused by name."""
    rng = random.Random(0)
    suite = {name: s for name, s in json_schemas().items() if name.startswith("draft4")}
    schemas: dict[str, Any] = {**suite}
    while len(schemas) < 1000:
        schemas[f"random {len(schemas)}"] = random_schema(rng)
    tokenizer = one_model.tokenizer
    closing = [tokenizer.id(piece) for piece in ('"', "]", "}")]
    written, refused = Counter[str](), {}
    for name, asked in schemas.items():
        kind = name.split()[0]
        try:
            following = matcher(one_model, schema=asked)
        except OptionError as error:
            refused[name] = str(error)
            continue
        for _ in range(2):
            tokens = at_random(following, rng, closing)
            if tokens is not None:
                text = tokenizer.decode(tokens)
                validator = jsonschema.Draft202012Validator(asked)
                assert validator.is_valid(json.loads(text)), (name, asked, text)
                written[kind] += 1
            following = matcher(one_model, schema=asked)
    assert written["random"] > 1500
    assert written.total() > 1700
    for name, message in refused.items():
        assert re.search(r"cannot be obeyed: \S|recursive|could not be", message), (name, message)
        # what they ask for is in nobody's power, or named
        assert not name.startswith("random") or "nsatisfiable" in message, (name, message)


# what it costs


class Counting:
    """A session that counts its reads, and what they were for."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.reads: list[tuple[int, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def read(self, ids: Any, want: Any = LAST) -> Any:
        self.reads.append((len(ids), want))
        return self._session.read(ids, want)


def test_forced_tokens_are_read_at_once(one_model: Model) -> None:
    """One read for each choice, and as many tokens as there are."""
    from gemma_multi.generation import generate_tokens

    class Form(TypedDict):
        first_name_of_the_customer: Literal["Emma", "Liam"]
        number_of_bottles_ordered: Literal[1, 2]
        delivery_before_breakfast: bool

    session = Counting(one_model.new_session())
    prompt = one_model.encode(PROMPT)
    decoding = Decoding(
        GenerationOptions(temperature=0, max_tokens=200), prompt, STOPS,
        matcher=matcher(one_model, schema=Form),
    )  # fmt: skip
    tokens = list(generate_tokens(session, prompt, decoding))  # type: ignore[arg-type]
    chosen = len(tokens) - decoding.forced_tokens
    assert decoding.finish_reason == "stop"
    assert decoding.forced_tokens > 2 * chosen
    assert len(session.reads) == chosen
    assert all(isinstance(want, Rows) for _, want in session.reads)  # few words could come
    read = sum(count for count, _ in session.reads)
    assert len(prompt) < read <= len(prompt) + len(tokens)
    text = one_model.tokenizer.decode(tokens)
    assert list(json.loads(text)) == list(Form.__annotations__)


@pytest.mark.parametrize("given", [
    {"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.2},
    {"top_k": 0, "top_p": 1.0}, {"repetition_penalty": 1.7},
    {"top_k": 0, "repetition_penalty": 2.0},
])  # fmt: skip
def test_rows_of_the_head_are_chosen_from_as_all_of_it_under_a_mask(given: dict) -> None:
    rng = np.random.default_rng(0)
    for position in range(200):
        logits = rng.normal(0, 3, 5000).astype(np.float32)
        ids = np.sort(rng.choice(5000, rng.integers(1, 60), replace=False))
        seen = rng.choice(5000, 900, replace=False)
        masked = np.full_like(logits, -np.inf)
        masked[ids] = logits[ids]
        options = GenerationOptions(seed=9, **given)
        expected = choose(masked, seen, options, position)
        assert choose(logits[ids], seen, options, position, ids) == expected


def test_rows_give_the_text_of_the_whole_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, on an engine that takes both ways."""
    from gemma_multi.generation import decoding

    model = gemma_multi.load("storyteller", backend="keras", precision="float32")
    texts = []
    for few in (4096, 0):
        monkeypatch.setattr(decoding, "_FEW", few)
        texts.append([
            model.generate(PROMPT, schema=Order, seed=seed, temperature=t, max_tokens=150).text
            for seed, t in ((0, 0.0), (1, 1.0), (2, 1.0))
        ])  # fmt: skip
    assert texts[0] == texts[1]


def test_what_nobody_waited_for_was_never_said(one_model: Model) -> None:
    """Though all of it was forced, and so taken at once."""
    asked = {"choices": ["Once upon a time there was a dog"]}
    stream = one_model.stream(PROMPT, **asked)
    said = next(stream)
    stream.close()
    assert (stream.result.finish_reason, stream.result.parsed) == ("closed", None)
    assert one_model.tokenizer.decode(stream.result.tokens) == stream.result.text == said
    stream = one_model.stream(PROMPT, **asked)
    next(stream)
    stream.cancelled.set()
    assert list(stream) == []
    assert (stream.result.finish_reason, len(stream.result.tokens)) == ("cancelled", 1)


# what is refused, or cut off


def test_a_text_that_is_cut_off_says_so(one_model: Model) -> None:
    with pytest.raises(ConstraintError, match=r"ended after 4 tokens.*raise max_tokens") as caught:
        one_model.generate(PROMPT, schema=Order, max_tokens=4)
    assert len(caught.value.result.tokens) == 4
    assert caught.value.result.parsed is None
    short = gemma_multi.load("storyteller", backend="litert", context_length=32)
    with pytest.raises(ConstraintError, match="the context is full"):
        short.generate(PROMPT, regex="[a-z]{300}", max_tokens=400)
    exact = len(one_model.tokenizer.encode("yes"))
    assert one_model.generate(PROMPT, choices=["yes"], max_tokens=exact).parsed == "yes"


def test_a_type_may_ask_for_more_than_its_schema_says(one_model: Model) -> None:
    class Never(pydantic.BaseModel):
        ok: bool

        @pydantic.field_validator("ok")
        @classmethod
        def refuse(cls, value: bool) -> bool:
            raise ValueError("it is never right")

    with pytest.raises(ConstraintError, match="never right"):
        one_model.generate(PROMPT, schema=Never)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"schema": {"type": "strin"}}, "schema cannot be obeyed: Invalid type: strin"),
        ({"schema": {"properties": 5}}, "properties must be an object"),
        ({"schema": "{"}, "a text that is no JSON"),
        ({"schema": "[1]"}, "expected a JSON object"),
        ({"schema": 5}, "schema is 5, expected a JSON Schema"),
        ({"schema": {"enum": [object]}}, "holds what JSON does not"),
        ({"schema": {"$ref": "#"}}, "recursive without end"),
        ({"schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
         "recursive without end"),
        ({"schema": nested(70)}, "71 levels deep, expected at most 64"),
        ({"schema": {"not": {"type": "string"}}}, "not"),
        ({"schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"schema": {"type": "string", "format": "nonsense"}}, "Unknown format: nonsense"),
        ({"schema": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
        ({"schema": {"enum": []}}, "Unsatisfiable"),
        ({"choices": []}, "choices is empty"),
        ({"choices": "abc"}, "choices is 'abc', expected a list"),
        ({"choices": ["a", "b", "a"]}, "choices holds 'a' twice"),
        ({"choices": ["a", ""]}, "choices holds '', expected texts that are not empty"),
        ({"choices": ["\ud800"]}, "no Unicode text"),
        ({"choices": ["a"] * 10_001}, "10001 texts, expected at most 10000"),
        ({"choices": ["a\u2581b"]}, "U+2581 is how tokenizers spell a space"),
        ({"regex": "["}, "unclosed character class"),
        ({"regex": ""}, "regex is '', expected a pattern"),
        ({"grammar": "start: foo"}, "unknown name"),
        ({"grammar": 3}, "grammar is 3, expected the text of a Lark grammar"),
        ({"regex": "a", "choices": ["a"]}, "cannot have both choices and regex"),
        ({"whitespace": True}, "whitespace=True is for JSON"),
        ({"regex": "a", "stop": ["x"]}, "a stop text may cut off what regex asks for"),
        ({"schemas": {}}, "unknown option 'schemas', expected one of choices, grammar"),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused(one_model: Model, asked: dict, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        one_model.generate(PROMPT, **asked)


def test_recursion_that_can_end_is_fine(one_model: Model) -> None:
    tree = {"$defs": {"tree": {"type": "object", "properties": {
        "name": {"enum": ["leaf", "branch"]},
        "below": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
    }, "required": ["name", "below"]}}, "$ref": "#/$defs/tree"}  # fmt: skip
    text = '{"name": "branch", "below": [{"name": "leaf", "below": []}]}'
    following = matcher(one_model, schema=tree)
    tokens = one_model.tokenizer.encode(text)
    assert follow(following, tokens) == len(tokens)
    inner = {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"]}
    mixed = {"$defs": {"B": inner}, "$ref": "#/$defs/B", "type": "object",
             "properties": {"a": {"type": "null"}}, "required": ["a"]}  # fmt: skip
    matcher(one_model, schema=mixed)  # neither part excludes the other
    either = {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]}
    assert Constraint.of_schema(either)
    matcher(one_model, schema=either)


@pytest.mark.parametrize("asked", [
    {"regex": "(a{1,1000}){1,1000}"}, {"regex": "(a*)*b"}, {"regex": "(.*a){60}"},
    {"schema": {"enum": [f"value {i}" for i in range(20_000)]}},
    {"schema": {"type": "object", "required": [f"p{i}" for i in range(2000)],
                "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}},
    {"choices": [f"choice number {i}" for i in range(10_000)]},
    {"grammar": 'start: start start | "a"'}, {"grammar": 'start: "a" start'},
    {"schema": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}},
], ids=lambda asked: str(asked)[:40])  # fmt: skip
def test_what_explodes_is_bounded(one_model: Model, asked: dict) -> None:
    """Each ends soon: in a text, in one that was cut off, or in an error that says why."""
    started = time.monotonic()
    with contextlib.suppress(OptionError, ConstraintError):
        one_model.generate(PROMPT, max_tokens=5, **asked)
    assert time.monotonic() - started < 20  # a hang is not a second on a slow machine

"""FunctionGemma's format, after Google's page "functiongemma/formatting-and-best-practices" and the
chat template published with the model.

    <start_of_turn>developer
    You are a model that can do function calling with the following functions
    <start_function_declaration>declaration:NAME{...}<end_function_declaration><end_of_turn>

(no line break in front of a declaration). A call is `<start_function_call>call:NAME{key:value}
<end_function_call>`, several follow each other, and the model then opens a response itself, which
ends its answer. Strings stand between `<escape>` tokens, everything else is written as JSON with
bare keys; keys are in alphabetical order, as in the model's training.

The markers are control tokens: no text of a user or of a tool can spell one. A call is read from
token ids and not from text, so a string may hold anything, braces and commas too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_multi import chat_template
from gemma_multi.constraints import JSON_SPACES, Constraint
from gemma_multi.errors import OptionError
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.tools.format import ToolFormat, chosen
from gemma_multi.tools.tool import Call, Tool

SENTENCE = "You are a model that can do function calling with the following functions"
_ESCAPE = "<escape>"
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_BARE_KEY = re.compile(r"([{,])([A-Za-z_][A-Za-z0-9_.-]*):")
_PLAIN = {  # what says nothing about which values are valid
    "description", "title", "default", "examples", "additionalProperties", "nullable",
}  # fmt: skip


class FunctionGemmaFormat(ToolFormat):
    in_one_turn = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._escape = tokenizer.id(_ESCAPE)
        self._start = tokenizer.id("<start_function_call>")
        self._end = tokenizer.id("<end_function_call>")

    def opening(
        self, tokenizer: Tokenizer, tools: Sequence[Tool], system: str
    ) -> tuple[list[int], str]:
        said = f"{system}\n{SENTENCE}" if system else SENTENCE
        ids = [tokenizer.start_of_turn_id, *tokenizer.encode(f"developer\n{said}")]
        for tool in tools:
            declared = _Spelled(tokenizer)
            declared.text(f"declaration:{tool.name}{{description:").string(tool.description)
            declared.text(",parameters:")
            _declare(declared, tool.parameters)
            declared.text("}")
            ids += declared.between("<start_function_declaration>", "<end_function_declaration>")
        return ids + chat_template.close_turn(tokenizer), ""

    def constraint(self, tools: Sequence[Tool], choice: str) -> Constraint:
        may, how, most = chosen(tools, choice)
        grammar = _Grammar()
        calls = " | ".join(
            f'"call:{tool.name}" {grammar.value(tool.parameters, tool.name)}' for tool in may
        )
        several = f"call{{1,{most}}}"
        start = {"auto": f"{several} | text", "required": several, "none": "text"}[how]
        rules = [f"start: {start}", "text: /(?s:.+)/"]
        if how != "none":
            rules += [f"call: <start_function_call> ({calls}) <end_function_call>", *grammar.rules]
        return Constraint.of_tools(
            "\n".join(rules), self._parse, lambda tokenizer, token: token == self._start
        )

    def calls(
        self, tokenizer: Tokenizer, calls: Sequence[Call], tools: Sequence[Tool]
    ) -> list[int]:
        ids: list[int] = []
        for call in calls:
            told = _Spelled(tokenizer).text(f"call:{call.name}").value(call.arguments)
            ids += told.between("<start_function_call>", "<end_function_call>")
        return ids

    def response(
        self, tokenizer: Tokenizer, calls: Sequence[Call], results: Sequence[Any]
    ) -> list[int]:
        ids: list[int] = []
        for call, result in zip(calls, results, strict=True):
            told = _Spelled(tokenizer).text(f"response:{call.name}")
            told.value(result if isinstance(result, Mapping) else {"result": result})
            ids += told.between("<start_function_response>", "<end_function_response>")
        return ids

    def _parse(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[Call, ...]:
        return tuple(self._call(tokenizer, part) for part in self._parts(tokens))

    def _parts(self, tokens: Sequence[int]) -> Iterator[list[int]]:
        part: list[int] | None = None
        for token in tokens:
            if token == self._start:
                part = []
            elif token == self._end and part is not None:
                yield part
                part = None
            elif part is not None:
                part.append(token)

    def _call(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> Call:
        """`call:NAME{...}`: between escapes strings, which become JSON's; outside of them bare
        keys, which are quoted."""
        pieces, piece = [], list[int]()
        for token in [*tokens, self._escape]:
            if token == self._escape:
                pieces.append(tokenizer.decode(piece))
                piece = []
            else:
                piece.append(token)
        written = "".join(
            json.dumps(text) if i % 2 else _BARE_KEY.sub(r'\1"\2":', text)
            for i, text in enumerate(pieces)
        )
        name, _, arguments = written.removeprefix("call:").partition("{")
        return Call(name, json.loads("{" + arguments))


class _Spelled:
    """Token ids of text and of strings between escapes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._ids, self._text = tokenizer, list[int](), ""

    def text(self, text: str) -> _Spelled:
        self._text += text
        return self

    def string(self, text: str) -> _Spelled:
        escape = self._tokenizer.id(_ESCAPE)
        self._flush()
        self._ids += [escape, *self._tokenizer.encode(text), escape]
        return self

    def value(self, value: Any) -> _Spelled:
        """A value as JSON, but for its strings and its keys."""
        if isinstance(value, str):
            return self.string(value)
        if isinstance(value, Mapping):
            for i, key in enumerate(sorted(value, key=str)):
                self.text("{" if not i else ",").text(f"{key}:").value(value[key])
            return self.text("}" if value else "{}")
        if isinstance(value, list | tuple):
            for i, inner in enumerate(value):
                self.text("[" if not i else ",").value(inner)
            return self.text("]" if value else "[]")
        try:
            return self.text(json.dumps(value))
        except TypeError:
            return self.string(str(value))

    def between(self, start: str, end: str) -> list[int]:
        self._flush()
        return [self._tokenizer.id(start), *self._ids, self._tokenizer.id(end)]

    def _flush(self) -> None:
        self._ids += self._tokenizer.encode(self._text)
        self._text = ""


def _declare(declared: _Spelled, schema: dict[str, Any]) -> None:
    """An object's or a property's schema: keys in alphabetical order, but the type last."""
    declared.text("{")
    parts = 0

    def key(name: str) -> _Spelled:
        nonlocal parts
        parts += 1
        return declared.text("," * (parts > 1)).text(f"{name}:")

    if "description" in schema:
        key("description").string(str(schema["description"]))
    if "enum" in schema:
        key("enum").value(list(schema["enum"]))
    if isinstance(schema.get("items"), dict):
        key("items")
        _declare(declared, schema["items"])
    if isinstance(schema.get("properties"), dict):
        key("properties").text("{")
        for i, name in enumerate(sorted(schema["properties"])):
            declared.text("," * bool(i)).text(f"{name}:")
            _declare(declared, schema["properties"][name])
        declared.text("}")
        if schema.get("required"):
            key("required").value(list(schema["required"]))
    key("type").string(_type_name(schema))
    declared.text("}")


def _type_name(schema: dict[str, Any]) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((k for k in kind if k != "null"), "null")
    if kind is None and isinstance(schema.get("anyOf"), list):
        kind = next((one.get("type") for one in schema["anyOf"] if one.get("type") != "null"), None)
    return str(kind or "string").upper()


class _Grammar:
    """Lark rules for values of JSON Schemas in this format."""

    def __init__(self) -> None:
        self.rules: list[str] = []

    def value(self, schema: dict[str, Any], where: str) -> str:
        """The name of a rule for a value."""
        body = self._body(schema, where)
        name = f"value_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _body(self, schema: Any, where: str) -> str:
        if not isinstance(schema, dict):
            raise OptionError(f"tool {where!r}: {schema!r} is no schema that says what may come")
        for name in ("anyOf", "oneOf"):
            if name in schema:
                self._only(schema, {name}, where)
                return " | ".join(self.value(one, where) for one in schema[name])
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            self._only(schema, {"const", "enum", "type"}, where)
            return " | ".join(self._literal(value, where) for value in values)
        kind = schema.get("type")
        if isinstance(kind, list):
            return " | ".join(self.value({**schema, "type": one}, where) for one in kind)
        if kind == "string":
            self._only(schema, {"type", "minLength", "maxLength"}, where)
            least, most = schema.get("minLength", 0), schema.get("maxLength", "")
            return f"<escape> /(?s:.{{{least},{most}}})/ <escape>"
        if kind in ("integer", "number", "boolean", "null"):
            plain = {key: value for key, value in schema.items() if key not in _PLAIN}
            return f"%json {json.dumps({**plain, 'x-guidance': JSON_SPACES})}"
        if kind == "array":
            return self._array(schema, where)
        if kind == "object":
            return self._object(schema, where)
        raise OptionError(f"tool {where!r}: FunctionGemma cannot be held to the schema {schema!r}")

    def _array(self, schema: dict[str, Any], where: str) -> str:
        self._only(schema, {"type", "items", "minItems", "maxItems"}, where)
        item = self.value(schema.get("items", {}), where)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        more = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        filled = f"{item} {more}" if most is None or most > 0 else '""'
        return f'"[" {filled} "]"' if least else f'"[" ({filled})? "]"'

    def _object(self, schema: dict[str, Any], where: str) -> str:
        """Required properties are there, others may be, all in alphabetical order: with a comma
        behind all that is not the last, which a rule for each tail of the list sees to."""
        self._only(schema, {"type", "properties", "required"}, where)
        properties, required = schema.get("properties", {}), set(schema.get("required", ()))
        if schema.get("additionalProperties") and not properties:
            raise OptionError(f"tool {where!r}: an object of FunctionGemma's has named properties")
        if required - set(properties):
            missing = sorted(required - set(properties))[0]
            raise OptionError(f"tool {where!r} requires {missing!r}, which is no property of it")
        tail, first_tail = '""', '""'  # after another property; as the first of all
        for name in sorted(properties, reverse=True):
            if not _KEY.fullmatch(name):
                raise OptionError(f"tool {where!r}: {name!r} cannot be a key for FunctionGemma")
            pair = f'"{name}:" {self.value(properties[name], f"{where}.{name}")}'
            after, first = f'"," {pair} {tail}', f"{pair} {tail}"
            if name not in required:
                after, first = f"({after}) | {tail}", f"({first}) | {first_tail}"
            tail, first_tail = self._rule(after), self._rule(first)
        return f'"{{" {first_tail} "}}"'

    def _rule(self, body: str) -> str:
        name = f"tail_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _literal(self, value: Any, where: str) -> str:
        if isinstance(value, list | dict):
            raise OptionError(f"tool {where!r}: {value!r} cannot be a choice for FunctionGemma")
        if isinstance(value, str):
            return f"<escape> {json.dumps(value, ensure_ascii=False)} <escape>"
        return json.dumps(json.dumps(value))

    def _only(self, schema: dict[str, Any], known: set[str], where: str) -> None:
        unknown = sorted(set(schema) - known - _PLAIN)
        if unknown:
            raise OptionError(
                f"tool {where!r}: FunctionGemma's form has no rule for the schema's {unknown[0]!r}"
            )

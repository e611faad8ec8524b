"""The OpenAPI document of a server, made of the models that requests are checked by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gemma_multi import __version__

_ERROR = {
    "type": "object", "required": ["error"], "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"], "properties": {
            "message": {"type": "string"}, "type": {"type": "string"},
            "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
        }}},
}  # fmt: skip
_REFUSED = {
    "400": "Something in the request is wrong, or not supported; `param` says what.",
    "401": "No API key, or a wrong one.",
    "403": "Asked by a name that is not this machine's.",
    "404": "No such model.",
    "408": "The body came too slowly.",
    "413": "The body is too long.",
    "415": "The body is not said to be JSON.",
    "429": "The queue is full; Retry-After says when to come again.",
}
_OBJECT = {"application/json": {"schema": {"type": "object"}}}


def openapi(
    posts: Sequence[tuple[str, type[BaseModel]]], gets: Sequence[str], streaming: set[str],
    models: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """`posts` are paths and what they take, `gets` paths that take nothing; those of `posts` that
    are in `streaming` may also answer in events. `models` are all that `model` may be."""
    names, definitions = models_json_schema(
        [(kind, "validation") for _, kind in posts], ref_template="#/components/schemas/{model}"
    )
    for kind in definitions.get("$defs", {}).values():
        if "model" in kind.get("properties", {}):
            kind["properties"]["model"] = {"type": "string", "enum": list(models)}
    refused = {
        status: {"description": meaning, "content": {"application/json": {
            "schema": {"$ref": "#/components/schemas/Error"}}}}
        for status, meaning in _REFUSED.items()
    }  # fmt: skip
    paths: dict[str, Any] = {}
    for path, kind in posts:
        events = {"text/event-stream": {"schema": {"type": "string"}}} if path in streaming else {}
        paths[path] = {"post": {
            "summary": path.rpartition("/")[2],
            "requestBody": {"required": True, "content": {
                "application/json": {"schema": names[kind, "validation"]}}},
            "responses": {
                "200": {"description": "An answer.", "content": {**_OBJECT, **events}}, **refused
            },
        }}  # fmt: skip
    for path in gets:
        text = {"text/plain": {"schema": {"type": "string"}}}
        content = text if path == "/metrics" else _OBJECT
        answered = {"200": {"description": "As it is now.", "content": content}}
        paths[path] = {"get": {
            "summary": path.rpartition("/")[2],
            "responses": {**answered, "401": refused["401"], "403": refused["403"]},
        }}  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "gemma-multi serve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }

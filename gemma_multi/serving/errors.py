"""What a client is told when something goes wrong, in OpenAI's shape; nothing of our insides.

{"error": {"message": ..., "type": ..., "param": "messages[0].content", "code": ...}}
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from gemma_multi.errors import ConstraintError, ContextError, GemmaError, OptionError

INVALID = "invalid_request_error"
_KNOWN = {  # what pydantic calls an error -> OpenAI's code
    "extra_forbidden": "unsupported_parameter",
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
}
_OURS = {"schema": "response_format", "tool": "tools"}  # our words for OpenAI's fields
_SHORT, _LONG = 200, 1000  # characters of what was received that a message repeats, and of all


class ApiError(Exception):
    """An answer with a status other than 200."""

    def __init__(
        self, status: int, message: str, *, type: str = INVALID, param: str | None = None,
        code: str | None = None, headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        message = message if len(message) <= _LONG else f"{message[:_LONG]}..."
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.error = {"message": message, "type": type, "param": param, "code": code}

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.error}, self.status, self.headers)


def invalid(message: str, param: str) -> ApiError:
    """A value that cannot be taken."""
    return ApiError(400, message, param=param, code="invalid_value")


def overloaded(seconds: int) -> ApiError:
    return ApiError(
        429, f"the server is busy and its queue is full; try again in {seconds} s",
        type="rate_limit_error", code="rate_limit_exceeded", headers={"Retry-After": str(seconds)},
    )  # fmt: skip


def internal_error() -> ApiError:
    return ApiError(
        500, "the server failed on this request; its log says why", type="server_error",
        code="internal_error",
    )  # fmt: skip


def of_exception(error: Exception, fields: Collection[str], prompt: str) -> ApiError:
    """What a request failed with. `fields` are those that it may have; `prompt` is the one that
    holds the text, and what an error is about that names no other."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(400, str(error), param=prompt, code="context_length_exceeded")
    if isinstance(error, OptionError | ConstraintError):
        param = _about(str(error), fields) or prompt
        return invalid(str(error), param)
    if isinstance(error, GemmaError):
        return ApiError(500, str(error), type="server_error", code="backend_error")
    return internal_error()


def _about(message: str, fields: Collection[str]) -> str | None:
    """The field that a message of ours is about: the first that it speaks of in its own words."""
    for word in re.findall(r"\w+", message.partition("'")[0]):
        name = _OURS.get(word, word)
        if name in fields:
            return name
    return None


def of_validation(error: ValidationError, given: Any) -> ApiError:
    """The deepest of the mistakes that pydantic found in what was `given`: of the ways that a
    value may be written, it is of the one that was meant."""
    worst = max(error.errors(include_url=False), key=lambda one: len(_path(one, given)))
    kind, param = worst["type"], _spelled(_path(worst, given))
    if kind == "extra_forbidden":
        message = f"{param} is not supported by this server; leave it out"
    elif kind == "missing":
        message = f"{param} is missing"
    elif kind == "json_invalid":
        message = f"the body is no JSON: {worst['msg'].removeprefix('Invalid JSON: ')}"
    else:
        received = repr(worst.get("input"))[:_SHORT]
        message = f"{param or 'the body'} is {received}: {worst['msg']}"
    return ApiError(400, message, param=param or None, code=_KNOWN.get(kind, "invalid_value"))


def _path(one: Mapping[str, Any], given: Any) -> list[str | int]:
    """Where in the body a mistake is: pydantic's place without the names of types in it."""
    path: list[str | int] = []
    for i, part in enumerate(one["loc"], 1):
        if _holds(given, part):
            given = given[part]
        elif not (i == len(one["loc"]) and one["type"] == "missing"):
            continue
        path.append(part)
    return path


def _holds(value: Any, part: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _spelled(path: list[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")

"""Vertex AI's contract for containers: `{"instances": [...]}` in, `{"predictions": [...]}` out.

An instance is what /v1/chat/completions (`messages`) or /v1/completions (`prompt`) takes, a
prediction what it gives; `parameters` hold for all instances that do not say otherwise. `model` may
be left out where it is the first. Instances run side by side.
"""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemma_multi.serving.app import Server, checked
from gemma_multi.serving.chat import chat_answer
from gemma_multi.serving.completions import completion_answer
from gemma_multi.serving.errors import ApiError, invalid
from gemma_multi.serving.requests import ChatRequest, CompletionRequest, Strict


class PredictRequest(Strict):
    """POST on AIP_PREDICT_ROUTE"""

    instances: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=128)]
    parameters: dict[str, Any] | None = None


async def predict(server: Server, body: PredictRequest, request: Request) -> Response:
    first = next(iter(server.models))
    answers = [
        _answer(server, {"model": first, **(body.parameters or {}), **one}, i, request)
        for i, one in enumerate(body.instances)
    ]
    try:
        async with asyncio.TaskGroup() as group:  # the first that fails ends the others
            tasks = [group.create_task(one) for one in answers]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return JSONResponse({"predictions": [task.result() for task in tasks]})


async def _answer(
    server: Server, given: dict[str, Any], place: int, request: Request
) -> dict[str, Any]:  # fmt: skip
    where = f"instances[{place}]"
    if given.get("stream"):
        raise invalid("a prediction is whole; leave stream out", f"{where}.stream")
    body = json.dumps(given).encode()
    try:
        if "prompt" in given:
            return await completion_answer(server, checked(CompletionRequest, body), request)
        return await chat_answer(server, checked(ChatRequest, body), request)
    except ApiError as error:
        if error.error["param"]:
            error.error["param"] = f"{where}.{error.error['param']}"
        raise

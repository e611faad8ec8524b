"""POST /v1/embeddings"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemma_multi.model import Model
from gemma_multi.reads import Reads
from gemma_multi.serving.app import Server
from gemma_multi.serving.requests import EmbeddingRequest
from gemma_multi.serving.tickets import Tell
from gemma_multi.tasks.embedding import by_pooling


class Embedding:
    """An AnswerJob: a text's direction, as `Model.embed` gives it, and how many tokens it has."""

    def __init__(self, text: str) -> None:
        self._text = text

    def begin(self, model: Model, tell: Tell) -> Reads[Any]:
        reads = by_pooling(model)(self._text)  # says what is wrong with the text
        tokens = len(model.encode(self._text, raw=True))

        def counted() -> Reads[Any]:
            return (yield from reads), tokens

        return counted()

    def cancel(self) -> None:
        """It is one read; there is nothing to cut short."""


async def embeddings(server: Server, body: EmbeddingRequest, request: Request) -> Response:
    served = server.find(body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    found = await server.results(request, served, [Embedding(text) for text in texts])
    tokens = sum(count for _, count in found)
    data = [
        {"object": "embedding", "index": i, "embedding": _spelled(row, body.encoding_format)}
        for i, (row, _) in enumerate(found)
    ]
    return JSONResponse({
        "object": "list", "data": data, "model": served.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    })  # fmt: skip


def _spelled(row: np.ndarray, how: str | None) -> Any:
    if how == "base64":  # of little-endian float32, which OpenAI's clients ask for
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return row.tolist()

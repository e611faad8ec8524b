"""ServerOptions: where a server listens, whom it lets in, and how much it takes on."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_multi.errors import OptionError
from gemma_multi.options import option

API_KEY = "GEMMA_MULTI_API_KEY"  # the environment variable, which no list of processes shows
MOST_ANSWERS = 16  # of one request (`n`)


@dataclass(frozen=True)
class ServerOptions:
    """What a server can be told. What a field means stands beside it."""

    host: str = option("127.0.0.1", "Address to listen on; any but this machine's own needs a key.")
    port: int = option(8000, "Port; 0 takes a free one.")
    api_key: str | None = option(
        None, f"What clients must send as a bearer token; better set as {API_KEY}."
    )
    # an engine that batches gains little past it; one that does not (LiteRT without `decode_batch`)
    # answers no more of them by it, but everybody's first token comes sooner
    parallel: int = option(
        32, "Answers side by side of one model; each costs a conversation's caches."
    )
    queue: int = option(128, "Requests that may wait for one model; more are answered with 429.")
    max_tokens: int = option(4096, "The most tokens that one answer may ask for.")
    max_body: int = option(1_000_000, "The most bytes of a request.")
    seconds: float = option(600.0, "The most time for one request, waiting included.")
    body_seconds: float = option(10.0, "The most time for a request's body to arrive.")
    # Vertex AI's contract for containers
    health_route: str = option("/health", "Where to ask whether it runs.")
    predict_route: str | None = option(None, "Where Vertex AI's `instances` are answered.")

    def __post_init__(self) -> None:
        for name, least in (
            ("port", 0), ("parallel", 1), ("queue", 0), ("max_tokens", 1), ("max_body", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise OptionError(f"{name} is {value!r}, expected a whole number from {least} on")
        if self.port > 65535:
            raise OptionError(f"port is {self.port}, expected at most 65535")
        for name in ("seconds", "body_seconds"):
            if not 0 < getattr(self, name) <= 86_400:
                raise OptionError(f"{name} is {getattr(self, name)!r}, expected 0 to 86400")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()
                                             and self.api_key.isprintable()):  # fmt: skip
            raise OptionError("api_key is empty, or holds more than ASCII characters")
        for name in ("health_route", "predict_route"):
            value = getattr(self, name)
            if value is not None and not value.startswith("/"):
                raise OptionError(f"{name} is {value!r}, expected a path that begins with /")
        # whoever may reach a container of Vertex AI has passed its own gate, without our key
        if not self.api_key and not self.is_local and self.predict_route is None:
            raise OptionError(
                f"host is {self.host!r}, which others can reach: set an API key ({API_KEY} or "
                "api_key), or listen on 127.0.0.1"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @classmethod
    def read(cls, given: Mapping[str, Any], environment: Mapping[str, str]) -> ServerOptions:
        """What was given, and what the environment says: the key, where none was given, and
        Vertex AI's `AIP_HTTP_PORT`, `AIP_HEALTH_ROUTE` and `AIP_PREDICT_ROUTE`. Raises
        OptionError."""
        found: dict[str, Any] = {"api_key": environment.get(API_KEY) or None}
        port = environment.get("AIP_HTTP_PORT")
        if port is not None:
            if not port.isdecimal():
                raise OptionError(f"AIP_HTTP_PORT is {port!r}, expected a port")
            found |= {
                "host": "0.0.0.0", "port": int(port),
                "health_route": environment.get("AIP_HEALTH_ROUTE") or "/health",
                "predict_route": environment.get("AIP_PREDICT_ROUTE") or "/predict",
            }  # fmt: skip
        return cls(**{**found, **given})

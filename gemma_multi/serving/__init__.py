"""serving: loaded models behind an HTTP server that speaks OpenAI's API.

`serve` is what `gemma-multi serve` runs. Those who run an ASGI server of their own put `Worker`s
(`serving.worker`) into a `Server` (`serving.app`) and make the application of it with `create_app`
(`serving.routes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gemma_multi.errors import BackendError
from gemma_multi.model import Model
from gemma_multi.serving.options import ServerOptions

if TYPE_CHECKING:
    from gemma_multi.serving.app import Server

__all__ = ["ServerOptions", "serve"]
_PACKAGES = ("prometheus_client", "starlette", "uvicorn")


def serve(
    models: Mapping[str, Callable[[], Model]],
    options: ServerOptions | None = None,
    ready: Callable[[str, Server], None] = lambda address, server: None,
) -> None:
    """Serves until it is told to stop (Ctrl-C, SIGTERM), then finishes what runs.

    `models` are what loads each, by what clients call it; a model's adapters are served by their
    own names. `ready` is told the address once it is open. Raises OptionError where the address
    cannot be had, BackendError without the packages of `gemma-multi[serve]`, and what loading
    raises.
    """
    try:
        from gemma_multi.serving.run import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (
            "starlette",
            "uvicorn",
            "prometheus_client",
        ):
            raise
        raise BackendError(
            f"a server needs {error.name}: pip install 'gemma-multi[serve]'"
        ) from None
    run(models, options or ServerOptions(), ready)

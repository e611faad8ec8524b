"""run: loads, listens, and ends cleanly."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import uvicorn

from gemma_multi.errors import OptionError
from gemma_multi.model import Model
from gemma_multi.serving.app import Served, Server
from gemma_multi.serving.options import ServerOptions
from gemma_multi.serving.routes import create_app
from gemma_multi.serving.worker import Worker

Load = Callable[[], Model]
_HEADERS = 1 << 14  # bytes


def run(
    models: Mapping[str, Load], options: ServerOptions, ready: Callable[[str, Server], None]
) -> None:
    """See `serving.serve`."""
    with _listening(options) as listener:
        host, port = listener.getsockname()[:2]
        server = Server(_load(models, options), options)
        config = uvicorn.Config(
            create_app(server), log_config=None, access_log=False, proxy_headers=False,
            server_header=False, h11_max_incomplete_event_size=_HEADERS,
            timeout_graceful_shutdown=int(options.seconds) + 1,
        )  # fmt: skip
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{port}", server)
        with _signals_end_cleanly():
            uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _listening(options: ServerOptions) -> Iterator[socket.socket]:
    """A socket, had before models are loaded: a port that is taken is said at once."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        raise OptionError(
            f"{options.host}:{options.port} cannot be listened on: {error.strerror or error}; "
            "choose another port"
        ) from None
    with listener:
        yield listener


def _load(models: Mapping[str, Load], options: ServerOptions) -> dict[str, Served]:
    """Models and their adapters, by name. Where other weights need another engine, an adapter has
    one of its own, and nobody waits for a switch."""

    def worker(load: Load) -> Worker:
        return Worker(load, options.parallel, options.queue)

    found: dict[str, Served] = {}
    for name, load in models.items():
        base = worker(load)
        found[name] = Served(name, base, base.model.active_adapter)
        for adapter in base.model.adapters:
            if adapter in models or adapter in found:
                raise OptionError(f"two models are called {adapter!r}")
            own = base
            if base.model.engine.fixed_weights:
                own = worker(partial(_switched, load, adapter))
            found[adapter] = Served(adapter, own, adapter)
    return found


def _switched(load: Load, adapter: str) -> Model:
    return load().switch_adapter(adapter)


@contextlib.contextmanager
def _signals_end_cleanly() -> Iterator[None]:
    """uvicorn ends on a signal, and then raises it again for whoever had it before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)

"""`serve`: models behind an HTTP server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_multi.cli.common import field_options, given, place_options, print_json, taken_place
from gemma_multi.errors import OptionError
from gemma_multi.serving.options import ServerOptions

if TYPE_CHECKING:
    from gemma_multi.model import Model
    from gemma_multi.serving.app import Server


@click.command()
@click.argument("models", nargs=-1, metavar="[NAME=]MODEL...")
@click.option("--adapter", "adapters", multiple=True, metavar="[MODEL/]NAME=DIRECTORY",
              help="A LoRA adapter (PEFT's layout), served as a model of its NAME; of the first "
              "model unless another one's name is said.")  # fmt: skip
@field_options(ServerOptions, leave_out=("health_route", "predict_route"))
@click.option("--json", "as_json", is_flag=True, help="The address and the models as JSON.")
@place_options
def serve(
    models: Sequence[str], adapters: Sequence[str], as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Serve MODELs by OpenAI's API, on this machine unless told otherwise.

    Clients choose one by its name: NAME if given, else a hub id, or the last part of a path. Ctrl-C
    finishes what runs and ends.
    """
    from gemma_multi.serving import serve as run

    place = taken_place(options)
    chosen = ServerOptions.read(given(options), os.environ)  # before anything is loaded
    run(_loaders(models or ("storyteller",), adapters, place), chosen, partial(_show, as_json))


def _loaders(
    models: Sequence[str], adapters: Sequence[str], place: dict[str, Any]
) -> dict[str, Callable[[], Model]]:
    """What loads each model, by its name. Raises OptionError for two of one name."""
    paths: dict[str, str] = {}
    for one in models:
        name, given_one, path = one.partition("=")
        if not given_one:
            path = name
            name = Path(path).resolve().name if Path(path).exists() else path
        if not name or not path or name in paths:
            raise OptionError(f"model {one!r}: two are called {name!r}, or it has no name or path")
        paths[name] = path
    owned: dict[str, dict[str, str]] = {name: {} for name in paths}
    for one in adapters:
        names, _, path = one.partition("=")
        owner, slash, name = names.rpartition("/")
        owner = owner if slash else next(iter(paths))
        if not name or not path or owner not in paths:
            raise OptionError(
                f"--adapter {one!r}: expected NAME=DIRECTORY, or MODEL/NAME=DIRECTORY of one of "
                f"{', '.join(paths)}"
            )
        if name in paths or any(name in known for known in owned.values()):
            raise OptionError(f"--adapter {one!r}: another model is called {name!r}")
        owned[owner][name] = path
    return {name: partial(_load, path, owned[name], place) for name, path in paths.items()}


def _load(path: str, adapters: dict[str, str], place: dict[str, Any]) -> Model:
    """A model as it is, and what it can be switched to."""
    from gemma_multi import load

    model = load(path, **place)
    for name, directory in adapters.items():
        model.add_adapter(name, directory)
    return model


def _show(as_json: bool, address: str, server: Server) -> None:
    """Where it listens, and what it serves."""
    if as_json:
        print_json({"address": address, "models": list(server.models)})
        sys.stdout.flush()
        return
    click.echo(f"{address}/v1")
    for one in server.models.values():
        model = one.worker.model
        about = f"{model.backend}, {model.engine.precision}, {one.worker.seats} side by side"
        click.echo(f"  {one.name:<24} {about}", err=True)
    click.echo("  Ctrl-C ends it", err=True)
    sys.stdout.flush()

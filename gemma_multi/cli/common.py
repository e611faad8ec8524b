"""What the commands share: options made from dataclasses, where models come from, printing JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

Command = Callable[..., Any]
SOURCE = ("revision", "local_files_only", "progress")
LOAD = ("model", "backend", "precision", "context_length", "adapter", *SOURCE)
_KINDS = {"bool": bool, "int": int, "float": float}


def source_options(command: Command) -> Command:
    """Where a model on the hub comes from, and whether bars are shown; see SOURCE."""
    for option in (
        click.option("--progress/--no-progress", default=True, help="Bars on a terminal."),
        click.option("--local-files-only", is_flag=True, help="Never ask the hub."),
        click.option("--revision", help="Branch, tag or commit of a hub repository."),
    ):
        command = option(command)
    return command


def output_option(meaning: str) -> Callable[[Command], Command]:
    return click.option("-o", "--output", required=True, metavar="PATH", help=meaning)


def model_options(command: Command) -> Command:
    """What `load` takes; see `load_model`."""
    from gemma_multi.engines import backends

    command = source_options(command)
    command = field_options({b.title: b.options for b in backends().values()})(command)
    for option in reversed(
        (
            click.option("-m", "--model", default="storyteller", show_default=True,
                         help="Bundled name, directory, exported file or Hugging Face id."),
            click.option("-b", "--backend", default="auto", show_default=True,
                         help=f"auto, {', '.join(backends())}."),
            click.option("--precision", default="auto", show_default=True,
                         help="float32, bfloat16, int4, int8 or auto."),
            click.option("--context-length", type=int,
                         help="Tokens; all the model has if unset (LiteRT: at most 4096)."),
            click.option("--adapter", help="Directory of a LoRA adapter (PEFT's layout)."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def field_options(
    kinds: Mapping[str, type] | type, leave_out: Iterable[str] = ()
) -> Callable[[Command], Command]:
    """An option for each field of a dataclass, or of several by whose they are. Unset ones are
    None, so that whoever they are for decides."""
    owners = kinds if isinstance(kinds, Mapping) else {"": kinds}
    fields: dict[str, tuple[dataclasses.Field[Any], list[str]]] = {}
    for owner, kind in owners.items():
        for field in dataclasses.fields(kind):
            if field.name not in leave_out:
                fields.setdefault(field.name, (field, []))[1].append(owner)

    def decorate(command: Command) -> Command:
        for field, whose in reversed(fields.values()):
            apart = "" if "" in whose or len(whose) == len(owners) else f"{', '.join(whose)}: "
            command = _field_option(field, apart)(command)
        return command

    return decorate


def _field_option(field: dataclasses.Field[Any], apart: str) -> Callable[[Command], Command]:
    name, kind = "--" + field.name.replace("_", "-"), str(field.type)
    meaning = apart + field.metadata["help"]
    if isinstance(field.default, int | float | str) and "auto" not in str(field.default):
        meaning += f"  [{str(field.default).lower()}]"
    many = kind.startswith(("tuple", "Sequence")) and not field.default
    base = _KINDS.get(kind.split(" ")[0]) or (int if "[int" in kind else str)
    if base is bool:
        name = f"{name}/--no-{name[2:]}"
    return click.option(name, type=base, default=None, multiple=many, help=meaning)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were set."""
    return {name: value for name, value in options.items() if value is not None and value != ()}


def load_model(options: dict[str, Any]) -> Any:
    """Takes `load`'s options out of a command's and loads; the others are checked before."""
    from gemma_multi import GenerationOptions, load
    from gemma_multi.engines import backends

    own = [f.name for b in backends().values() for f in dataclasses.fields(b.options)]
    chosen = {name: options.pop(name) for name in LOAD}
    chosen |= given({name: options.pop(name) for name in own if name in options})
    GenerationOptions.merge({}, given(options))
    return load(**chosen)


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, ensure_ascii=False))

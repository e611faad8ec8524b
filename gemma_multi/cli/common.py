"""What the commands share: options made from dataclasses, where models come from, printing JSON."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from gemma_multi.errors import OptionError

Command = Callable[..., Any]
SOURCE = ("revision", "local_files_only", "progress")
PLACE = ("backend", "precision", "context_length", *SOURCE)


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
    command = click.option("--adapter", help="Directory of a LoRA adapter (PEFT's layout).")(
        place_options(command)
    )
    return click.option(
        "-m", "--model", default="storyteller", show_default=True,
        help="Bundled name, directory, exported file or Hugging Face id.",
    )(command)  # fmt: skip


def place_options(command: Command) -> Command:
    """What `load` takes but for which model; see `taken_place`."""
    from gemma_multi.engines import backends

    command = source_options(command)
    command = field_options({b.title: b.options for b in backends().values()})(command)
    for option in reversed(
        (
            click.option("-b", "--backend", default="auto", show_default=True,
                         help=f"auto, {', '.join(backends())}."),
            click.option("--precision", default="auto", show_default=True,
                         help="float32, bfloat16, float16, sfp8, int4, int8 or auto."),
            click.option("--context-length", type=int,
                         help="Tokens; all the model has if unset (LiteRT: at most 4096)."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def field_options(
    kinds: Mapping[str, type] | type, leave_out: Iterable[str] = (),
    unset: Mapping[str, str] | None = None,
) -> Callable[[Command], Command]:  # fmt: skip
    """An option for each field of a dataclass, or of several by whose they are. Unset ones are
    None, so that whoever they are for decides; `unset` says how, where not by the field's default.
    """
    owners = kinds if isinstance(kinds, Mapping) else {"": kinds}
    fields: dict[str, dict[str, tuple[type, dataclasses.Field[Any]]]] = {}  # name -> by owner
    for owner, kind in owners.items():
        for field in dataclasses.fields(kind):
            if field.name not in leave_out:
                fields.setdefault(field.name, {})[owner] = (kind, field)

    def decorate(command: Command) -> Command:
        for by_owner in reversed(fields.values()):
            meanings: dict[str, list[str]] = {}  # what an option means -> to whom
            for owner, (_, field) in by_owner.items():
                meaning = _meaning(field, (unset or {}).get(field.name))
                meanings.setdefault(meaning, []).append(owner)
            everybody = len(owners) == 1
            text = " ".join(
                meaning if everybody else f"{', '.join(whose)}: {meaning}"
                for meaning, whose in meanings.items()
            )
            command = _field_option(*next(iter(by_owner.values())), text)(command)
        return command

    return decorate


def _meaning(field: dataclasses.Field[Any], unset: str | None = None) -> str:
    default, meaning = field.default, str(field.metadata["help"])
    if unset is not None:
        said = re.sub(r" *\[[^]]*\]$", "", meaning)  # what it is elsewhere
        return f"{said}  [{unset}]"
    if isinstance(default, int | float | str) and "auto" not in str(default):
        meaning += f"  [{str(default).lower()}]"
    return meaning


def _field_option(
    kind: type, field: dataclasses.Field[Any], text: str
) -> Callable[[Command], Command]:
    name, hint = "--" + field.name.replace("_", "-"), typing.get_type_hints(kind)[field.name]
    inner = [h for h in typing.get_args(hint) or (hint,) if h not in (type(None), Ellipsis)]
    many = any((typing.get_origin(h) or h) in (tuple, Sequence) for h in (hint, *inner))
    many = many and not field.default  # else one text with commas
    base = next((h for h in _flat(hint) if h in (bool, int, float)), str)
    if base is bool:
        name = f"{name}/--no-{name[2:]}"
    return click.option(name, type=base, default=None, multiple=many, help=text)


def _flat(hint: Any) -> list[Any]:
    """The plain types in a type hint."""
    inner = typing.get_args(hint)
    return [plain for one in inner for plain in _flat(one)] if inner else [hint]


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were set."""
    return {name: value for name, value in options.items() if value is not None and value != ()}


def load_model(options: dict[str, Any]) -> Any:
    """Takes `load`'s options out of a command's and loads; the others are checked before."""
    from gemma_multi import load

    return load(**load_options(options))


def load_options(options: dict[str, Any]) -> dict[str, Any]:
    """`load`'s options, taken out of a command's; the others are checked."""
    from gemma_multi import GenerationOptions
    from gemma_multi.constraints import ConstraintOptions

    chosen = {name: options.pop(name) for name in ("model", "adapter")} | taken_place(options)
    constraints = {f.name: options.get(f.name) for f in dataclasses.fields(ConstraintOptions)}
    for name in ("schema", "grammar"):
        if (value := constraints[name]) is not None:
            options[name] = constraints[name] = read_file_or_text(value)
    ConstraintOptions(**given(constraints)).compile()
    GenerationOptions.merge({}, given({n: v for n, v in options.items() if n not in constraints}))
    return chosen


def taken_place(options: dict[str, Any]) -> dict[str, Any]:
    """Takes out of a command's options what says how any model is loaded, as `load` takes it."""
    return {name: options.pop(name) for name in PLACE} | _taken_own(options)


def _taken_own(options: dict[str, Any]) -> dict[str, Any]:
    """Those of backends that were set."""
    from gemma_multi.engines import backends

    own = [f.name for b in backends().values() for f in dataclasses.fields(b.options)]
    return given({name: options.pop(name) for name in own if name in options})


def argument_or_piped(text: str | None, what: str) -> str:
    """A command's argument, or what is piped in where it has none."""
    if text is not None:
        return text
    check_piped(what)
    return sys.stdin.read()


def check_piped(what: str) -> None:
    """Raises OptionError where somebody sits at the other end of standard input."""
    if sys.stdin is None or sys.stdin.isatty():
        raise OptionError(f"no {what}: give one as an argument or pipe it in")


def read_file_or_text(value: str) -> str:
    """What a file holds, or the value itself where it begins like JSON or a grammar's rule and no
    file is called that."""
    path = Path(value)
    try:
        if "\n" not in value and len(value) < 4096 and path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise OptionError(f"{value} cannot be read: {error}") from error
    if value.lstrip()[:1] in ("{", "[") or ":" in value:
        return value
    raise OptionError(f"there is no file {value!r}")


def json_list(name: str, value: str) -> list[Any]:
    """What `--name` gives as JSON, in a file or as it is. Raises OptionError for no list."""
    text = read_file_or_text(value)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"--{name} is not valid JSON: {error}") from None
    if not isinstance(found, list):
        raise OptionError(f"--{name} is {type(found).__name__}, expected a list")
    return found


def described_routes(routes: Iterable[str]) -> dict[str, str]:
    """`--route NAME=DESCRIPTION`, by name."""
    described: dict[str, str] = {}
    for one in routes:
        name, _, description = one.partition("=")
        if name in described:
            raise OptionError(f"--route {name!r} is there twice")
        described[name] = description
    return described


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, ensure_ascii=False))

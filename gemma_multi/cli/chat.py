"""`chat`: a conversation, in a terminal or through a pipe.

In a terminal turns are edited (`line_editor`), Ctrl-C stops an answer and not the program, Ctrl-D
leaves, and what went wrong is a line after which the chat goes on. Through a pipe a turn is a
line, nothing but answers goes to standard output, and what goes wrong ends it, as in any script.
The commands are the same in both.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_multi.cli.ask import answer_facts
from gemma_multi.cli.common import field_options, given, load_options, model_options, print_json
from gemma_multi.constraints import ConstraintOptions
from gemma_multi.errors import CheckpointError, ConstraintError, GemmaError, OptionError
from gemma_multi.sampling import GenerationOptions

if TYPE_CHECKING:
    from gemma_multi.generation import GenerationResult
    from gemma_multi.model import Model
    from gemma_multi.streaming import TextStream


@click.command()
@click.option("--system", help="Text in front of the conversation.")
@click.option("--history/--no-history", default=True,
              help="Keep what is typed for the next chat; only you can read it.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Each answer as one JSON object on a line.")
@model_options
@field_options(ConstraintOptions)
@field_options(GenerationOptions)
def chat(system: str | None, history: bool, as_json: bool, **options: Any) -> None:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D leaves, /help shows the commands.

    In a pipe each line is a turn.
    """
    from gemma_multi import load

    chosen = load_options(options)
    talk = _Talk(chosen, load(**chosen), given(options), system, as_json)
    if sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty()):
        _in_a_terminal(talk, history)
    else:
        for line in iter(sys.stdin.readline, ""):
            talk.hear(line)


def _in_a_terminal(talk: _Talk, history: bool) -> None:
    from gemma_multi.cli.line_editor import LineEditor
    from gemma_multi.terminal import notes

    source = talk.model.base.provenance.source
    _note(f"{source} on {talk.model.backend}. /help shows the commands, Ctrl-D leaves.")
    editor = LineEditor({f"/{name}": one.meaning for name, one in COMMANDS.items()}, history)
    talk.shows_speed = not talk.as_json
    while (text := editor.read()) is not None:
        try:
            talk.hear(text)
        except (GemmaError, OSError) as error:
            notes.print(str(error), markup=False)
        except KeyboardInterrupt:
            _note("stopped")


@dataclass
class _Talk:
    """The conversation, and all that its commands change."""

    loaded_with: dict[str, Any]  # what `load` was given
    model: Model
    options: dict[str, Any]  # of each answer
    system: str | None
    as_json: bool
    shows_speed: bool = False
    conversation: Any = field(init=False)

    def __post_init__(self) -> None:
        self.conversation = self.model.chat(self.system)

    def hear(self, text: str) -> None:
        """Does what a turn asks for. Raises GemmaError."""
        if text.startswith("/"):
            name, _, argument = text[1:].strip().partition(" ")
            if name not in COMMANDS:
                raise OptionError(
                    f"there is no command /{name}; /help shows those there are, and a space in "
                    "front makes it a turn"
                )
            COMMANDS[name].run(self, argument.strip())
        elif text.strip():
            self._answer(text.strip())

    def _answer(self, text: str) -> None:
        from gemma_multi.terminal import show_stream

        stream = self.conversation.stream(text, **self.options)
        with _stopped_by_ctrl_c(stream):
            try:
                if self.as_json:
                    stream.run()
                else:
                    show_stream(stream)
            except ConstraintError:
                raise
            except BaseException:
                stream.close()  # what was said so far was said
                raise
        if self.as_json:
            print_json(answer_facts(stream.result, self.model.backend))
        elif self.shows_speed:
            _note(_speed(stream.result))


@contextmanager
def _stopped_by_ctrl_c(stream: TextStream) -> Iterator[None]:
    """The first Ctrl-C ends the stream before its next token, so that nothing is cut in the
    middle; a second one, while a long prompt is read, does not wait."""

    def stop(*_: Any) -> None:
        stream.cancelled.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _speed(result: GenerationResult) -> str:
    count = result.generated_tokens
    said = f"{count} token{'' if count == 1 else 's'}"
    if result.tokens_per_second:
        said += f", {result.tokens_per_second:.0f} a second"
    why = {"cancelled": ", stopped", "length": ", cut at the most there may be"}
    return said + why.get(result.finish_reason, "")


def _note(text: str) -> None:
    from gemma_multi.terminal import notes

    notes.print(text, style="dim", markup=False)


# the commands


@dataclass(frozen=True)
class _Command:
    """What a turn that begins with a slash does."""

    argument: str  # for people
    meaning: str
    run: Callable[[_Talk, str], None]


def _reset(talk: _Talk, argument: str) -> None:
    _refuse(argument, "reset")
    talk.conversation.reset()


def _system(talk: _Talk, argument: str) -> None:
    if argument:
        talk.conversation = talk.model.chat(argument)
        _note("begun anew, with this in front")
    else:
        _note(talk.conversation.system or "there is no system text; /system TEXT sets one")


def _backend(talk: _Talk, argument: str) -> None:
    from gemma_multi import load
    from gemma_multi.engines import backends

    if not argument:
        here = [f"{one.name} *" if one.name == talk.model.backend else one.name
                for one in backends().values() if not one.missing()]  # fmt: skip
        _note(", ".join(here))
        return
    source = {"model": talk.model.base, "revision": None}  # which is open
    model = load(**{**talk.loaded_with, **source, "backend": argument})
    talk.conversation = model.chat(messages=_said(talk))
    talk.model = model
    _note(f"on {model.backend} ({model.engine.device}); the conversation goes on")


def _save(talk: _Talk, argument: str) -> None:
    from gemma_multi.files import check_output, write_atomically

    path = _path(argument, "save")
    if not talk.conversation.messages:
        raise OptionError("nothing was said yet")
    check_output(path, directory=False)
    row = json.dumps({"messages": _said(talk)}, ensure_ascii=False)
    try:
        write_atomically(path, f"{row}\n".encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    _note("saved; /load takes it up again, and `finetune` reads it as a row")


def _load(talk: _Talk, argument: str) -> None:
    path = _path(argument, "load")
    try:
        row = json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(row, dict) or set(row) != {"messages"}:
        raise OptionError(f"{path}: expected an object of 'messages', as /save writes it")
    try:
        talk.conversation = talk.model.chat(messages=row["messages"])
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None
    _note(f"{len(talk.conversation.messages)} messages")


def _help(talk: _Talk, argument: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from gemma_multi.terminal import notes

    _refuse(argument, "help")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, one in COMMANDS.items():
        table.add_row(Text(f"/{name} {one.argument}".rstrip()), Text(one.meaning))
    for key, meaning in KEYS.items():
        table.add_row(key, meaning)
    notes.print(table)


def _said(talk: _Talk) -> list[dict[str, str]]:
    """The conversation, system text included, as `Model.chat` takes it."""
    system = talk.conversation.system
    front = [{"role": "system", "content": system}] if system else []
    return [*front, *talk.conversation.messages]


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise OptionError(f"/{command} needs the name of a file")
    try:
        return Path(argument).expanduser()
    except RuntimeError:
        raise OptionError(f"{argument}: there is no such home directory") from None


def _refuse(argument: str, command: str) -> None:
    if argument:
        raise OptionError(f"/{command} takes nothing after it, received {argument!r}")


COMMANDS = {
    "reset": _Command("", "Begin anew.", _reset),
    "system": _Command("TEXT", "Begin anew with this in front; alone, show it.", _system),
    "save": _Command("FILE", "Write the conversation.", _save),
    "load": _Command("FILE", "Take one up again.", _load),
    "backend": _Command("NAME", "Go on with it on another; alone, show them.", _backend),
    "help": _Command("", "Show this.", _help),
}
KEYS = {
    "Alt-Enter": "A new line (so does Ctrl-J).",
    "Ctrl-C": "Stop an answer, or forget a line.",
    "Ctrl-D": "Leave.",
}

"""What is typed in a terminal: several lines, edited, with the history of earlier sessions.

Design choices:
- Enter sends. Alt-Enter and Ctrl-J begin a new line, and pasted text keeps the lines it has.
- The history is the user's data, not a cache: it lies in the user's data directory, in a file that
  only this user can read. Where none can be kept (no home, a full disk) a chat goes on without.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output


class LineEditor:
    """Reads what a user says, a turn at a time."""

    def __init__(self, commands: Mapping[str, str], keep_history: bool = True) -> None:
        """`commands` are completed with Tab: what is typed, and what it means."""
        self._session: PromptSession[str] = PromptSession(
            [("bold", "> ")],
            multiline=True,
            prompt_continuation="  ",
            completer=_Commands(commands),
            complete_while_typing=False,
            enable_history_search=True,
            key_bindings=_keys(),
            history=_history() if keep_history else InMemoryHistory(),
            # standard error where answers go to a file; None looks for a terminal without colours
            output=None if sys.stdout.isatty() else create_output(always_prefer_tty=True),
        )

    def read(self) -> str | None:
        """One turn; "" where Ctrl-C threw it away, None at the end (Ctrl-D)."""
        try:
            return self._session.prompt()
        except KeyboardInterrupt:
            return ""
        except EOFError:
            return None


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _Commands(Completer):
    """Completes the name of a command, where a turn begins with one."""

    def __init__(self, commands: Mapping[str, str]) -> None:
        self._commands = commands

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        for name, meaning in self._commands.items():
            if typed.startswith("/") and name.startswith(typed):
                yield Completion(name, -len(typed), display_meta=meaning)


def _history() -> History:
    try:
        base = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
        path = base / "gemma_multi" / "chat_history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        path.chmod(0o600)  # one that was there before
    except (OSError, RuntimeError):  # no room, no permission; no home
        return InMemoryHistory()
    return _Kept(path)


class _Kept(FileHistory):
    """A history that is kept as long as it can be."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)

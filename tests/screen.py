"""A terminal: a program in it believes that somebody sits there, and a test sees the screen."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any

import pexpect
import pyte


class Terminal:
    """Runs a command on a screen of so many columns; keys go in, and the screen can be looked at.
    What scrolled off it can be, too."""

    def __init__(self, command: list[str], columns: int = 80, rows: int = 30, **environment: str):
        self._screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.ByteStream(self._screen)
        env = {**os.environ, "TERM": "xterm-256color", **environment}
        for name in ("COLUMNS", "LINES", "CI"):
            env.pop(name, None)
        self.child: Any = pexpect.spawn(
            command[0], command[1:], dimensions=(rows, columns), env=env, timeout=120, echo=False
        )
        self.raw = b""  # all that was written
        # a real one says where its cursor is, when it is asked
        self._screen.write_process_input = lambda text: self.child.send(text)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.child.close(force=True)

    @property
    def lines(self) -> list[str]:
        """All that was shown, from the top."""
        gone = ["".join(row[x].data for x in range(self._screen.columns))
                for row in self._screen.history.top]  # fmt: skip
        return [line.rstrip() for line in [*gone, *self._screen.display]]

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip()

    def send(self, keys: str) -> None:
        self.child.send(keys)

    def say(self, text: str) -> None:
        """Types it, and Enter."""
        self.send(text + "\r")

    def wait_for(self, words: str, times: int = 1, patience: float = 60) -> None:
        """Until they were shown so often."""
        end = time.monotonic() + patience
        while self.text.count(words) < times:
            assert time.monotonic() < end, f"no {words!r} on the screen:\n{self.text}"
            assert self._read(), f"it ended without {words!r}:\n{self.text}"

    def ends(self) -> int:
        """The exit status."""
        while self._read():
            pass
        self.child.wait()
        return int(self.child.exitstatus if self.child.exitstatus is not None else -1)

    def _read(self) -> bool:
        try:
            chunk = self.child.read_nonblocking(4096, timeout=1)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += chunk
        self._stream.feed(chunk)
        return True

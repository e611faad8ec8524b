"""What is done and what was begun, in `ship.json`, so that a killed `ship` goes on where it was.

A stage has a fingerprint of all that its outcome follows from: its own options, and the
fingerprints of the stages that it builds on. One that is done under the same fingerprint is not
done again; one that was begun under it goes on with what it had written; under another it begins
anew, and so does every stage after it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_multi.files import check_output, read_optional_json, write_atomically

JOURNAL_FILE = "ship.json"


@dataclass(frozen=True)
class Stage:
    """One step of the way. `run` is told whether to go on with what is there, and gives facts."""

    name: str
    title: str  # what it does, for people
    run: Callable[[bool], dict[str, Any]]
    needs: tuple[str, ...] = ()  # stages
    depends_on: Mapping[str, Any] | None = None  # what else its outcome follows from
    leaves: tuple[str, ...] = ()  # files and directories that it writes


class Journal:
    """The stages of one output directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / JOURNAL_FILE
        found = read_optional_json(self.path)
        self.stages: dict[str, dict[str, Any]] = found.get("stages", {})
        self._fingerprints: dict[str, str] = {}

    @staticmethod
    def check(directory: Path) -> None:
        """Refuses what is neither free nor from a `ship`. Raises OptionError, CheckpointError."""
        if "\0" in str(directory) or not (directory / JOURNAL_FILE).is_file():
            check_output(directory, directory=True)

    def facts(self, name: str) -> dict[str, Any]:
        """What a finished stage found."""
        facts: dict[str, Any] = self.stages[name]["facts"]
        return facts

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took, all its tries together."""
        return {name: stage["seconds"] for name, stage in self.stages.items()}

    def pass_through(self, stages: Sequence[Stage], say: Callable[[int, str, str], None]) -> None:
        """Runs what is not done. `say` is told which stage it is, from 0, its title, and that it
        "begins", "goes on" or "was done"."""
        for i, stage in enumerate(stages):
            fingerprint = self._fingerprint(stage)
            before = self.stages.get(stage.name, {})
            same = before.get("fingerprint") == fingerprint
            if same and before.get("done"):
                say(i, stage.title, "was done")
                continue
            say(i, stage.title, "goes on" if same else "begins")
            if not same:
                for name in stage.leaves:
                    _remove(self.directory / name)
            spent = before["seconds"] if same else 0.0
            self._note(stage, fingerprint=fingerprint, done=False, seconds=spent, facts={})
            started = time.monotonic()
            try:
                facts = stage.run(same)
            except BaseException:
                with suppress(OSError):
                    self._note(stage, seconds=spent + time.monotonic() - started)
                raise
            self._note(stage, done=True, facts=facts, seconds=spent + time.monotonic() - started)

    def _note(self, stage: Stage, **changes: Any) -> None:
        self.stages[stage.name] = {**self.stages.get(stage.name, {}), **changes}
        content = json.dumps({"stages": self.stages}, indent=1, ensure_ascii=False)
        write_atomically(self.path, content.encode(errors="replace") + b"\n")

    def _fingerprint(self, stage: Stage) -> str:
        told = [stage.name, [self._fingerprints[name] for name in stage.needs],
                dict(stage.depends_on or {})]  # fmt: skip
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        self._fingerprints[stage.name] = digest
        return digest


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

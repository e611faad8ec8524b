"""Parts: what is done of a run, in a folder beside the output, until all of it is.

`OUTPUT.parts` has `manifest.json`, which says what was asked of which rows and weights, and a file
for each part that is done, written whole or not at all. So a killed process loses the part that it
was at, and a resumed run does those that are not there. A run that is asked for something else
than the manifest says is refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_multi.errors import BatchError, CheckpointError
from gemma_multi.files import new_directory, read_optional_json, write_atomically, write_json

_MANIFEST = "manifest.json"
_PART = re.compile(r"(\d+)\.jsonl")
_SAID = {  # of facts that are hashes, which say nothing to people
    "input_sha256": "other rows: its input has changed since",
    "weights_sha256": "other weights",
    "adapter_sha256": "another adapter",
}


class Parts:
    """The folder of a run that writes `output`."""

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(f"{output.name}.parts")

    @property
    def begun(self) -> bool:
        return self.folder.exists()

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Makes the folder, in place of another run's. Raises BatchError where it is no run's."""
        if self.begun:
            self.manifest()
            self.remove()
        with new_directory(self.folder) as folder:
            write_json(folder / _MANIFEST, facts)

    def manifest(self) -> dict[str, Any]:
        """What the run was asked for. Raises BatchError for a folder that is none of ours."""
        try:
            found = read_optional_json(self.folder / _MANIFEST)
        except CheckpointError as error:
            raise BatchError(str(error)) from None
        if not found:
            raise BatchError(f"{self.folder}: is there, but is no unfinished run; move it away")
        return found

    def check(self, facts: Mapping[str, Any]) -> None:
        """Raises BatchError where the run was asked for something else than `facts`."""
        before = self.manifest()
        for name, now in json.loads(json.dumps(facts)).items():
            if (then := before.get(name)) != now:
                what = _SAID.get(name, f"{name} {_short(then)}, and not {_short(now)}")
                raise BatchError(
                    f"{self.folder}: that run was begun with {what}; ask for the same, or begin "
                    "again with --overwrite"
                )

    def done(self) -> set[int]:
        """The numbers of those that are there."""
        found = (_PART.fullmatch(path.name) for path in self.folder.iterdir())
        return {int(match[1]) for match in found if match}

    def write(self, number: int, lines: bytes) -> None:
        write_atomically(self._path(number), lines)

    def answers(self) -> Iterator[dict[str, Any]]:
        """Of every row, in order."""
        for number in sorted(self.done()):
            with self._path(number).open("rb") as file:
                for line in file:
                    yield json.loads(line)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.jsonl"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."

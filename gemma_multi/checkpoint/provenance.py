"""Where weights come from and what was done to them: the NOTICE every save writes.

Gemma weights pass on the Gemma Terms of Use, which ask that the terms go along and that changes
are stated. `provenance.json` carries the facts from save to save; `NOTICE` is the same for people.
A checkpoint that says nothing is taken to be Gemma's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

GEMMA, APACHE = "gemma", "apache-2.0"
_TERMS = {
    GEMMA: (
        "Gemma is provided under and subject to the Gemma Terms of Use found at\n"
        "https://ai.google.dev/gemma/terms\n"
        "Use is also subject to the Gemma Prohibited Use Policy found at\n"
        "https://ai.google.dev/gemma/prohibited_use_policy"
    ),
    APACHE: (
        "Licensed under the Apache License, Version 2.0, found at\n"
        "https://www.apache.org/licenses/LICENSE-2.0"
    ),
}


@dataclass(frozen=True)
class Provenance:
    """Licence, source and modifications of a checkpoint."""

    license: str = GEMMA
    source: str = "unknown"
    revision: str = ""
    modifications: tuple[str, ...] = ()
    received_notice: str = ""  # the NOTICE of a source that is not ours, passed on whole

    def modified(self, how: str) -> Provenance:
        return replace(self, modifications=(*self.modifications, how))

    def notice(self) -> str:
        changes = "\n".join(f"- {how}" for how in self.modifications) or "- none"
        revision = f" (revision {self.revision})" if self.revision else ""
        received = f"\nReceived with this notice:\n{self.received_notice}\n" * bool(
            self.received_notice
        )
        return (
            f"{_TERMS[self.license]}\n\nSource: {self.source}{revision}\nModified:\n{changes}\n"
            + received
        )

    def save(self, directory: Path) -> None:
        text = json.dumps(asdict(self), indent=2) + "\n"
        (directory / "provenance.json").write_text(text, encoding="utf-8")
        (directory / "NOTICE").write_text(self.notice(), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path, source: str, revision: str) -> Provenance:
        """The directory's own account, or Gemma's terms and `source` where it has none."""
        try:
            data = json.loads((directory / "provenance.json").read_text(encoding="utf-8"))
            return cls(
                license=data["license"] if data["license"] in _TERMS else GEMMA,
                source=str(data["source"]),
                revision=str(data["revision"]),
                modifications=tuple(str(how) for how in data["modifications"]),
                received_notice=str(data.get("received_notice", "")),
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return cls(source=source, revision=revision, received_notice=_text(directory))


def _text(directory: Path) -> str:
    try:
        return (directory / "NOTICE").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""

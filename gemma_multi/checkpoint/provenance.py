"""Where weights come from and what was done to them: the NOTICE every save writes.

Gemma weights pass on the Gemma Terms of Use, which ask that the terms go along and that changes
are stated. `provenance.json` carries the facts from save to save; `NOTICE` is the same for people.
A checkpoint that says nothing is taken to be Gemma's. Of what comes from the hub, the hub's own
word on id, commit and licence stands.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

GEMMA, APACHE = "gemma", "apache-2.0"
PROVENANCE_FILE, NOTICE_FILE = "provenance.json", "NOTICE"
_LINKS = {
    GEMMA: "https://ai.google.dev/gemma/terms",
    APACHE: "https://www.apache.org/licenses/LICENSE-2.0",
}
_TERMS = {
    GEMMA: (
        "Gemma is provided under and subject to the Gemma Terms of Use found at\n"
        f"{_LINKS[GEMMA]}\n"
        "Use is also subject to the Gemma Prohibited Use Policy found at\n"
        "https://ai.google.dev/gemma/prohibited_use_policy"
    ),
    APACHE: (f"Licensed under the Apache License, Version 2.0, found at\n{_LINKS[APACHE]}"),
}


@dataclass(frozen=True)
class Provenance:
    """Licence, source and modifications of a checkpoint."""

    license: str = GEMMA
    source: str = "unknown"
    revision: str = ""
    modifications: tuple[str, ...] = ()
    received_notice: str = ""  # the NOTICE of a source that is not ours, passed on whole
    # which order its channels were put in when it was calibrated; "" for the source's own. An
    # adapter changes weights in one order and fits no other
    channels: str = ""

    @property
    def license_link(self) -> str:
        """Where the licence can be read."""
        return _LINKS[self.license]

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

    def from_hub(self, source: str, revision: str, license: str | None) -> Provenance:
        """The same as found on the hub: what the hub says of a repository (its id, the commit, the
        licence on its card) stands, whatever a file in it claims."""
        return replace(
            self, source=source, revision=revision, license=license if license in _TERMS else GEMMA
        )

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Provenance | None:
        """What `to_json` wrote; None for anything else."""
        try:
            data = json.loads(text)
            return cls(
                license=data["license"] if data["license"] in _TERMS else GEMMA,
                source=str(data["source"]),
                revision=str(data["revision"]),
                modifications=tuple(str(how) for how in data["modifications"]),
                received_notice=str(data.get("received_notice", "")),
                channels=str(data.get("channels", "")),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    @classmethod
    def read(cls, directory: Path) -> Provenance:
        """The directory's own account, or Gemma's terms and its name where it has none."""
        return cls.from_json(_text(directory / PROVENANCE_FILE)) or cls(
            source=directory.name, received_notice=_text(directory / NOTICE_FILE)
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""

"""`gemma-multi demo`: one bedtime story on every installed backend, and then from the phone's file.

The first part samples with one seed in float32, so that what differs can only be a bug. The
second exports a `.litertlm` and runs it twice, greedily: on the LiteRT engine here, and on
LiteRT-LM, the engine that Android apps use. A backend that is not installed, or cannot be on this
machine, is named and skipped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from gemma_multi.comparison.text import disagreements
from gemma_multi.comparison.tolerances import tolerance_of
from gemma_multi.engines import backends
from gemma_multi.errors import OptionError
from gemma_multi.exporting import export
from gemma_multi.litert_lm import ask_litert_lm
from gemma_multi.loading import load
from gemma_multi.model import Model
from gemma_multi.terminal import notes, show_stream

STORY = (
    "Tell me a bedtime story.\nHero: Pip the hedgehog\nSetting: an old lighthouse by the sea\n"
    "Twist: the monster was a hungry kitten\nTheme: courage\nLength: medium"
)


@dataclass(frozen=True)
class Telling:
    """One story, and who told it."""

    teller: str
    device: str
    text: str
    tokens: tuple[int, ...]
    tokens_per_second: float


@dataclass
class Outcome:
    """All that was told, and whether it was the same."""

    tellings: list[Telling] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # in words
    from_the_file: dict[str, str] = field(default_factory=dict)  # by teller
    file_bytes: int = 0

    @property
    def same(self) -> bool:
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}


def run(seed: int, silent: bool = False) -> Outcome:
    """Tells the stories, as they come unless `silent`. Raises OptionError without a backend."""
    outcome = Outcome()
    for backend in backends().values():
        if backend.is_reference:
            continue
        if missing := backend.missing():
            why = f"{backend.title}: {', '.join(missing)} not installed, skipped"
            outcome.skipped.append(why)
            notes.print(f"[dim]{why}[/dim]")
            continue
        outcome.tellings.append(_tell(backend.name, backend.title, seed, silent))
    if not outcome.tellings:
        raise OptionError("no backend is installed; see gemma-multi doctor")
    outcome.differences += _differences(outcome.tellings)
    if any(telling.teller == "LiteRT" for telling in outcome.tellings):
        _tell_from_the_file(outcome, silent)
    return outcome


def show(outcome: Outcome) -> None:
    """What was found, in colour."""
    click.echo()
    for difference in outcome.differences:
        click.secho(difference, fg="red")
    names = [telling.teller for telling in outcome.tellings]
    if len(names) == 1:
        click.echo(f"Only {names[0]} is installed here, so there is nothing to compare.")
    elif not _differences(outcome.tellings):
        count = len(outcome.tellings[0].tokens)
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        click.secho(f"{listed} gave the same {count} tokens.", fg="green")
    told = " and ".join(outcome.from_the_file)
    if len(set(outcome.from_the_file.values())) == 1 < len(outcome.from_the_file):
        click.secho(f"{told} told the same story from the file for phones.", fg="green")
    elif len(outcome.from_the_file) > 1 and outcome.same:
        click.secho(f"{told} told the same story from the file for phones, but for a tie: two "
                    "words were equally likely, and they parted there.", fg="green")  # fmt: skip


def _tell(name: str, title: str, seed: int, silent: bool) -> Telling:
    model = load("storyteller", backend=name, precision="float32", progress=not silent)
    stream = model.stream(STORY, seed=seed)
    _show(f"{title} ({model.engine.device})", stream, silent)
    result = stream.result
    if not silent:
        speed = f"{result.generated_tokens} tokens, {result.tokens_per_second:.0f} a second"
        click.secho(f"\n  {speed}", dim=True)
    return Telling(title, model.engine.device, result.text, result.tokens, result.tokens_per_second)


def _show(teller: str, pieces: Iterable[str], silent: bool) -> None:
    if silent:
        for _ in pieces:
            pass
        return
    click.secho(f"\n{teller} tells:\n", bold=True)
    show_stream(pieces, indent="  ")


def _differences(tellings: list[Telling]) -> list[str]:
    first, *others = tellings
    found = []
    for other in others:
        if first.tokens != other.tokens:
            pairs = enumerate(zip(first.tokens, other.tokens, strict=False))
            end = min(len(first.tokens), len(other.tokens))
            at = next((i for i, (x, y) in pairs if x != y), end)
            found.append(f"{first.teller} and {other.teller} differ from token {at} on.")
    return found


def _tell_from_the_file(outcome: Outcome, silent: bool) -> None:
    """Exports, then compares our LiteRT engine with Google's on the same file."""

    def skip(why: str) -> None:
        outcome.skipped.append(why)
        notes.print(f"[dim]{why}[/dim]")

    try:
        from litert_lm_builder import litertlm_builder as _  # noqa: F401  needed to export
    except ImportError:
        skip(".litertlm: litert-lm-builder not installed, skipped")
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "storyteller.litertlm"
        report = export("storyteller", path, verify=False, progress=not silent)
        outcome.file_bytes = report.nbytes
        if not silent:
            size = f"{report.nbytes / 1e6:.1f} MB of {report.precision}"
            click.echo(f"\nExported {path.name}: {size}.")
        model = load(path, progress=not silent)
        ours = model.generate(STORY, temperature=0).text.strip()
        outcome.from_the_file["Our LiteRT engine"] = ours
        try:
            theirs = ask_litert_lm(path, STORY).strip()
        except ImportError:
            skip("LiteRT-LM: litert-lm-api not installed, skipped")
            return
    _show("LiteRT-LM, which runs it on Android,", [theirs], silent)
    outcome.from_the_file["LiteRT-LM"] = theirs
    if ours != theirs:
        outcome.differences += _no_ties(model, theirs)


def _no_ties(model: Model, theirs: str) -> list[str]:
    """What parts the two stories for good. Both round activations to int8, each in its own order,
    so that where two tokens are as good as equal either may come."""
    tie = tolerance_of(model.engine.compute, model.engine.compute).tie
    found = disagreements(model, model.encode(STORY), theirs, tie)
    return [
        f"LiteRT-LM said {one.received} at token {one.position}, where our LiteRT engine would say "
        f"{one.expected} ({one.gap:.2g} apart)."
        for one in found
        if not one.tie
    ]

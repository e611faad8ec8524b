"""Draws `docs/demo.svg`, a terminal after `gemma-multi demo`: python docs/make_pictures.py

Every word comes from a run on this machine. Of each story the first paragraph is kept, and `[...]`
stands for the others; speeds, which are one machine's, are left out. The SVG asks for a font of the
reader's own and fetches none.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from click.testing import CliRunner
from rich.console import Console
from rich.padding import Padding
from rich.terminal_theme import MONOKAI
from rich.text import Text

from gemma_multi.cli import cli

PICTURE = Path(__file__).with_name("demo.svg")
WIDTH = 88
_FETCHED_FONTS = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)
_INDENT = "  "  # of a story's paragraphs


def demo() -> str:
    """What the command prints, in colour. Raises SystemExit where it fails."""
    done = CliRunner().invoke(cli, ["demo"], color=True)
    if done.exit_code:
        raise SystemExit(done.output)
    return done.stdout


def shortened(output: str) -> list[Text]:
    """Its lines, with the first paragraph of each story, and without speeds."""
    lines: list[Text] = []
    inside = False  # a story of which the first paragraph was kept
    for line in Text.from_ansi(output).split(allow_blank=True):
        story = line.plain.startswith(_INDENT)
        if inside and (story or not line.plain):
            continue
        if inside:
            lines += [Text(f"{_INDENT}[...]", style="dim"), Text()]
        lines.append(line)
        inside = story
    return lines


def draw(lines: list[Text]) -> str:
    """A terminal that shows them after the command, as SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text("$ gemma-multi demo", style="bold green"))
    for line in lines:
        indent = len(_INDENT) if line.plain.startswith(_INDENT) else 0
        line = line[indent:] if indent else line
        console.print(Padding(line, (0, 0, 0, indent)) if line.plain else "")
    picture = console.export_svg(title="gemma-multi demo", theme=MONOKAI, unique_id="demo")
    return _FETCHED_FONTS.sub("", picture)


if __name__ == "__main__":
    PICTURE.write_text(draw(shortened(demo())), encoding="utf-8")

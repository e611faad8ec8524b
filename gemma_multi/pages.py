"""What the pages of reports have in common: one HTML file, no script, nothing fetched, light and
dark, phone or desk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from gemma_multi import __version__
from gemma_multi.errors import OptionError
from gemma_multi.files import write_atomically

MOST_ROWS = 40  # of a table that is folded away
_LONGEST = 400  # characters of a text in a table
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1f23; --soft: #5b6470; --faint: #c9ced6;
  --card: #f5f6f8; --good: #11734b; --bad: #b3261e; --limit: #b3261e;
  --series-1: #1f6feb; --series-2: #c2571a; --series-3: #7a3fc0; --series-4: #11734b; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e8eb; --soft: #9aa4b0;
  --faint: #3a4149; --card: #1d2125; --good: #4cc38a; --bad: #ff8078; --limit: #ff8078;
  --series-1: #6cb0ff; --series-2: #ffa05c; --series-3: #c49bff; --series-4: #4cc38a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .25rem 0 .75rem; max-width: 48rem; }
.soft { color: var(--soft); }
.ok { color: var(--good); } .fail { color: var(--bad); }
.mark { font-weight: 600; white-space: nowrap; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); }
figure { margin: 0; max-width: 40rem; padding: .75rem; background: var(--card);
  border-radius: .5rem; }
figcaption { font-size: .85rem; color: var(--soft); }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0;
  border-bottom: 1px solid var(--faint); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: .85em; overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: .75rem; background: var(--card); border-radius: .5rem; }
pre code { overflow-wrap: normal; }
details { margin: .75rem 0; } summary { cursor: pointer; }
"""


def check_page(path: Path) -> None:
    """Refuses a place where no page can be written. Raises OptionError."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"{path}: the page is HTML; give it a name that ends in .html")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OptionError(f"{path}: cannot be written; its directory must exist")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise OptionError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_page(page: str, path: Path) -> Path:
    """Half a character becomes a question mark. Raises OptionError where the disk refuses it."""
    try:
        write_atomically(path, page.encode(errors="replace"))
    except OSError as error:
        raise OptionError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def document(headline: str, scope: str, parts: Iterable[str], mark: str = "") -> str:
    """The whole HTML: a headline (`mark` is "ok", "fail" or nothing), a soft line on what was
    looked at, and the parts, which are HTML already."""
    return "\n".join((
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(headline)}</title><style>{_STYLE}</style></head><body>",
        f'<header><h1 class="{mark}">{escape(headline)}</h1>',
        f'<p class="soft">{escape(scope)}. Made by gemma_multi {__version__}.</p></header>',
        *parts,
        "</body></html>\n",
    ))  # fmt: skip


def figures(drawn: Iterable[tuple[str, str]]) -> str:
    """Plots as (SVG, what it shows) side by side."""
    cards = "".join(f"<figure>{svg}<figcaption>{text}</figcaption></figure>" for svg, text in drawn)
    return f'<div class="plots">{cards}</div>'


def mark(passed: bool) -> str:
    return f'<span class="mark {"ok" if passed else "fail"}">{"ok" if passed else "FAIL"}</span>'


def number(value: float) -> str:
    text = f"{value:.1e}" if value and not 0.01 <= value < 1000 else f"{value:.3g}"
    return text.replace("-", "\u2011")  # at which no line breaks


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def confusion_table(confusion: Mapping[str, Mapping[str, int]], columns: Sequence[str]) -> str:
    """Expected label -> given label -> rows, the right ones bold."""
    rows = [
        [f"<b>{escape(want)}</b>", *(
            f"<b>{counts[label]}</b>" if label == want else str(counts[label] or "·")
            for label in columns
        )]
        for want, counts in confusion.items()
    ]  # fmt: skip
    return table(["expected", *map(escape, columns)], rows)


def shorten(text: str) -> str:
    """As much of a text as a table's cell should hold."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def details(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], most: int = MOST_ROWS
) -> str:
    """A table that is folded away."""
    more = f"<p>and {len(rows) - most} more; see the JSON.</p>" if len(rows) > most else ""
    return (
        f"<details><summary>{title} ({len(rows)})</summary>{table(header, rows[:most])}{more}"
        "</details>"
    )

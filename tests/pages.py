"""The documentation as tests read it: pages, their blocks of code, and what a block means to be.

A block of Python whose first line is a comment that begins with `needs` or `takes` (the real
weights, a GPU, a minute) is not run; readers are told the same by it. All others run in the order
of their page, in one namespace, in a directory with some rows.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import gemma_multi
from gemma_multi.cli import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = sorted(DOCS.rglob("*.md"))
PAGES = [ROOT / "README.md", *SITE, *sorted((ROOT / "examples").rglob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_IN_REPOSITORY = re.compile(r"`((?:benchmarks|docs|examples|gemma_multi|tests)/[\w./-]+)`")
_COMMAND = re.compile(r"(?:^|\| )gemma-multi (.*)$", re.MULTILINE)
_REDIRECTED = re.compile(r" [<>] \S+")
_NOT_RUN = re.compile(r"# (needs|takes) ")
# what a name is in every page
_NAMED: dict[str, Any] = {
    "gemma_multi": gemma_multi,
    "model": gemma_multi.Model,
    "chat": gemma_multi.Chat,
    "stream": gemma_multi.TextStream,
    "checkpoint": gemma_multi.Checkpoint,
}


@dataclass(frozen=True)
class Block:
    """Code of a page."""

    page: Path
    line: int
    text: str

    @property
    def runs(self) -> bool:
        return not _NOT_RUN.match(self.text)

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def run(self, namespace: dict[str, Any]) -> None:
        # its lines are those of the page, so that a traceback leads there
        code = "\n" * (self.line - 1) + self.text
        exec(compile(code, str(self.page), "exec", dont_inherit=True), namespace)


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start(2)) + 1, found[2])
        for found in _FENCE.finditer(text)
        if found[1] == language
    ]


def links(page: Path) -> list[str]:
    """Where a page's relative links lead, without the place in the page."""
    found = _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    return [link.split("#")[0] for link in found if not re.match(r"\w+:|#", link)]


def files_named(page: Path) -> list[str]:
    """The files and folders of the repository that a page names."""
    return _IN_REPOSITORY.findall(page.read_text(encoding="utf-8"))


def pages_with(language: str) -> list[Any]:
    return [page for page in PAGES if blocks(page, language)]


def called(block: Block) -> Iterator[tuple[Any, ast.Call]]:
    """What a block calls of this package, and the call. Raises AttributeError for a name of it that
    is not there."""
    for node in ast.walk(ast.parse(block.text)):
        function = node.func if isinstance(node, ast.Call) else node
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            owner = _NAMED.get(function.value.id)
            if isinstance(node, ast.Call) and owner is not None:
                yield getattr(owner, function.attr), node
            elif owner is gemma_multi:
                getattr(gemma_multi, function.attr)


def refused(function: Any, call: ast.Call) -> str | None:
    """Why a function would refuse a call's arguments by their names and number, if it would."""
    signature = inspect.signature(function)
    itself = [None] if "self" in signature.parameters else []
    try:
        signature.bind(*itself, *call.args, **{word.arg: None for word in call.keywords})
    except TypeError as error:
        return str(error)
    return None


def commands(block: Block) -> list[list[str]]:
    """The words of each `gemma-multi` command line of a block, after the program's name."""
    lines = _REDIRECTED.sub("", block.text.replace("\\\n", " "))
    return [shlex.split(line, comments=True) for line in _COMMAND.findall(lines)]


def parse(words: list[str]) -> None:
    """Reads a command line as the program does, and runs nothing. Raises click's UsageError."""
    context = click.Context(cli, info_name="gemma-multi")
    command: click.Command = cli
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(context, words)
        assert command is not None
        context = click.Context(command, info_name=name, parent=context)
    command.make_parser(context).parse_args(list(words))


def write_rows(directory: Path) -> None:
    """What pages take for the reader's own: rows and texts."""
    texts = ["The kettle broke after a week.", "I love it.", "It came on Tuesday."] * 8
    rows = [{"prompt": text, "completion": "positive"} for text in texts]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "texts.txt").write_text("\n".join(texts))

"""The README and the site: every block of code is what it says, every page is found, every link
leads somewhere, and nothing is fetched from elsewhere."""

from __future__ import annotations

import html.parser
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pages
import pytest

import gemma_multi

README = pages.ROOT / "README.md"
# what a page loads, by the attribute that says from where
_LOADING = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


def named(page: Path) -> str:
    return str(page.relative_to(pages.ROOT))


@pytest.mark.parametrize("page", pages.pages_with("python"), ids=named)
def test_what_a_page_prints_as_python_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pages.write_rows(tmp_path)
    namespace: dict[str, Any] = {}
    for block in pages.blocks(page, "python"):
        if block.runs:
            block.run(namespace)
    if page == README:
        check_that_one_text_came_three_times(capsys.readouterr().out)


def check_that_one_text_came_three_times(said: str) -> None:
    said = said.removesuffix("\n")
    third = said[: len(said) // 3]
    assert len(third) > 100
    assert said == "\n".join([third] * 3)


@pytest.mark.parametrize("page", pages.pages_with("python"), ids=named)
def test_names_and_arguments_are_there_in_what_is_not_run_too(page: Path) -> None:
    for block in pages.blocks(page, "python"):
        for function, call in pages.called(block):
            why = pages.refused(function, call)
            assert why is None, f"{block.where}: {function.__qualname__}: {why}"


@pytest.mark.parametrize("page", pages.pages_with("sh"), ids=named)
def test_commands_have_the_options_that_a_page_gives_them(page: Path) -> None:
    for block in pages.blocks(page, "sh"):
        for words in pages.commands(block):
            try:
                pages.parse(words)
            except click.UsageError as error:
                pytest.fail(f"{block.where}: {' '.join(words)}: {error.message}")


@pytest.mark.parametrize(
    ("block", "why"),
    [("gemma_multi.absent()", "no attribute 'absent'"),
     ("gemma_multi.trim('m', corpse=1)", "unexpected keyword argument 'corpse'"),
     ("model.embed()", "missing a required argument: 'texts'"),
     ("chat.tell('a')", "no attribute 'tell'")],
)  # fmt: skip
def test_a_wrong_name_would_be_found(block: str, why: str) -> None:
    try:
        found = [pages.refused(*one) for one in pages.called(pages.Block(Path(), 1, block))]
    except AttributeError as error:
        found = [str(error)]
    assert why in str(found)


@pytest.mark.parametrize("line", ["gemma-multi quantise m -o x", "a | gemma-multi info m --jsn"])
def test_a_wrong_command_would_be_found(line: str) -> None:
    (words,) = pages.commands(pages.Block(Path(), 1, line))
    with pytest.raises(click.UsageError):
        pages.parse(words)


@pytest.mark.parametrize("page", pages.PAGES, ids=named)
def test_files_that_a_page_names_and_links_are_there(page: Path) -> None:
    where = [pages.ROOT / name for name in pages.files_named(page)]
    where += [page.parent / link for link in pages.links(page)]
    assert [str(path) for path in where if not path.exists()] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 200


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(page.read_text() for page in (pages.DOCS / "reference").glob("*.md"))
    listed = {line.rsplit(".", 1)[1] for line in text.splitlines() if line.startswith("::: ")}
    assert set(gemma_multi.__all__) <= listed


class _Loaded(html.parser.HTMLParser):
    """What a page of the site fetches from elsewhere as it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(_LOADING.get(tag, "")) or ""
        if address.startswith(("http:", "https:", "//")):
            self.elsewhere.append(address)


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir",
         str(tmp_path / "site")],
        cwd=pages.ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert len(built) == len(pages.SITE) + 1  # and 404.html
    seen = _Loaded()
    for page in built:
        seen.feed(page.read_text(encoding="utf-8"))
    assert seen.elsewhere == []
    assert not [s for s in (tmp_path / "site").rglob("*.css") if "//fonts." in s.read_text()]
    reference = tmp_path / "site" / "reference"
    assert "<code>progress</code>: True for a bar" in (reference / "verbs.html").read_text()
    assert "generated ids, without a stop token" in (reference / "results.html").read_text()

"""The notebooks of the examples, run from top to bottom in a kernel of their own; and what they
keep of an earlier run."""

from __future__ import annotations

import base64
import re
import runpy
import struct
from pathlib import Path
from typing import Any

import pytest
from needs import package

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
# what a notebook shows, wherever it runs
SHOWN = {
    "five_minute_finetune": [
        r"parameters: 3,519,392", r"right answers: \d+% before, (9\d|100)% after",
        r"repair +[01]\.\d+  My new umbrella", r"order +[01]\.\d+  Four umbrellas",
        r"as it is: nan +at 1/16: 0\.00\d", r"log-probabilities of \d+ tokens: within 0\.05",
    ],
    "mac_to_android": [
        r"Pip", r"litert: the same weights, bit for bit: yes", r"correlation (1\.0|0\.99)",
        r"(agrees with|gives the same answers as)", r"LiteRT-LM: shipping\nthis package: shipping",
    ],
}  # fmt: skip
LARGEST_PICTURE = 40_000  # bytes


def read(name: str) -> Any:
    return package("nbformat", "test").read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [one for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs]


def text(notebook: Any) -> str:
    return "".join(one.text for one in outputs(notebook) if one.output_type == "stream")


def pictures(notebook: Any) -> list[bytes]:
    return [base64.b64decode(one.data["image/png"]) for one in outputs(notebook)
            if "image/png" in one.get("data", {})]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_it_runs_and_shows_what_was_kept(name: str, tmp_path: Path) -> None:
    package("nbclient", "test")
    executed = runpy.run_path(str(FOLDER / "execute.py"))["executed"]
    made, kept = executed(FOLDER / f"{name}.ipynb", tmp_path), read(name)
    for notebook in (made, kept):
        for pattern in SHOWN[name]:
            assert re.search(pattern, text(notebook)), pattern
    assert [one.output_type for one in outputs(made)] == [one.output_type for one in outputs(kept)]
    assert len(pictures(made)) == len(pictures(kept)) > 0


def test_there_is_no_other_notebook() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_what_was_kept_is_small_and_of_no_machine(name: str) -> None:
    for picture in pictures(read(name)):
        assert len(picture) < LARGEST_PICTURE
        width, _ = struct.unpack(">II", picture[16:24])
        assert width < 600
    shown = text(read(name))
    assert not re.search(r"(^|\s)(/\w+/|[A-Z]:\\)", shown)  # nor a path
    assert not re.search(r"\b\d+(\.\d+)? ?(s|seconds|ms)\b", shown)  # nor a time


@pytest.mark.parametrize("name", SHOWN)
def test_it_begins_in_a_fresh_environment(name: str) -> None:
    """The first cell of code installs the package where it is not there, with extras that exist."""
    first = next(cell for cell in read(name).cells if cell.cell_type == "code")
    assert "except ImportError" in first.source
    (asked,) = re.findall(r'%pip install --quiet "gemma-multi\[([^"]+)\]"', first.source)
    pyproject = (FOLDER.parents[1] / "pyproject.toml").read_text()
    for extra in asked.replace("{extra}", "cuda,keras").split(","):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), extra


@pytest.mark.parametrize("name", SHOWN)
def test_links_lead_somewhere(name: str) -> None:
    for cell in read(name).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(([^)\s]+)\)", cell.source):
                assert (FOLDER / link).exists(), link

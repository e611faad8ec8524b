"""The report's page in a real browser: on a phone, at a desk, in the dark; it fetches nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browse, served

from gemma_multi import OptionError, ParityReport, parity
from gemma_multi.comparison.prompts import Prompt

PHONE, DESK = 390, 1200  # CSS pixels

# Shows the page in a frame as wide as a screen, measures it, and leaves the figures in the title.
HARNESS = """<!doctype html><iframe id="f" width="%d" height="800" style="border:0"></iframe>
<script>
const frame = document.getElementById("f");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width);
  const words = [...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect());
  const look = frame.contentWindow.getComputedStyle(page.body);
  const ink = frame.contentWindow.getComputedStyle(page.querySelector("svg text"));
  document.title = JSON.stringify({scroll: root.scrollWidth, plots: wide, words: words.length,
    smallest: Math.min(...words.map(r => r.height)),
    paper: look.backgroundColor, ink: look.color, plot_ink: ink.fill,
    heading: page.querySelector("h1").textContent});
};
frame.src = "report.html";
</script>"""


@pytest.fixture(scope="module")
def site(report: ParityReport, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page and its harness over HTTP."""
    folder = tmp_path_factory.mktemp("site")
    report.save(folder / "report.html")
    for width in (PHONE, DESK):
        (folder / f"{width}.html").write_text(HARNESS % width)
    with served(folder) as address:
        yield address


def look(url: str, dark: bool, profile: Path) -> dict[str, Any]:
    with browse(
        url, profile, "--disable-gpu", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--window-size=1300,900", "--virtual-time-budget=10000", "--dump-dom",
    ) as browser:  # fmt: skip
        page, said = browser.communicate(timeout=120)
    title = re.search("<title>(.*?)</title>", page)
    assert title, said[-2000:]
    found: dict[str, Any] = json.loads(title.group(1))
    return found


def test_the_page_fits_a_phone_and_a_desk_in_light_and_dark(
    report: ParityReport, site: str, tmp_path: Path
) -> None:
    seen = {
        (width, dark): look(f"{site}/{width}.html", dark, tmp_path / f"{width}{dark}")
        for width in (PHONE, DESK) for dark in (False, True)
    }  # fmt: skip
    for (width, _), found in seen.items():
        assert found["heading"] == report.headline
        assert found["scroll"] <= width  # nothing to scroll sideways
        assert len(found["plots"]) == 4
        assert all(250 < wide < width for wide in found["plots"])
        assert found["words"] > 40  # labels are text
        assert found["smallest"] >= 7  # pixels high
        assert found["plot_ink"] == found["ink"]
    assert seen[PHONE, False]["paper"] == "rgb(255, 255, 255)"
    assert seen[PHONE, True]["paper"] == "rgb(20, 23, 26)"


def test_the_page_is_one_file_that_fetches_nothing(report: ParityReport, tmp_path: Path) -> None:
    page = report.save(tmp_path / "page.html").read_text()
    assert "<script" not in page
    addresses = set(re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", page))
    assert all(address.startswith("#") for address in addresses), addresses
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_words_from_prompts_cannot_become_markup(tmp_path: Path) -> None:
    prompts = [Prompt("<script>alert(1)</script>", "a", kind="<b>", language="&")]
    found = parity("storyteller", ["keras", "litert"], prompts=prompts, max_tokens=2)
    page = found.save(tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<b>&" not in page.replace("<b>keras", "")


def test_half_a_character_does_not_lose_the_page(tmp_path: Path) -> None:
    prompts = [Prompt("n\ud800", "Hello")]
    found = parity("storyteller", ["keras", "litert"], prompts=prompts, max_tokens=2)
    assert "n?" in found.save(tmp_path / "page.html").read_text()


@pytest.mark.parametrize("name", ["page.pdf", "absent/page.html", "."])
def test_a_place_that_cannot_hold_a_page_is_refused(
    report: ParityReport, tmp_path: Path, name: str
) -> None:
    with pytest.raises(OptionError, match="page"):
        report.save(tmp_path / name)

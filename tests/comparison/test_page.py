"""The report's page in a real browser: on a phone, at a desk, in the dark; it fetches nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import PHONE, looks

from gemma_multi import OptionError, ParityReport, parity
from gemma_multi.comparison.prompts import Prompt


def test_the_page_fits_a_phone_and_a_desk_in_light_and_dark(
    report: ParityReport, tmp_path: Path
) -> None:
    seen = looks(report.save(tmp_path / "report.html"))
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

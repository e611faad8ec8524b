"""`ship` on the real Gemma 3 270M with rows that people wrote and judged: `make real`."""

from __future__ import annotations

from pathlib import Path

import pytest
from other_peoples_files import gemma_270m
from real_rows import film_reviews

import gemma_multi

pytestmark = pytest.mark.real

ROWS, UNSEEN = 60, 60


def test_sixty_rows_make_a_specialist_that_ships(tmp_path: Path) -> None:
    rows = film_reviews()
    report = gemma_multi.ship(
        gemma_270m(), rows[UNSEEN : UNSEEN + ROWS], tmp_path / "out", validation=rows[:UNSEEN],
        backend="keras", epochs=5, progress=False,
    )  # fmt: skip
    print(f"\n{report}")
    before, after, shipped = (
        report.scores[when].estimate.value for when in ("before", "after", "shipped")
    )
    assert shipped > before
    assert abs(shipped - after) < 0.05  # int8 activations cost little
    assert report.passed, report.parity_line
    assert 145e6 < report.file.stat().st_size < 170e6
    assert report.license == "gemma"
    assert "Gemma Terms of Use" in (report.model / "NOTICE").read_text()
    assert "ai.google.dev/gemma/terms" in report.page.read_text()

"""docs/formats/table.md is made of the results that are kept."""

from __future__ import annotations

import json

from format_table import LINES, PAGE, RESULTS, page


def test_the_page_is_that_of_the_results() -> None:
    found = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page(found)
    assert {(one["format"], one["precision"]) for one in found} <= {
        (line.format, line.precision) for line in LINES
    }

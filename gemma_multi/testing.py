"""Parity in your own tests: `assert_parity`, and a pytest plugin with the `gemma_parity` fixture.

    from gemma_multi.testing import assert_parity

    def test_the_phone_says_what_the_mac_says():
        assert_parity("my-model", ["mlx", "litert"])

The plugin is there wherever this package is installed; it imports nothing until it is used. With
`pytest --gemma-report DIRECTORY` the fixture leaves a page and the JSON for each comparison, for
people to read and for continuous integration to keep.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gemma_multi.comparison import ParityReport

Check = Callable[..., "ParityReport"]


def assert_parity(
    model: Any = "storyteller", backends: str | Sequence[str] = "auto", **options: Any
) -> ParityReport:
    """Fails with every level that is out of tolerance; for the options see `gemma_multi.parity`."""
    __tracebackhide__ = True  # pytest shows the test's line
    from gemma_multi import parity

    report = parity(model, backends, **options)
    _check(report)
    return report


def _check(report: ParityReport) -> None:
    __tracebackhide__ = True
    if not report.passed:
        raise AssertionError("\n".join([f"{report.headline}:", *report.failures]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("gemma_multi").addoption(
        "--gemma-report", metavar="DIRECTORY", type=Path,
        help="leave a page and the JSON of each parity comparison there",
    )  # fmt: skip


@pytest.fixture(scope="session")
def gemma_parity(request: pytest.FixtureRequest) -> Check:
    """`assert_parity`, once per session for the same arguments, with pages if asked for."""
    directory: Path | None = request.config.getoption("--gemma-report")
    if directory is not None:
        _prepare(directory)
    known: dict[str, tuple[Any, ParityReport]] = {}

    def check(
        model: Any = "storyteller", backends: str | Sequence[str] = "auto", **options: Any
    ) -> ParityReport:
        __tracebackhide__ = True
        from gemma_multi import parity

        # the model is kept, so its id stays its own
        name = model if isinstance(model, str | Path) else id(model)
        key = repr((name, backends, sorted(options.items())))
        if key not in known:
            report = parity(model, backends, **options)
            if directory is not None:
                _leave(report, directory, key)
            known[key] = (model, report)
        _check(known[key][1])
        return known[key][1]

    return check


def _prepare(directory: Path) -> None:
    """Fails before minutes of work what would fail after them."""
    from gemma_multi.comparison.page import check_page

    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        pytest.fail(f"--gemma-report {directory}: {error.strerror}", pytrace=False)
    check_page(directory / "page.html")


def _leave(report: ParityReport, directory: Path, key: str) -> None:
    """`key` tells comparisons of the same sides apart, with other prompts or options."""
    from gemma_multi.files import write_atomically

    sides = [report.comparisons[0].reference, *(c.other for c in report.comparisons)]
    words = "-".join([report.model, *(side.name for side in sides)])
    name = re.sub(r"[^\w.-]+", "_", words)[-100:]
    stem = directory / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    write_atomically(Path(f"{stem}.json"), json.dumps(report.to_dict(), indent=1).encode())
    report.save(f"{stem}.html")

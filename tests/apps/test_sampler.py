"""The page's sampler against Python's: the same logits, the same tokens."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import served
from playwright.sync_api import Browser, Page

import gemma_multi
from gemma_multi.sampling import GenerationOptions, choose

ROWS, VOCABULARY = 40, 4096
SEEN = [5, 7, 7, 4000]

_LOAD = """async ([data, rows]) => {
  const {choose} = await import("./sampler.js");
  const all = new Float32Array(Uint8Array.from(atob(data), (c) => c.charCodeAt(0)).buffer);
  const size = all.length / rows;
  self.chooseAll = (options, seen) => Array.from({length: rows}, (_, i) =>
    choose(all.subarray(i * size, (i + 1) * size), seen, options, 1000 * i));
  self.choose = choose;
}"""


def logits() -> np.ndarray:
    """Like a model's: few tokens far above the rest; half of the rows with many ties."""
    rng = np.random.default_rng(1)
    rows = rng.gumbel(0, 2, (ROWS, VOCABULARY)).astype(np.float32)
    rows[::2] = np.round(rows[::2] * 2) / 2
    return rows


@pytest.fixture(scope="module")
def page(chromium: Browser) -> Any:
    with served(Path(gemma_multi.__file__).parent / "apps" / "bedtime") as home:
        page = chromium.new_page()
        page.goto(f"{home}style.css")
        page.evaluate(_LOAD, [base64.b64encode(logits().tobytes()).decode(), ROWS])
        yield page


@pytest.mark.parametrize("seed", [0, 3, 2**32 + 5, 2**53 - 1])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.3, "top_k": 40, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 64, "top_p": 1.0},
        {"temperature": 0.7, "top_k": 0, "top_p": 0.9},
        {"temperature": 2.0, "top_k": 0, "top_p": 0.99},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.05},
        {"temperature": 1.3, "top_k": 200, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 1.5, "top_k": 5000, "top_p": 1.0},
        {"temperature": 0.0, "repetition_penalty": 1.7},
        {"temperature": 1.0, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_it_chooses_what_python_chooses(page: Page, options: dict[str, Any], seed: int) -> None:
    whole = GenerationOptions(**options, seed=seed)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    told = page.evaluate(
        "([options, seen]) => chooseAll(options, seen)",
        [{name: getattr(whole, name) for name in names}, SEEN],
    )
    rows = enumerate(logits())
    assert told == [choose(row, np.array(SEEN), whole, 1000 * i) for i, row in rows]


@pytest.mark.parametrize("bad", ["NaN", "Infinity"])
def test_it_refuses_what_python_refuses(page: Page, bad: str) -> None:
    said = page.evaluate(
        f"() => {{ try {{ return choose(Float32Array.of(1, {bad}, 0), [], {{}}, 0); }} "
        "catch (error) { return error.message; } }"
    )
    assert "not finite" in said

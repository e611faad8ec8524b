"""The bedtime page in a real browser: Python's stories, offline, on screens of all sizes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from apps.conftest import at_home, opened
from browser import DESK, PHONE, served
from other_peoples_files import axe
from playwright.sync_api import Browser, Page, expect

import gemma_multi
from gemma_multi import Model
from gemma_multi.sampling.noise import gumbel

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "storyteller"))

PROMPT = (
    "Tell me a bedtime story.\nHero: Pip the hedgehog\nSetting: an old lighthouse by the sea\n"
    "Twist: the monster was a hungry kitten\nTheme: courage\nLength: short"
)
_NEAR = 0.3  # how far two kernels' rounding of int4 may move a token's score against another's


def tell(page: Page, seed: int) -> list[int]:
    page.select_option("[name=length]", "short")
    page.select_option("[name=pace]", "0")
    page.fill("[name=seed]", str(seed))
    page.click("#tell")
    page.wait_for_selector("#again:enabled", timeout=60_000)
    return [int(i) for i in page.get_attribute("#story", "data-tokens").split(",")]


def assert_told_but_for_ties(told: list[int], model: Model, seed: int) -> None:
    """The story is Python's, or parts from it where two tokens were as good as equal."""
    result = model.generate(PROMPT, seed=seed, logprobs=20)
    expected = list(result.tokens)
    if told == expected:
        return
    at = next(i for i, (a, b) in enumerate(zip(told, expected, strict=False)) if a != b)
    position = len(model.encode(PROMPT)) + at
    likely = dict(result.logprobs[at].top)
    both = [told[at], expected[at]]
    warm = np.array([likely[token] for token in both]) / model.checkpoint.generation["temperature"]
    first, second = warm + gumbel(np, seed, position, np.array(both))
    assert abs(first - second) < _NEAR, f"seed {seed}, token {at}: {first} and {second}"


def test_a_seed_tells_pythons_story_and_nothing_leaves_the_page(
    exact: Path, chromium: Browser
) -> None:
    model = gemma_multi.load(exact / "model" / "model.tflite")
    context = chromium.new_context()
    page = context.new_page()
    asked: list[str] = []
    wrong: list[Any] = []
    context.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(error))
    with at_home(exact) as home:
        opened(page, home)
        expect(page.locator("#offline")).to_have_text("works offline", timeout=60_000)
        assert "LiteRT" in page.inner_text("#status")
        assert all(url.startswith((home, "blob:", "data:")) for url in asked)
        asked.clear()
        for seed in (1, 2, 2**32 - 1):
            assert tell(page, seed) == list(model.generate(PROMPT, seed=seed).tokens)
        assert asked == []
    context.set_offline(True)
    page.reload()
    page.wait_for_selector("#tell:enabled", timeout=60_000)
    assert page.evaluate("crossOriginIsolated")
    assert tell(page, 1) == list(model.generate(PROMPT, seed=1).tokens)
    assert wrong == []
    context.close()


def test_the_file_for_phones_on_one_thread_and_transformers_js(
    shipped: Path, chromium: Browser
) -> None:
    """From a server without the headers."""
    model = gemma_multi.load(shipped / "model" / "model.tflite")
    page = chromium.new_context(service_workers="block").new_page()
    with served(shipped) as home:
        opened(page, home)
        assert "LiteRT, 1 thread" in page.inner_text("#status")
        for seed in (1, 2):
            assert_told_but_for_ties(tell(page, seed), model, seed)
        page.check("[value=transformers]")
        page.wait_for_selector("#tell:enabled", timeout=60_000)
        assert "Transformers.js" in page.inner_text("#status")
        assert_told_but_for_ties(tell(page, 1), model, 1)
        with page.expect_download() as saved:
            page.click("#save")
        assert "Pip" in Path(saved.value.path()).read_text()
    page.context.close()


def test_words_come_one_by_one_and_stop_by_keyboard(shipped: Path, chromium: Browser) -> None:
    page = chromium.new_context(service_workers="block").new_page()
    with at_home(shipped) as home:
        opened(page, home)
        assert "threads" in page.inner_text("#status")
        page.fill("[name=name]", "<Nelly & 2>")
        page.select_option("[name=pace]", "120")
        page.press("[name=name]", "Enter")
        expect(page.locator("#story")).to_contain_text(re.compile("Nelly .* "), timeout=60_000)
        page.focus("#stop")
        page.keyboard.press("Enter")
        told = page.inner_text("#story")
        page.wait_for_timeout(400)
        assert page.inner_text("#story") == told
        assert "Nelly" in told
        assert "<" not in told
        assert page.inner_text("#heard") in told  # by sentences, to screen readers
        page.focus("#again")
        page.keyboard.press("Enter")
        page.wait_for_function(
            "told => document.getElementById('story').innerText === told", arg=told
        )
        check_looks(page)
    page.context.close()


def check_looks(page: Page) -> None:
    page.evaluate(axe())
    for width, scheme in ((PHONE, "dark"), (DESK, "light")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = page.evaluate("axe.run()")
        assert [one["id"] for one in found["violations"]] == []
        assert len(found["passes"]) > 20


def test_the_choices_are_those_that_the_storyteller_knows() -> None:
    import world

    text = (Path(gemma_multi.__file__).parent / "apps/bedtime/choices.js").read_text()
    for known in (world.KINDS, world.SETTINGS, world.TWISTS, world.THEMES):
        assert all(f'"{one}"' in text for one in known)

"""The bedtime page in a real browser: Python's stories, offline, and what keeps it from them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import browser, in_a_thread, served
from playwright.sync_api import Browser, Page

import gemma_multi
from gemma_multi.apps import pack, serve

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "storyteller"))

PROMPT = (
    "Tell me a bedtime story.\nHero: Pip the hedgehog\nSetting: an old lighthouse by the sea\n"
    "Twist: the monster was a hungry kitten\nTheme: courage\nLength: short"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed in float32, in which no kernel rounds activations: the same numbers everywhere."""
    return pack("bedtime", tmp_path_factory.mktemp("apps") / "bedtime", precision="float32").path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


def tell(page: Page, seed: int) -> list[int]:
    page.select_option("[name=length]", "short")
    page.select_option("[name=pace]", "0")
    page.fill("[name=seed]", str(seed))
    page.click("#tell")
    page.wait_for_selector("#again:enabled", timeout=60_000)
    return [int(i) for i in page.get_attribute("#story", "data-tokens").split(",")]


def test_the_page_tells_pythons_stories_and_works_offline(folder: Path, chromium: Browser) -> None:
    model = gemma_multi.load(folder / "model" / "model.tflite")
    context = chromium.new_context()
    page = context.new_page()
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    with serve(folder) as server, in_a_thread(server):
        home = f"http://127.0.0.1:{server.server_port}/"
        page.goto(home)
        page.wait_for_selector("#tell:enabled", timeout=60_000)
        for seed in (1, 2, 3):
            assert tell(page, seed) == list(model.generate(PROMPT, seed=seed).tokens)
        page.wait_for_function("document.getElementById('offline').textContent", timeout=60_000)
        assert page.inner_text("#offline").endswith("works offline")
    context.set_offline(True)
    page.reload()
    page.wait_for_selector("#tell:enabled", timeout=60_000)
    assert tell(page, 1) == list(model.generate(PROMPT, seed=1).tokens)
    assert all(url.startswith((home, "blob:", "data:")) for url in asked)
    context.close()


def test_one_thread_and_transformers_js_without_the_headers(
    folder: Path, chromium: Browser
) -> None:
    model = gemma_multi.load(folder / "model" / "model.tflite")
    page = chromium.new_context(service_workers="block").new_page()
    with served(folder) as home:
        page.goto(home)
        page.wait_for_selector("#tell:enabled", timeout=60_000)
        assert "LiteRT, 1 thread" in page.inner_text("#status")
        page.check("[value=transformers]")
        page.wait_for_selector("#tell:enabled", timeout=60_000)
        assert "Transformers.js" in page.inner_text("#status")
        assert tell(page, 1) == list(model.generate(PROMPT, seed=1).tokens)
        with page.expect_download() as saved:
            page.click("#save")
        assert "Pip" in Path(saved.value.path()).read_text()
        page.select_option("[name=pace]", "120")
        page.click("#tell")
        page.wait_for_function("document.getElementById('story').textContent.length > 10")
        page.click("#stop")
        told = page.inner_text("#story")
        page.wait_for_timeout(500)
        assert page.inner_text("#story") == told
    page.context.close()


def test_a_truncated_model_is_named(folder: Path, chromium: Browser, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=os.link)
    model = copy / "model" / "model.tflite"
    data = model.read_bytes()
    model.unlink()
    model.write_bytes(data[:1000])
    with serve(copy) as server, in_a_thread(server):
        page = chromium.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("#problem:visible", timeout=60_000)
        assert "model/model.tflite has 1,000 bytes" in page.inner_text("#problem")
    page.close()


def test_a_file_says_that_it_wants_a_server(folder: Path, chromium: Browser) -> None:
    page = chromium.new_page()
    page.goto((folder / "index.html").as_uri())
    assert "opened as a file" in page.inner_text("#problem")
    page.close()


def test_the_choices_are_those_that_the_storyteller_knows() -> None:
    import world

    text = (Path(gemma_multi.__file__).parent / "apps/bedtime/choices.js").read_text()
    for known in (world.KINDS, world.SETTINGS, world.TWISTS, world.THEMES):
        assert all(f'"{one}"' in text for one in known)

"""What keeps the bedtime page from its stories is said in a sentence that a person can use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from apps.conftest import at_home
from playwright.sync_api import Browser, Page


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, copy_function=os.link))


def change(file: Path, to: Callable[[bytes], bytes]) -> None:
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(to(data))


def problem(page: Page) -> str:
    page.wait_for_selector("#problem:visible", timeout=60_000)
    assert page.is_disabled("#tell")
    return page.inner_text("#problem")


@pytest.mark.parametrize(
    ("file", "to", "said"),
    [
        ("model/model.tflite", lambda data: data[:1000], "model/model.tflite has 1,000 bytes"),
        ("model/tokenizer.json", lambda data: data[:-9] + b"}" * 9, "tokenizer.json is damaged"),
        # a model of more memory than there is
        ("manifest.js",
         lambda data: data.replace(b'"bytes": 2', b'"bytes": 99999999992'),
         "did not fit into this browser's memory"),
    ],
    ids=["truncated", "damaged", "too large"],
)  # fmt: skip
def test_files_that_are_not_what_was_packed(
    file: str, to: Callable[[bytes], bytes], said: str, shipped: Path, chromium: Browser,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = copied(shipped, tmp_path / "copy")
    change(folder / file, to)
    page = chromium.new_context(service_workers="block").new_page()
    with at_home(folder) as home:
        page.goto(home)
        assert said in problem(page)
    page.context.close()


def test_a_file_that_is_not_there(shipped: Path, chromium: Browser, tmp_path: Path) -> None:
    folder = copied(shipped, tmp_path / "copy")
    (folder / "model" / "tokenizer_config.json").unlink()
    page = chromium.new_context(service_workers="block").new_page()
    with at_home(folder) as home:
        page.goto(home)
        assert "tokenizer_config.json could not be loaded (404)" in problem(page)
    page.context.close()


def test_a_page_opened_as_a_file(shipped: Path, chromium: Browser) -> None:
    page = chromium.new_page()
    page.goto((shipped / "index.html").as_uri())
    assert "opened as a file" in problem(page)
    page.close()


@pytest.mark.parametrize(
    ("missing", "said"), [("WebAssembly", "no WebAssembly"), ("Worker", "no workers")]
)
def test_a_browser_that_lacks(missing: str, said: str, shipped: Path, chromium: Browser) -> None:
    page = chromium.new_context(service_workers="block").new_page()
    page.add_init_script(f"delete self.{missing}")
    with at_home(shipped) as home:
        page.goto(home)
        assert said in problem(page)
    page.context.close()

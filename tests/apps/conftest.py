"""Packed pages, and a browser to open them in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import browser, in_a_thread
from playwright.sync_api import Browser, Page

import gemma_multi
from gemma_multi.apps import pack, serve


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed in float32, in which no kernel rounds activations: the same numbers everywhere."""
    folder = tmp_path_factory.mktemp("apps") / "exact"
    return pack("bedtime", folder, precision="float32", transformers_js=False).path


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed around the very file that ships to phones."""
    folder = tmp_path_factory.mktemp("apps")
    gemma_multi.export("storyteller", folder / "story.tflite", context_length=512)
    return pack("bedtime", folder / "shipped", model=folder / "story.tflite").path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@contextmanager
def at_home(folder: Path) -> Iterator[str]:
    """The folder as `gemma-multi app --serve` shows it, as an address."""
    with serve(folder) as server, in_a_thread(server):
        yield f"http://127.0.0.1:{server.server_port}/"


def opened(page: Page, address: str) -> None:
    """Goes there, and waits until a story can be told."""
    page.goto(address)
    page.wait_for_selector("#tell:enabled", timeout=60_000)

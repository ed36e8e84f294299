"""Fixtures of the browser tests: one real JupyterLab with the real engine and model, one fresh page a test."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parent))

from chromium import FLAGS, find_chromium
from jupyterlab import JupyterLab, running_jupyterlab


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.model)


@pytest.fixture(scope="session")
def lab(default_model: Path) -> Iterator[JupyterLab]:
    del default_model  # fetched before JupyterLab starts, so that no test waits for a download
    # A short path: the server's Unix socket lies below it, and such paths hold 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="iw-"))
    # Below a base URL, as JupyterHub has it: what works there works at the root.
    with running_jupyterlab(folder, base_url="/user/ada/") as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the page's console reported as an error, with its address; a test that expects some clears it."""
    return []


@pytest.fixture
def page(browser: Browser, complaints: list[str]) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1500, "height": 1300})
    page = context.new_page()
    page.on(
        "console",
        lambda message: (
            complaints.append(f"{message.text} {message.location['url']}") if message.type == "error" else None
        ),
    )
    page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
    yield page
    context.close()
    assert complaints == []

"""What a person does with the workbench in a page, for the tests of this folder."""

from __future__ import annotations

import re
from typing import Any

from jupyterlab import JupyterLab
from playwright.sync_api import Locator, Page, expect

LOADED_MS = 60_000
READY_MS = 120_000


def open_lab(page: Page, lab: JupyterLab, **parameters: str) -> None:
    """Open JupyterLab with an empty workspace, and wait for it."""
    page.goto(lab.page(reset="", **parameters))
    page.locator("#jp-main-dock-panel").wait_for(timeout=LOADED_MS)
    expect(page.locator("#jupyterlab-splash")).to_have_count(0, timeout=LOADED_MS)


def open_panel(page: Page, lab: JupyterLab) -> Locator:
    """Open the panel from the launcher, and wait until the engine serves."""
    open_lab(page, lab)
    page.locator(".jp-LauncherCard", has_text="Open Inference Workbench").click(timeout=LOADED_MS)
    return wait_ready(page)


def wait_ready(page: Page, within: str = ".iw-panel") -> Locator:
    """Wait until the workbench is connected to an engine that serves, with its switches drawn."""
    workbench = page.locator(f"{within} .iw-workbench")
    expect(workbench.locator(".iw-status")).to_have_attribute("data-connection", "connected", timeout=READY_MS)
    expect(workbench.locator(".iw-status")).to_have_attribute("data-engine", "ready", timeout=READY_MS)
    expect(workbench.locator("[data-feature=kv_cache] .iw-toggle")).to_be_enabled(timeout=READY_MS)
    return workbench


def generate(workbench: Locator, preset: str, *, tokens: int, parallel: int | None = None) -> None:
    """Choose a preset, change its length, and press Generate."""
    workbench.locator(f"[data-preset={preset}]").click()
    numbers = workbench.locator(".iw-prompt .iw-number")
    numbers.nth(0).fill(str(tokens))
    if parallel is not None:
        numbers.nth(2).fill(str(parallel))
    workbench.locator("[data-action=generate]").click()


def finished(workbench: Locator, timeout_s: float = 120) -> None:
    """Wait until nothing runs any more, and the last painting has happened."""
    expect(workbench.locator("[data-action=stop]")).to_be_disabled(timeout=timeout_s * 1000)
    workbench.page.wait_for_timeout(400)


def produced(workbench: Locator) -> list[int]:
    """Tokens produced by each request that is shown."""
    facts = workbench.locator(".iw-row-facts").all_inner_texts()
    return [int(match[1]) for text in facts if (match := re.search(r"(\d+)/\d+ tokens", text))]


def wait_tokens(page: Page, count: int, timeout_s: float = 120) -> None:
    """Wait until so many tokens are drawn in the newest row."""
    page.wait_for_function(
        "count => (document.querySelector('.iw-row-text')?.querySelectorAll('.iw-token').length ?? 0) >= count",
        arg=count,
        timeout=timeout_s * 1000,
    )


def stats(page: Page) -> dict[str, Any]:
    """What the page measured of itself."""
    measured: dict[str, Any] = page.evaluate("window.inferenceWorkbench.stats()")
    return measured


def slope_of(caption: str, label: str) -> float:
    """Slope, ms per 100 tokens, that the latency plot's caption gives for the epoch called ``label``."""
    match = re.search(rf"{label}\): median [\d.,]+ ms, slope ([+−][\d.,]+) ms", caption)
    assert match, f"no slope of {label!r} in {caption!r}"
    return float(match[1].replace("−", "-").replace(",", ""))

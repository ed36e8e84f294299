"""What a person does with the workbench in a page, for the tests of this folder."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
from jupyterlab import ROOT, JupyterLab
from playwright.sync_api import Locator, Page, expect
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

AXE = ROOT / "extension" / "node_modules" / "axe-core" / "axe.min.js"
REPETITIVE = " ".join(
    f"The cat {verb} on the mat. The dog {verb} on the log." for verb in ("sat", "slept", "sat", "sang")
)
"""A text that goes on as it has gone on so far: what looks up earlier words proposes much of it."""
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


def use_theme(page: Page, theme: str) -> None:
    """Choose JupyterLab's ``theme``, e.g. ``"Dark"``. It is kept from page to page: leave "Light" to the next test."""
    page.get_by_role("menuitem", name="Settings").click()
    page.locator(".lm-Menu-itemLabel", has_text="Theme").first.hover()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^JupyterLab {theme}$")).click()
    page.wait_for_timeout(1500)


def write_notebook(lab: JupyterLab, name: str, sources: Sequence[str]) -> None:
    """Put a notebook into the folder that JupyterLab shows."""
    cells = [
        {
            "cell_type": "code",
            "id": f"cell{at}",
            "source": source,
            "metadata": {},
            "outputs": [],
            "execution_count": None,
        }
        for at, source in enumerate(sources)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    content = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (lab.folder / "root" / name).write_text(json.dumps(content))


def open_widget(page: Page, lab: JupyterLab, cells: Sequence[str]) -> Locator:
    """Open a notebook, run its first cell, and wait until the widget in it is connected to an engine that serves."""
    write_notebook(lab, "widget.ipynb", cells)
    page.goto(lab.page("lab/tree/widget.ipynb", reset=""))
    notebook = page.locator(".jp-NotebookPanel")
    expect(notebook.locator(".jp-Toolbar-kernelName")).to_contain_text("Python 3", timeout=LOADED_MS)
    expect(notebook.locator(".jp-Notebook-ExecutionIndicator")).to_have_attribute(
        "data-status", "idle", timeout=LOADED_MS
    )
    notebook.locator(".jp-Cell").first.click()
    page.keyboard.press("Shift+Enter")
    return wait_ready(page, ".iw-widget")


def wait_ready(page: Page, within: str = ".iw-panel") -> Locator:
    """Wait until the workbench is connected to an engine that serves, with its switches drawn."""
    workbench = page.locator(f"{within} .iw-workbench")
    expect(workbench.locator(".iw-status")).to_have_attribute("data-connection", "connected", timeout=READY_MS)
    expect(workbench.locator(".iw-status")).to_have_attribute("data-engine", "ready", timeout=READY_MS)
    expect(workbench.locator("[data-feature=kv_cache] .iw-toggle")).to_be_enabled(timeout=READY_MS)
    return workbench


def command(page: Page, label: str) -> None:
    """Run a command by its name in JupyterLab's palette."""
    expect(page.locator("#jupyterlab-splash")).to_have_count(0, timeout=READY_MS)
    search = page.locator(".lm-CommandPalette-input")
    item = page.locator(".lm-CommandPalette-item:not(.lm-mod-disabled)", has_text=label).first
    for _ in range(10):
        page.get_by_role("menuitem", name="View", exact=True).click()
        page.locator(".lm-Menu-itemLabel", has_text="Activate Command Palette").click()
        # The palette closes when it loses the focus, and a document that is still loading takes it: at any moment.
        page.wait_for_timeout(500)
        if search.is_visible():
            with contextlib.suppress(PlaywrightTimeoutError):
                search.fill(label, timeout=2000)
                item.click(timeout=3000)
                return
    raise AssertionError(f"the palette never stayed open for {label!r}")


def serious(page: Page, within: str) -> list[str]:
    """What axe-core finds that keeps somebody out."""
    if not page.evaluate("'axe' in window"):
        page.add_script_tag(path=AXE)
    found = page.evaluate(
        "within => axe.run(within, { resultTypes: ['violations'] }).then(result => result.violations)", within
    )
    return [
        f"{each['id']} ({each['impact']}): {node['html'][:160]} {node.get('failureSummary', '')[:300]}"
        for each in found
        if each["impact"] in {"serious", "critical"}
        for node in each["nodes"]
    ]


def generate(
    workbench: Locator, preset: str, *, tokens: int, parallel: int | None = None, prompt: str | None = None
) -> None:
    """Choose a preset, change its length (and text), press Generate, and wait until the request is there."""
    rows = workbench.locator(".iw-row")
    newest = rows.first.get_attribute("data-request") if rows.count() else "none"
    workbench.locator(f"[data-preset={preset}]").click()
    numbers = workbench.locator(".iw-prompt .iw-number")
    numbers.nth(0).fill(str(tokens))
    if prompt is not None:
        workbench.locator(".iw-prompt-text").fill(prompt)
    if parallel is not None:
        numbers.nth(2).fill(str(parallel))
    workbench.locator("[data-action=generate]").click()
    expect(rows.first).not_to_have_attribute("data-request", newest or "none", timeout=READY_MS)


@contextlib.contextmanager
def switched(lab: JupyterLab, **values: Any) -> Iterator[None]:
    """Switch features at the server, and switch them back at the end."""
    address, headers = f"{lab.workbench}features", lab.headers
    before = httpx.get(address, headers=headers, timeout=30).json()["values"]
    httpx.patch(address, headers=headers, json=values, timeout=60).raise_for_status()
    try:
        yield
    finally:
        old = {name: before[name] for name in values}
        httpx.patch(address, headers=headers, json=old, timeout=60).raise_for_status()


def speculating(lab: JupyterLab) -> contextlib.AbstractContextManager[None]:
    """Always propose what followed the same words before."""
    return switched(lab, speculation="ngram", adaptive_speculation=False)


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
        polling=200,  # milliseconds; the default asks at every animation frame and would slow what is measured
        timeout=timeout_s * 1000,
    )


def stats(page: Page) -> dict[str, Any]:
    """What the page measured of itself."""
    measured: dict[str, Any] = page.evaluate("window.inferenceWorkbench.stats()")
    return measured


def slope_of(caption: str, label: str) -> float:
    """Slope, ms per 100 tokens, that the latency plot's caption gives for the newest epoch called ``label``."""
    slopes = re.findall(rf"{label}\): median [\d.,]+ ms, slope ([+−][\d.,]+) ms", caption)
    assert slopes, f"no slope of {label!r} in {caption!r}"
    return float(slopes[-1].replace("−", "-").replace(",", ""))


PLOTS = ("latency", "attribution", "batch", "speculation", "kv", "timeline", "roofline")
NOTHING = "0.0 µs"
BLOCKS = """() => {
  const { kv } = window.inferenceWorkbench.store();
  return [kv.numBlocks, [...kv.hashed], [...kv.references], [...kv.tables]];
}"""


def blocks(page: Page) -> list[Any]:
    """The KV cache as the workbench opened last knows it, block by block."""
    known: list[Any] = page.evaluate(BLOCKS)
    return known


def tables(view: Locator) -> dict[str, list[dict[str, str]]]:
    """The rows of the tables behind the plots, of everything there is; parts that took no time are left out."""
    view.locator("[data-window='0']").click()
    found = {}
    for name in PLOTS:
        card = view.locator(f".iw-plot-{name}")
        card.scroll_into_view_if_needed()
        button = card.locator(".iw-table-button")
        button.click()
        table = card.locator(".iw-table-holder table")
        table.locator("tbody tr").first.wait_for()
        view.page.wait_for_timeout(250)
        head, *rows = table.locator("tr").evaluate_all(
            "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
        )
        found[name] = [
            {key: cell for key, cell in zip(head, row, strict=True) if cell != NOTHING or key == "unexplained"}
            for row in rows
        ]
        button.click()
    return found

"""The same views as a widget in a notebook: a real kernel, the real server, frames through the kernel's comm."""

from __future__ import annotations

from jupyterlab import JupyterLab
from playwright.sync_api import Page, expect
from workbench_page import (
    LOADED_MS,
    PLOTS,
    REPETITIVE,
    blocks,
    finished,
    generate,
    open_panel,
    open_widget,
    produced,
    speculating,
    stats,
    tables,
    wait_tokens,
)

CELLS = (
    "import inference_workbench as iw\nwb = iw.connect()\npanel = wb.panel()\npanel",
    "panel.kv_cache = False\nprint('kv cache is', panel.kv_cache)",
    "panel.kv_cache = True\nprint('again', panel.kv_cache)",
)


def test_a_widget_in_a_notebook_streams_and_its_switches_are_traits(page: Page, lab: JupyterLab) -> None:
    widget = open_widget(page, lab, CELLS)
    notebook = page.locator(".jp-NotebookPanel")
    generate(widget, "story", tokens=60)
    wait_tokens(page, 5)
    # Python sets the trait; the widget's switch follows, and so does the server.
    page.keyboard.press("Escape")
    notebook.locator(".jp-Cell").nth(1).click()
    page.keyboard.press("Shift+Enter")
    expect(notebook.locator(".jp-OutputArea-output", has_text="kv cache is False")).to_be_visible(timeout=LOADED_MS)
    expect(widget.locator("[data-feature=kv_cache] .iw-toggle")).not_to_be_checked()
    page.keyboard.press("Shift+Enter")
    expect(notebook.locator(".jp-OutputArea-output", has_text="again True")).to_be_visible(timeout=LOADED_MS)
    expect(widget.locator("[data-feature=kv_cache] .iw-toggle")).to_be_checked()
    finished(widget)
    # Recorded from the widget, by way of the kernel.
    widget.locator("[data-action=record]").click()
    expect(widget.locator(".iw-recorder")).to_have_attribute("data-state", "recording")
    generate(widget, "story", tokens=6)
    finished(widget)
    with speculating(lab):
        generate(widget, "code", tokens=20, prompt=REPETITIVE)
        finished(widget)
    widget.locator("[data-action=record]").click()
    expect(widget.locator(".iw-recorder")).to_have_attribute("data-state", "finished", timeout=30_000)
    expect(widget.locator(".iw-plot-attribution .iw-caption")).to_contain_text("unexplained")
    assert produced(widget)[0] > 5
    assert stats(page)["count"] > 0
    # What it shows is what the panel shows, which has come by another way.
    shown, cached = tables(widget), blocks(page)
    beside = page.context.new_page()
    panel = open_panel(beside, lab)
    same = tables(panel)
    for name in PLOTS:
        count = min(len(shown[name]), len(same[name]), 20)
        assert count > 0
        assert shown[name][:count] == same[name][:count], name
    assert blocks(beside) == cached
    beside.close()

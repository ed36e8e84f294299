"""Recordings as a person has them: made with a button, opened by a double click, replayed alone in an HTML file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from jupyterlab import JupyterLab
from playwright.sync_api import Browser, Locator, Page, expect
from workbench_page import (
    LOADED_MS,
    PLOTS,
    REPETITIVE,
    blocks,
    finished,
    generate,
    open_panel,
    speculating,
    tables,
)

from inference_workbench.recording import open_recording

sys.path.insert(0, str(Path(__file__).parents[1]))

from synthetic_recording import write_recording


def position(view: Locator) -> str:
    return view.locator(".iw-place").inner_text()


def opened(page: Page, within: str) -> Locator:
    view = page.locator(f"{within} .iw-workbench")
    expect(view.locator(".iw-transport")).to_be_visible(timeout=LOADED_MS)
    return view


def test_what_was_recorded_with_a_button_opens_by_a_double_click_and_shows_the_same(
    page: Page, lab: JupyterLab, browser: Browser, tmp_path: Path
) -> None:
    panel = open_panel(page, lab)
    record = panel.locator("[data-action=record]")
    record.click()
    expect(panel.locator(".iw-recorder")).to_have_attribute("data-state", "recording")
    with speculating(lab):
        generate(panel, "code", tokens=20, prompt=REPETITIVE)
        finished(panel)
    generate(panel, "story", tokens=40, parallel=3)
    finished(panel)
    expect(panel.locator(".iw-record-state")).to_have_text(re.compile(r"^0:\d\d · [\d.,]+ [KM]iB · 1\d\d tokens$"))
    record.click()
    expect(panel.locator(".iw-recorder")).to_have_attribute("data-state", "finished", timeout=30_000)
    file = re.match(r"(\S+\.iwrec) · ", panel.locator(".iw-record-state").inner_text())
    assert file
    path = lab.folder / "root" / "recordings" / file[1]
    with open_recording(path) as recording:
        assert recording.summary().tokens == 140
        html = recording.to_html(tmp_path / "replay.html")
    live = tables(panel)
    cached = blocks(page)
    assert sum(cached[1]) > 0

    # The file lies in JupyterLab's own folder.
    page.locator(".jp-DirListing-item", has_text="recordings").dblclick()
    page.locator(".jp-DirListing-item", has_text=file[1]).dblclick()
    document = opened(page, ".jp-Document .iw-panel")
    expect(document.locator(".iw-status")).to_contain_text("SmolLM2-135M-Instruct")
    replayed = tables(document)
    # The panel has seen what came before the recording too, of the tests before this one.
    for name in PLOTS:
        assert len(replayed[name]) > (2 if name in {"timeline", "speculation"} else 30), name
        assert replayed[name] == live[name][: len(replayed[name])], name
    assert blocks(page) == cached
    expect(document.locator("[data-feature=kv_cache] .iw-toggle")).to_be_disabled()

    # Played from its beginning it comes to the same end.
    document.locator("[data-action=first]").click()
    expect(document.locator(".iw-place")).to_contain_text("· 0 tokens")
    document.locator("[data-action=speed]").select_option("16")
    document.locator("[data-action=play]").click()
    expect(document.locator("[data-action=play]")).to_have_attribute("data-playing", "true")
    expect(document.locator("[data-action=play]")).to_have_attribute("data-playing", "false", timeout=30_000)
    expect(document.locator(".iw-place")).to_contain_text("140 tokens")
    assert tables(document) == replayed

    # So does the HTML file, without JupyterLab.
    context = browser.new_context(viewport={"width": 1500, "height": 1300}, offline=True)
    alone = context.new_page()
    alone.goto(html.as_uri())
    assert tables(opened(alone, ".iw-replay")) == replayed
    assert blocks(alone) == cached
    context.close()

    # And the tab comes back after a reload of the page.
    page.goto(lab.page())
    opened(page, ".jp-Document .iw-panel")


def test_a_token_that_is_clicked_says_where_its_time_went(page: Page, lab: JupyterLab) -> None:
    panel = open_panel(page, lab)
    generate(panel, "story", tokens=12)
    finished(panel)
    panel.locator(".iw-row-text").first.locator(".iw-token").nth(4).click()
    why = panel.locator(".iw-why")
    expect(why.locator("h3")).to_have_text(re.compile(r"^Why did “.+” take [\d.]+ (µs|ms|s)\?$"))
    took = re.search(r"take (.+)\?", why.locator("h3").inner_text())
    assert took
    expect(why.locator(".iw-why-total td").first).to_have_text(took[1])
    parts = why.locator("[data-part]").evaluate_all("rows => rows.map(row => row.dataset.part)")
    assert {"forward", "sampling", "host"} <= set(parts)
    assert parts[-1] == "unexplained"
    shares = [share_of(text) for text in why.locator("[data-part] td:nth-of-type(2)").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=0.6 * len(shares))
    # By keyboard too: the row is walked, Enter asks, Escape closes.
    row = panel.locator(".iw-row-text").first
    row.focus()
    row.press("Home")
    row.press("Enter")
    expect(why.locator(".iw-why-subject")).to_contain_text("first token (TTFT)")
    row.press("Escape")
    expect(why).to_be_hidden()


def share_of(text: str) -> float:
    return 0.05 if text.startswith("<") else float(text.removesuffix(" %").replace("−", "-"))


def test_the_cost_of_watching_is_measured_and_its_level_can_be_switched(page: Page, lab: JupyterLab) -> None:
    panel = open_panel(page, lab)
    generate(panel, "long", tokens=200)
    expect(panel.locator("[data-figure=observer]")).to_have_text(re.compile(r"^(< )?[\d.]+$"), timeout=20_000)
    panel.locator("[data-action=stop]").click()
    finished(panel)
    level = panel.locator(".iw-observer-level")
    level.select_option("steps")
    expect(panel.locator("[data-feature=instrumentation] .iw-select")).to_have_value("steps")
    generate(panel, "story", tokens=6)
    finished(panel)
    level.select_option("full")
    expect(panel.locator("[data-feature=instrumentation] .iw-select")).to_have_value("full")


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    path = write_recording(folder / "long.iwrec", tokens=100_000, parallel=16, tokens_per_request=250)
    with open_recording(path) as recording:
        return recording.to_html(folder / "long.html")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_html_file_needs_no_network_and_follows_the_theme(
    browser: Browser, long_page: Path, complaints: list[str], theme: str
) -> None:
    context = browser.new_context(
        viewport={"width": 1300, "height": 1200}, offline=True, color_scheme="dark" if theme == "dark" else "light"
    )
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(long_page.as_uri())
    view = opened(page, ".iw-replay")
    expect(view.locator(".iw-plot-attribution canvas").first).to_be_visible()
    expect(view).to_have_attribute("data-dark", str(theme == "dark").lower())
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert complaints == []
    context.close()


def test_a_hundred_thousand_tokens_are_scrubbed_by_mouse_and_by_keys(browser: Browser, long_page: Path) -> None:
    """How fast, ``benchmarks/replay.py`` measures; here every place that is pointed at must be shown."""
    page = browser.new_context(viewport={"width": 1300, "height": 1200}, offline=True).new_page()
    page.goto(long_page.as_uri())
    view = opened(page, ".iw-replay")
    track = view.locator(".iw-track")
    box = track.bounding_box()
    assert box
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 2, y)
    page.mouse.down()
    for share in (0.9, 0.1, 0.5, 0.52, 0.3, 0.75):
        page.mouse.move(box["x"] + share * box["width"], y)
        page.wait_for_timeout(120)
        shown = page.evaluate("window.inferenceWorkbench.replay().source.elapsedNs")
        whole = page.evaluate("window.inferenceWorkbench.replay().source.timeline.durationNs")
        assert shown / whole == pytest.approx(share, abs=0.01)
        newest = page.evaluate("window.inferenceWorkbench.store().steps.at(-1).event.step")
        expect(view.locator(".iw-place")).to_contain_text(f"step {newest:,} ")
    page.mouse.up()
    before = page.evaluate("window.inferenceWorkbench.replay().source.stepRow")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("window.inferenceWorkbench.replay().source.stepRow") == before + 1
    page.keyboard.press("Home")
    expect(view.locator(".iw-place")).to_contain_text("0:00.000 of")
    page.keyboard.press("End")
    expect(view.locator(".iw-place")).to_contain_text("tokens")
    # By step: the middle of the track is the middle step, however long the others took.
    view.locator("[data-axis=step]").click()
    page.mouse.click(box["x"] + 0.5 * box["width"], y)
    page.wait_for_timeout(100)
    row = page.evaluate("window.inferenceWorkbench.replay().source.stepRow")
    count = page.evaluate("window.inferenceWorkbench.replay().source.timeline.stepCount")
    assert row / count == pytest.approx(0.5, abs=0.01)
    page.context.close()


def test_what_is_no_recording_is_called_so_in_jupyterlab(page: Page, lab: JupyterLab) -> None:
    root = lab.folder / "root"
    (root / "cake.iwrec").write_bytes(b"flour, eggs and sugar")
    whole = write_recording(root / "whole.iwrec", tokens=60).read_bytes()
    (root / "half.iwrec").write_bytes(whole[: len(whole) // 2])
    page.goto(lab.page("lab/tree/cake.iwrec", reset=""))
    failed = page.locator(".iw-replay-failed:visible")
    expect(failed).to_contain_text("not a recording", timeout=LOADED_MS)
    page.goto(lab.page("lab/tree/half.iwrec", reset=""))
    expect(failed).to_contain_text("cut off", timeout=LOADED_MS)

"""The JupyterLab panel with the real engine: what a person sees is what the server measured."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import httpx
from jupyterlab import JupyterLab, running_jupyterlab
from playwright.sync_api import Page, expect
from workbench_page import (
    READY_MS,
    finished,
    generate,
    open_lab,
    open_panel,
    produced,
    slope_of,
    stats,
    use_theme,
    wait_ready,
    wait_tokens,
)

from inference_server.launch import TEACHING_URL


def test_opening_the_panel_starts_the_server_and_streams_each_token(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    expect(workbench.locator(".iw-model")).to_contain_text("SmolLM2-135M-Instruct")
    generate(workbench, "story", tokens=24)
    finished(workbench)
    spans = workbench.locator(".iw-row").first.locator(".iw-token")
    assert spans.count() == produced(workbench)[0]
    assert "iw-first" in (spans.first.get_attribute("class") or "")
    text = "".join(spans.all_inner_texts())
    assert re.search(r"[A-Za-z]{3}", text), text
    expect(workbench.locator("[data-figure=itl]")).to_have_text(re.compile(r"^[\d.,]+$"))
    expect(workbench.locator("[data-figure=ttft]")).to_have_text(re.compile(r"^[\d.,]+$"))
    for name in ("latency", "batch", "kv"):
        workbench.locator(f".iw-plot-{name}").scroll_into_view_if_needed()
        expect(workbench.locator(f".iw-plot-{name} .iw-plot canvas").first).to_be_visible()


def test_a_token_reached_by_keyboard_tells_where_and_when_it_was_made(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    generate(workbench, "story", tokens=8)
    finished(workbench)
    row = workbench.locator(".iw-row-text").first
    row.focus()
    row.press("Home")
    row.press("ArrowRight")
    details = workbench.locator(".iw-details")
    expect(details).to_contain_text("output token 1")
    expect(details).to_contain_text("ITL")
    expect(details).to_contain_text("decode")
    step = re.search(r"step (\d+)", details.inner_text())
    assert step
    expect(workbench.locator(".iw-plot-batch .iw-caption")).to_contain_text(f"step {step[1]}:")
    expect(workbench.locator(".iw-plot-kv .iw-caption")).to_contain_text(f"step {step[1]}:")


def test_switching_the_kv_cache_in_mid_generation_shows_its_cost_and_tilts_the_latency(
    page: Page, lab: JupyterLab
) -> None:
    workbench = open_panel(page, lab)
    toggle = workbench.locator("[data-feature=kv_cache] .iw-toggle")
    result = workbench.locator("[data-feature=kv_cache] .iw-switch-result")
    # Many tokens with the cache: they must go on for longer than the page's work on what the switch changed, which
    # takes one of the cores away.
    generate(workbench, "long", tokens=400)
    wait_tokens(page, 40)
    toggle.click()
    expect(result).to_contain_text(re.compile(r"applied in [\d.]+ (µs|ms)"))
    wait_tokens(page, 95)
    toggle.click()
    expect(result).to_contain_text(
        re.compile(r"caught up after [\d.]+ (ms|s), 1 request recomputed \d+ tokens"), timeout=30_000
    )
    finished(workbench)
    assert produced(workbench)[0] == 400
    expect(workbench.locator(".iw-row").first.locator(".iw-switch-mark")).to_have_text(["kv_cache off", "kv_cache on"])
    workbench.locator("[data-window='0']").click()
    caption = workbench.locator(".iw-plot-latency .iw-caption")
    expect(caption).to_contain_text("KV cache on")  # painted after the click on the window
    off, on = slope_of(caption.inner_text(), "KV cache off"), slope_of(caption.inner_text(), "KV cache on")
    # Off, each token computes all tokens before it again: the line climbs. On, it is flat. The stretch before the
    # switch would not do: the page builds its figures meanwhile, on the cores that compute the tokens.
    assert off > 2 * abs(on), (off, on)


def test_every_switch_is_drawn_from_the_servers_description_and_a_refusal_is_shown(
    page: Page, lab: JupyterLab, complaints: list[str]
) -> None:
    workbench = open_panel(page, lab)
    described = httpx.get(f"{lab.workbench}features", headers=lab.headers, timeout=30).json()["specs"]
    drawn = workbench.locator("[data-feature]").evaluate_all("elements => elements.map(each => each.dataset.feature)")
    assert sorted(drawn) == sorted(spec["name"] for spec in described)
    number = workbench.locator("[data-feature=max_num_seqs] .iw-number")
    number.fill("7")
    number.press("Enter")
    expect(workbench.locator("[data-feature=max_num_seqs] .iw-switch-result")).to_contain_text("applied in")
    assert httpx.get(f"{lab.workbench}features", headers=lab.headers).json()["values"]["max_num_seqs"] == 7
    # The page's own limits are lifted, so that the server has to refuse.
    number.evaluate("element => element.removeAttribute('max')")
    number.fill("100000")
    number.press("Enter")
    expect(workbench.locator("[data-feature=max_num_seqs] .iw-switch-result")).to_contain_text("Refused")
    assert httpx.get(f"{lab.workbench}features", headers=lab.headers).json()["values"]["max_num_seqs"] == 7
    assert len(complaints) == 1
    assert "422" in complaints.pop()  # the browser reports the refusal too
    number.fill("32")
    number.press("Enter")
    expect(workbench.locator("[data-feature=max_num_seqs] .iw-switch-result")).to_contain_text("applied in")


def test_eight_streams_reach_the_screen_within_50_ms_at_four_repaints_a_second(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    generate(workbench, "crowd", tokens=120)
    wait_tokens(page, 10)
    page.evaluate("window.inferenceWorkbench.resetStats()")
    wait_tokens(page, 110)
    measured = stats(page)
    gap_ms = float(workbench.locator("[data-figure=itl]").inner_text().replace(",", ""))
    finished(workbench)
    print(measured)
    assert len(produced(workbench)) == 8
    assert measured["count"] >= 20, measured
    assert measured["latencyP95Ms"] <= 50, measured
    # A machine too slow for four steps a second has nothing to repaint more often than that.
    assert measured["repaintRate"] >= min(4, 0.8 * 1000 / gap_ms), (measured, gap_ms)
    assert measured["dropped"] == 0, measured
    assert measured["clockUncertaintyMs"] <= 10, measured


def test_a_killed_engine_is_explained_and_comes_back_by_itself(
    page: Page, lab: JupyterLab, complaints: list[str]
) -> None:
    workbench = open_panel(page, lab)
    generate(workbench, "long", tokens=400)
    wait_tokens(page, 10)
    os.kill(lab.engine_pid(), signal.SIGKILL)
    status = workbench.locator(".iw-status")
    expect(status).to_have_attribute("data-level", re.compile("bad|busy"), timeout=10_000)
    expect(workbench.locator(".iw-message")).to_contain_text("SIGKILL")
    expect(workbench.locator(".iw-prompt .iw-refusal")).not_to_be_empty(timeout=15_000)
    expect(workbench.locator(".iw-feed-error").first).to_be_visible()
    expect(workbench.locator(".iw-row").first).to_have_attribute("data-state", "failed")
    wait_ready(page)
    generate(workbench, "chat", tokens=8)
    expect(workbench.locator(".iw-row").first).to_have_attribute("data-state", "finished", timeout=READY_MS)
    complaints.clear()


def test_stop_ends_a_generation_at_the_server_too(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    generate(workbench, "long", tokens=400)
    wait_tokens(page, 5)
    workbench.locator("[data-action=stop]").click()
    expect(workbench.locator(".iw-row").first).to_have_attribute("data-state", "cancelled", timeout=10_000)
    requests = httpx.get(f"{lab.workbench}requests", headers=lab.headers).json()["requests"]
    assert all(each["state"] not in {"running", "queued", "preempted"} for each in requests), requests


def test_a_table_stands_behind_each_plot(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    generate(workbench, "story", tokens=12)
    finished(workbench)
    for name in ("latency", "batch", "kv"):
        card = workbench.locator(f".iw-plot-{name}")
        card.locator(".iw-table-button").press("Enter")
        assert card.locator("tbody tr").count() >= 10
        expect(card.locator(".iw-plot")).to_be_hidden()


def test_a_reload_brings_the_panel_back_with_what_it_showed(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    generate(workbench, "story", tokens=12)
    finished(workbench)
    shown = workbench.locator(".iw-row").first.locator(".iw-token").all_inner_texts()
    page.wait_for_timeout(1500)  # JupyterLab saves its layout a second after the last change
    page.goto(lab.page())
    again = wait_ready(page)
    expect(again.locator(".iw-row").first.locator(".iw-token")).to_have_text(shown)
    # What was said before is no measure of how long a token is on its way to this page.
    expect(again.locator(".iw-lag-number")).to_have_text("–")


def test_the_teaching_address_opens_the_lesson_beside_the_panel(page: Page, lab: JupyterLab) -> None:
    page.goto(lab.page(TEACHING_URL.lstrip("/"), reset=""))
    panel = page.locator(".iw-panel")
    expect(panel).to_be_visible(timeout=30_000)
    notebook = page.locator(".jp-NotebookPanel")
    expect(notebook).to_be_visible(timeout=30_000)
    left, right = notebook.bounding_box(), panel.bounding_box()
    assert left is not None
    assert right is not None
    assert left["x"] + left["width"] <= right["x"]
    assert "token" not in page.url


def test_the_dark_theme_reaches_text_and_plots(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    expect(workbench).to_have_attribute("data-dark", "false")
    light = workbench.locator(".iw-plot-batch .iw-card-head h3").evaluate("each => getComputedStyle(each).color")
    use_theme(page, "Dark")
    expect(workbench).to_have_attribute("data-dark", "true")
    dark = workbench.locator(".iw-plot-batch .iw-card-head h3").evaluate("each => getComputedStyle(each).color")
    assert light != dark
    use_theme(page, "Light")
    expect(workbench).to_have_attribute("data-dark", "false")


def test_the_status_bar_says_how_the_server_is(page: Page, lab: JupyterLab) -> None:
    open_lab(page, lab)
    item = page.locator(".iw-status-item-button")
    expect(item).to_have_text("Inference: off")
    item.click()
    wait_ready(page)
    expect(item).to_contain_text("Inference: idle", timeout=10_000)


def test_the_panel_says_when_jupyterlab_itself_is_gone(page: Page, complaints: list[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="iw-"))
    with running_jupyterlab(folder) as lab:
        open_lab(page, lab)
        page.locator(".iw-status-item-button").click()
        status = page.locator(".iw-status")
        expect(status).to_have_attribute("data-connection", "connected", timeout=READY_MS)
        lab.process.kill()
        expect(status).to_have_attribute("data-connection", "waiting", timeout=10_000)
        expect(page.locator(".iw-message")).to_contain_text("JupyterLab’s server does not answer", timeout=10_000)
        page.goto("about:blank")  # or the page goes on complaining after the next line
    shutil.rmtree(folder, ignore_errors=True)
    complaints.clear()


def test_traffic_is_started_changed_and_stopped_from_the_page(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    card = workbench.locator(".iw-traffic")
    card.locator("summary").click()
    card.locator("[data-traffic=preset]").select_option("shared prefix")
    expect(card.locator("[data-traffic=shared]")).to_have_attribute("aria-valuetext", "400")
    card.locator("[data-traffic=concurrency]").fill("1")  # the second of the steps: two at once
    card.locator("[data-action=start-traffic]").click()
    state = card.locator(".iw-traffic-state")
    expect(state).to_contain_text("shared prefix: 2 under way", timeout=30_000)
    slider = card.locator("[data-traffic=concurrency]")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    expect(state).to_contain_text("6 under way", timeout=30_000)
    card.locator("[data-action=stop-traffic]").click()
    expect(state).to_contain_text("shared prefix: stopped", timeout=30_000)
    expect(card.locator("[data-action=stop-traffic]")).to_be_hidden()
    expect(card.locator(".iw-refusal")).to_be_hidden()

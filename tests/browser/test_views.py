"""Each view beside the real engine: what it shows is what the server says, by mouse, by keyboard, and for everybody."""

from __future__ import annotations

import re
import time
from typing import Any

import httpx
import pytest
from jupyterlab import JupyterLab
from playwright.sync_api import Locator, Page, expect
from prometheus_client.parser import text_string_to_metric_families
from workbench_page import (
    READY_MS,
    REPETITIVE,
    command,
    finished,
    generate,
    open_lab,
    open_panel,
    serious,
    speculating,
    use_theme,
    wait_ready,
    wait_tokens,
)


def card(workbench: Locator, name: str) -> Locator:
    found = workbench.locator(f".iw-plot-{name}")
    found.scroll_into_view_if_needed()
    return found


def rows(shown: Locator) -> list[list[str]]:
    """The table behind a view, opened for it and closed again."""
    button = shown.locator(".iw-table-button")
    button.click()
    shown.locator(".iw-table-holder :is(tbody tr, .iw-empty)").first.wait_for()
    found: list[list[str]] = shown.locator(".iw-table-holder tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
    )
    button.click()
    return found


def server_features(lab: JupyterLab) -> dict[str, Any]:
    answer = httpx.get(f"{lab.workbench}features", headers=lab.headers, timeout=30)
    values: dict[str, Any] = answer.json()["values"]
    return values


def test_requests_blocks_latencies_and_money_are_those_of_the_server(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    generate(workbench, "story", tokens=24, parallel=3)
    blocks = card(workbench, "kv-map")
    expect(blocks.locator(".iw-caption")).to_contain_text(re.compile(r"[1-9]\d* used"))
    generate(workbench, "story", tokens=8, parallel=1)
    finished(workbench)
    told = httpx.get(f"{lab.workbench}requests", headers=lab.headers, timeout=30).json()["requests"]
    newest = {f"#{each['request']}": each for each in told[-4:]}

    timeline = card(workbench, "timeline")
    shown = {row[0]: row for row in rows(timeline)}
    for name, request in newest.items():
        assert shown[name][1] == request["state"]
        assert int(shown[name][2]) == request["output_tokens"]
    timeline.locator(".iw-plot").press("ArrowLeft")
    timeline.locator(".iw-plot").press("ArrowDown")
    expect(timeline.locator(".iw-caption")).to_contain_text(re.compile(r"request #\d+.*decode.*step \d+: "))

    # All requests have ended: their full blocks are cached, and the same prompt again shares them.
    blocks = card(workbench, "kv-map")
    expect(blocks.locator(".iw-caption")).to_contain_text(re.compile(r" 0 used · [1-9]\d* cached"))
    usage = page.evaluate(
        "(() => { const kv = window.inferenceWorkbench.store().steps.at(-1).event.kv; return kv; })()"
    )
    kv = page.evaluate(
        """() => {
          const { kv } = window.inferenceWorkbench.store();
          const states = Array.from({ length: kv.numBlocks }, (_, block) => kv.state(block));
          return { blocks: kv.numBlocks, used: states.filter(each => each === 'used').length,
                   cached: states.filter(each => each === 'cached').length };
        }"""
    )
    assert kv["blocks"] == usage["total_blocks"]
    assert kv["used"] == 0
    assert kv["cached"] >= usage["cached_blocks"]  # the newest step still counted its own requests' blocks
    picture = blocks.locator(".iw-plot")
    picture.press("ArrowRight")
    expect(blocks.locator(".iw-caption")).to_contain_text("block 0")

    workbench.locator("[data-window='0']").click()
    quantiles = card(workbench, "histogram").locator("[data-latency-row=e2e] td")
    ended = [each for each in told if each["state"] == "finished"]
    expect(quantiles.first).to_have_text(str(len(ended)))
    slowest = max(each["last_token_ns"] - each["arrival_ns"] for each in ended) / 1e6
    assert float(quantiles.last.inner_text().replace(",", "")) == pytest.approx(slowest, rel=0.01)

    economy = card(workbench, "economy")
    economy.locator(".iw-price").fill("3.6")
    expect(economy.locator("[data-figure=cost-output]")).to_have_text(re.compile(r"^[\d.,]+$"))
    time = page.evaluate("document.querySelector('.iw-plot-economy .iw-caption').textContent")
    assert "output tokens" in time
    priced = rows(economy)
    output = next(row for row in priced if "decode" in row[0])
    assert int(output[3].replace(",", "")) == page.evaluate("window.inferenceWorkbench.store().tokens.length")
    expect(card(workbench, "memory").locator(".iw-caption")).to_contain_text("weights")


def proposed(lab: JupyterLab) -> dict[str, float]:
    """The server's own counts of speculation: all drafts, and by place."""
    text = httpx.get(f"{lab.workbench}metrics", headers=lab.headers, timeout=30).text
    return {
        sample.name.removeprefix("vllm:spec_decode_num_") + sample.labels.get("position", ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "spec_decode" in sample.name and sample.name.endswith("_total")
    }


def places(shown: Locator) -> dict[int, list[str]]:
    """Acceptance by place: share, share if all before were accepted, proposed, accepted."""
    found = shown.locator("[data-table=acceptance] tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
    )
    return {int(row[0]): row[1:] for row in found}


def number(text: str) -> int:
    return int(text.replace(",", ""))


# The newest request: how each token came about, and what was rejected in the step of a correction.
ORIGINS = """() => {
  const store = window.inferenceWorkbench.store();
  const newest = [...store.requests.values()].sort((a, b) => b.handle - a.handle)[0];
  const names = ['plain', 'accepted', 'corrected', 'bonus'];
  return newest.tokens.map(token => {
    const { request, drafted = [], accepted = [] } = store.step(token.step).event;
    const at = request.indexOf(token.request);
    return [names[token.origin], token.origin === 2 ? String(drafted[at] - accepted[at]) : null];
  });
}"""


def test_speculation_is_shown_as_the_server_counts_it(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    strip = workbench.locator(".iw-strip")
    by_speculation = strip.locator("[data-colouring=speculation]")
    expect(strip.locator("[data-colouring=latency]")).to_have_attribute("aria-pressed", "true")
    # As many as the strip shows, so that no row is of a test before this one.
    generate(workbench, "story", tokens=6, parallel=3)
    finished(workbench)
    by_speculation.press("Enter")
    expect(by_speculation).to_have_attribute("aria-pressed", "true")
    expect(strip.locator(".iw-hint[role=status]")).to_contain_text("speculation is off")
    expect(strip.locator(".iw-legend")).to_contain_text("corrected")

    workbench.locator("[data-window='0']").click()
    shown = card(workbench, "speculation")
    page.wait_for_timeout(1000)  # a figure that comes into view is painted within half a second
    earlier, counted = places(shown), proposed(lab)
    last = page.evaluate("window.inferenceWorkbench.store().steps.at(-1).event.step")
    with speculating(lab):
        generate(workbench, "code", tokens=60, prompt=REPETITIVE)
        finished(workbench)
    new = {name: value - counted[name] for name, value in proposed(lab).items()}
    assert new["accepted_tokens_total"] > 4
    assert new["draft_tokens_total"] > new["accepted_tokens_total"]

    # The figure's tables say what the counters say.
    expect(shown.locator(".iw-caption")).to_contain_text("proposed tokens accepted")
    page.wait_for_timeout(1000)
    steps = [row for row in rows(shown) if number(row[0]) > last]
    assert {row[1] for row in steps} == {"ngram"}
    for column, name in ((2, "drafts"), (3, "draft_tokens"), (4, "accepted_tokens")):
        assert sum(number(row[column]) for row in steps) == new[f"{name}_total"], name
    now = places(shown)
    nothing = ["", "", "0", "0"]
    for place, row in now.items():
        before = earlier.get(place, nothing)
        assert number(row[3]) - number(before[3]) == new[f"accepted_tokens_per_pos_total{place - 1}"], place
        share = float(row[0].removeprefix("< ").removesuffix(" %")) / 100
        assert share == pytest.approx(number(row[3]) / number(now[1][2]), abs=0.006)
    assert (
        sum(number(row[2]) for row in now.values()) - sum(number(row[2]) for row in earlier.values())
        == (new["draft_tokens_total"])
    )
    worth = shown.locator("[data-table=proposers] tbody tr td").all_inner_texts()
    assert worth[0] == "ngram"
    assert float(worth[1]) == pytest.approx(
        1 + sum(number(row[3]) for row in now.values()) / number(now[1][2]), abs=0.006
    )
    assert re.match(r"[\d.,]+ (ms|s)$", worth[4])
    assert re.match(r"\d+ steps[,;]", worth[7])

    # Each token is marked as it came about, with what was thrown away for it.
    told = page.evaluate(ORIGINS)
    spans = strip.locator(".iw-row").first.locator(".iw-row-text .iw-token")
    marks = spans.evaluate_all(
        "all => all.map(each => [/iw-origin-(\\w+)/.exec(each.className)[1], each.dataset.rejected ?? null])"
    )
    assert marks == told
    names = [name for name, _ in told]
    assert names.count("accepted") == new["accepted_tokens_total"]
    assert "plain" in names
    assert not {"corrected", "bonus"}.isdisjoint(names)
    expect(strip.locator(".iw-hint[role=status]")).to_be_hidden()
    row = strip.locator(".iw-row-text").first
    row.focus()
    row.press("Home")
    for _ in range(names.index("accepted")):
        row.press("ArrowRight")
    expect(strip.locator(".iw-details")).to_contain_text(re.compile(r"accepted, 1st of \d+ proposed in step \d+"))
    step = re.search(r"proposed in step (\d+)", strip.locator(".iw-details").inner_text())
    assert step
    expect(shown.locator(".iw-caption")).to_contain_text(f"step {step[1]}: ngram proposed")

    # The choice of colours outlasts the page.
    workbench = open_panel(page, lab)
    expect(workbench.locator(".iw-strip [data-colouring=speculation]")).to_have_attribute("aria-pressed", "true")


def test_the_whole_switchboard_works_by_keyboard_with_presets_undo_and_effect(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    before = server_features(lab)
    # Everything that can be switched is reached by the tabulator, in order, and by nothing else.
    board = workbench.locator(".iw-switchboard")
    board.locator("[data-action=undo-switch], [data-action=explain]").last.focus()
    reached: set[str] = set()
    wanted = set(
        board.locator("[data-feature]:has(:is(input, select):not(:disabled))").evaluate_all(
            "all => all.map(each => each.dataset.feature)"
        )
    )
    for _ in range(3 * len(wanted) + 10):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.closest('[data-feature]')?.dataset.feature ?? null")
        if name is not None:
            reached.add(name)
    assert reached == wanted

    generate(workbench, "long", tokens=120)
    wait_tokens(page, 25)
    toggle = board.locator("[data-feature=fast_path] .iw-toggle")
    toggle.focus()
    toggle.press("Space")
    effect = board.locator("[data-feature=fast_path] .iw-switch-effect")
    expect(effect).to_contain_text(re.compile(r"tok/s \(× [\d.]+\).*ITL p50 [\d.]+ → [\d.]+ ms.*steps on either side"))
    expect(board.locator("[data-feature=compiled] .iw-switch-idle")).to_be_hidden()  # it has its turn now
    undo = board.locator("[data-action=undo-switch]")
    expect(undo).to_have_attribute("title", re.compile("Fast path on"))
    undo.press("Enter")
    expect(toggle).to_be_checked()
    expect(undo).to_be_disabled()
    expect(board.locator("[data-feature=compiled] .iw-switch-idle")).to_contain_text(
        "Makes no difference unless Fast path"
    )
    finished(workbench)

    naive = board.locator("[data-feature-preset=naive]")
    naive.press("Enter")
    expect(naive).to_have_attribute("aria-pressed", "true")
    assert server_features(lab)["kv_cache"] is False
    undo.press("Enter")
    expect(naive).to_have_attribute("aria-pressed", "false")
    assert server_features(lab) == before


def test_what_excludes_a_switch_is_said_and_thrown_with_it(page: Page, lab: JupyterLab, complaints: list[str]) -> None:
    workbench = open_panel(page, lab)
    before = server_features(lab)
    layout = workbench.locator("[data-feature=kv_layout]")
    layout.locator("select").select_option("contiguous")
    expect(layout.locator(".iw-switch-result")).to_contain_text("exclude each other")
    assert len(complaints) == 1
    assert "422" in complaints.pop()
    remedy = layout.locator("[data-action=switch-both]")
    expect(remedy).to_contain_text("Prefix cache: read off")
    remedy.click()
    expect(layout.locator(".iw-switch-result")).to_contain_text("applied in")
    values = server_features(lab)
    assert (values["kv_layout"], values["prefix_cache_read"]) == ("contiguous", False)
    workbench.locator("[data-action=undo-switch]").click()
    expect(layout.locator("select")).to_have_value("paged")
    assert server_features(lab) == before


def test_pause_freezes_the_views_and_says_what_they_miss_while_the_engine_goes_on(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    generate(workbench, "long", tokens=60)
    wait_tokens(page, 8)
    pause = workbench.locator("[data-action=pause-views]")
    pause.click()
    shown = workbench.locator(".iw-row").first.locator(".iw-token").count()
    caption = card(workbench, "batch").locator(".iw-caption").inner_text()
    expect(workbench.locator(".iw-missed")).to_have_text(re.compile(r"paused · \+[1-9][\d,]* events"))
    finished(workbench)
    assert workbench.locator(".iw-row").first.locator(".iw-token").count() == shown
    assert card(workbench, "batch").locator(".iw-caption").inner_text() == caption
    pause.press("Enter")
    expect(workbench.locator(".iw-row").first.locator(".iw-token")).to_have_count(60)
    expect(workbench.locator(".iw-missed")).to_be_empty()


def test_one_step_is_marked_in_every_view(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    generate(workbench, "story", tokens=20, parallel=2)
    finished(workbench)
    batch = card(workbench, "batch").locator(".iw-plot")
    batch.press("ArrowLeft")
    batch.press("ArrowLeft")
    step = re.search(r"step (\d+):", card(workbench, "batch").locator(".iw-caption").inner_text())
    assert step
    batch.focus()
    for name in ("kv", "attribution", "roofline"):
        expect(workbench.locator(f".iw-plot-{name} .iw-caption")).to_contain_text(f"step {step[1]}:")


def test_layouts_projector_panes_and_the_cell_that_reproduces_the_state(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    figures = workbench.locator(".iw-plots > section:visible")
    everything = figures.count()
    workbench.locator("[data-layout=memory]").click()
    assert 2 < figures.count() < everything
    workbench.locator("[data-action=views]").click()
    workbench.locator("[data-view=economy]").check()
    expect(workbench.locator(".iw-plot-economy")).to_be_visible()
    expect(workbench.locator("[data-layout=memory]")).to_have_attribute("aria-pressed", "false")
    page.keyboard.press("Escape")
    generate(workbench, "story", tokens=12)
    finished(workbench)

    workbench.locator("[data-action=projector]").click()
    workbench.locator("[data-action=projected]").select_option("batch")
    expect(figures).to_have_count(1)
    page.wait_for_timeout(600)
    small = workbench.evaluate(
        """root => [...root.querySelectorAll('*')].filter(each =>
             [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim() !== '') &&
             each.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true }) && !each.closest('.iw-hidden') &&
             !(each instanceof HTMLOptionElement) && parseFloat(getComputedStyle(each).fontSize) < 24
           ).map(each => each.outerHTML.slice(0, 120))"""
    )
    assert small == []
    assert workbench.locator(".iw-tile:visible, .iw-strip:visible, .iw-plots > section:visible").count() <= 3
    number = workbench.locator("[data-figure=rate]").evaluate("each => parseFloat(getComputedStyle(each).fontSize)")
    assert number > 90
    workbench.locator("[data-action=projector]").click()

    # One figure in a pane of its own, which a reload brings back.
    command(page, "Open “KV cache, block by block” in a Pane of Its Own")
    pane = page.locator("#inference-workbench-view-kv-map .iw-workbench")
    expect(pane.locator(".iw-plot-kv-map canvas").first).to_be_visible()
    expect(pane.locator(".iw-prompt")).to_be_hidden()
    expect(pane.locator(".iw-plot-kv-map .iw-caption")).to_contain_text("cached")
    page.wait_for_timeout(1500)  # JupyterLab saves its layout a second after the last change
    page.goto(lab.page())
    expect(pane.locator(".iw-plot-kv-map .iw-caption")).to_contain_text("cached", timeout=READY_MS)

    # The state as a cell, which brings a server back to it.
    page.goto(lab.page("lab/tree/notebooks/01-first-tokens.ipynb", reset=""))
    # A notebook takes the focus once its kernel is there, which would close the palette again.
    expect(page.locator(".jp-Notebook-ExecutionIndicator")).to_have_attribute("data-status", "idle", timeout=READY_MS)
    command(page, "Open Inference Workbench")
    workbench = wait_ready(page)
    workbench.locator("[data-feature=max_num_seqs] .iw-number").fill("5")
    workbench.locator("[data-feature=max_num_seqs] .iw-number").press("Enter")
    expect(workbench.locator("[data-feature=max_num_seqs] .iw-switch-result")).to_contain_text("applied in")
    workbench.locator("[data-preset=crowd]").click()
    workbench.locator("[data-action=reproduce]").click()
    expect(workbench.locator(".iw-prompt [role=status]")).to_contain_text("in the notebook")
    page.locator(".lm-TabBar-tab", has_text="01-first-tokens").click()
    cell = page.locator(".jp-Notebook .jp-Cell.jp-mod-active .cm-content").inner_text()
    assert "wb.features.update(max_num_seqs=5)" in cell
    assert "wb.generate_many(" in cell
    workbench = httpx.patch(f"{lab.workbench}features", headers=lab.headers, json={"max_num_seqs": 32}, timeout=30)
    assert workbench.status_code == 200
    compile(cell.replace("\u200b", ""), "cell", "exec")


# The theme is kept; the last is what the other tests begin with.
@pytest.mark.parametrize("theme", ["Dark", "Dark High Contrast", "Light"])
def test_nobody_is_kept_out(page: Page, lab: JupyterLab, theme: str) -> None:
    workbench = open_panel(page, lab)
    use_theme(page, theme)
    generate(workbench, "story", tokens=16, parallel=2)
    finished(workbench)
    workbench.locator(".iw-row-text .iw-token").nth(3).click()
    assert serious(page, ".iw-workbench") == []
    with speculating(lab):
        generate(workbench, "code", tokens=24, prompt=REPETITIVE)
        finished(workbench)
    workbench.locator(".iw-strip [data-colouring=speculation]").click()
    expect(card(workbench, "speculation").locator("[data-table=acceptance] tbody tr").first).to_be_visible()
    assert serious(page, ".iw-workbench") == []
    for each in workbench.locator(".iw-table-button").all():
        each.click()
    assert serious(page, ".iw-workbench") == []


def test_a_newcomer_sees_what_a_prefix_cache_does_with_six_clicks(page: Page, lab: JupyterLab) -> None:
    """The way that docs/views.md describes: every click of the mouse counts, those in the list of workloads too."""
    open_lab(page, lab)
    page.evaluate("window.clicks = 0; addEventListener('click', () => (window.clicks += 1), true)")
    page.locator(".jp-LauncherCard", has_text="Open Inference Workbench").click()
    begin = time.monotonic()
    workbench = wait_ready(page)
    traffic = workbench.locator(".iw-traffic")
    traffic.locator("summary").click()
    # The list is the system's own: its two clicks never reach the page.
    traffic.locator("[data-traffic=preset]").select_option("shared prefix")
    traffic.locator("[data-action=start-traffic]").click()
    prefix = workbench.locator("[data-feature=prefix_cache_read]")
    expect(workbench.locator(".iw-plot-kv-map .iw-caption")).to_contain_text("shared", timeout=60_000)
    page.wait_for_timeout(12_000)  # looks at it
    prefix.locator(".iw-toggle").click()
    effect = prefix.locator(".iw-switch-effect")
    expect(effect).to_contain_text("TTFT", timeout=60_000)
    page.wait_for_timeout(10_000)  # more requests on the other side
    text = effect.inner_text()
    seconds = time.monotonic() - begin
    assert page.evaluate("window.clicks") + 2 <= 6
    traffic.locator("[data-action=stop-traffic]").click()
    prefix.locator(".iw-toggle").click()
    match = re.search(r"TTFT p50 ([\d.,]+) → ([\d.,]+) ms", text)
    assert match, text
    cached, computed = (float(each.replace(",", "")) for each in match.groups())
    # 400 tokens of the prompt are computed anew for each request.
    assert computed > 1.5 * cached, text
    print(f"from the engine's start to the effect: {seconds:.0f} s; {text}")

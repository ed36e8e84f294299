"""Takes the pictures in ``docs/images``: a real JupyterLab, the real engine, the real model (``make screenshots``).

Names on the command line (teaching, panel, recording, views, speculation) take only those.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "browser")]

from chromium import FLAGS, find_chromium
from jupyterlab import JupyterLab, running_jupyterlab
from workbench_page import REPETITIVE, finished, generate, open_lab, open_panel, use_theme, wait_ready, wait_tokens

IMAGES = ROOT / "docs" / "images"


# Request and place of the slowest token, first tokens aside.
SLOWEST_SHOWN = """() => {
  const tokens = [...window.inferenceWorkbench.store().requests.values()].flatMap(each => each.tokens);
  const slowest = tokens.filter(each => each.index > 0).sort((a, b) => b.latencyNs - a.latencyNs)[0];
  return [slowest.request, slowest.index];
}"""


def new_page(browser: Browser, height: int = 1080) -> Page:
    return browser.new_context(viewport={"width": 1720, "height": height}).new_page()


def switched_in_the_middle(page: Page, workbench: Locator) -> None:
    """A generation with the KV cache switched off and on again."""
    toggle = page.locator("[data-feature=kv_cache] .iw-toggle").first
    generate(workbench, "long", tokens=150)
    wait_tokens(page, 45)
    toggle.click()
    wait_tokens(page, 75)
    toggle.click()
    wait_tokens(page, 130)


def teaching(browser: Browser, lab: JupyterLab) -> None:
    page = new_page(browser)
    open_lab(page, lab, **{"inference-workbench": "teach"})
    workbench = wait_ready(page)
    page.locator(".jp-Notebook .jp-MarkdownOutput h1").first.wait_for(timeout=60_000)
    switched_in_the_middle(page, workbench)
    page.screenshot(path=IMAGES / "workbench-light.png")
    page.context.close()


def panel(browser: Browser, lab: JupyterLab, theme: str) -> None:
    page = new_page(browser, 1500)
    workbench = open_panel(page, lab)
    use_theme(page, theme.title())
    switched_in_the_middle(page, workbench)
    finished(workbench)
    generate(workbench, "story", tokens=60, parallel=8)
    finished(workbench)
    page.wait_for_timeout(800)
    page.screenshot(path=IMAGES / f"panel-{theme}.png")
    page.context.close()


def views(browser: Browser, lab: JupyterLab) -> None:
    """Each view by itself, light, dark and for a projector; a shared prefix, a switch and many requests are in it."""
    (IMAGES / "views").mkdir(exist_ok=True)
    page = new_page(browser, 1300)
    workbench = open_panel(page, lab)
    workbench.locator(".iw-traffic > summary").click()
    workbench.locator("[data-traffic=preset]").select_option("shared prefix")
    workbench.locator("[data-action=start-traffic]").click()
    generate(workbench, "story", tokens=120, parallel=4)
    page.wait_for_timeout(14_000)
    workbench.locator("[data-feature=fast_path] .iw-toggle").click()
    page.wait_for_timeout(6_000)
    workbench.locator("[data-feature=fast_path] .iw-toggle").click()
    page.wait_for_timeout(6_000)
    workbench.locator(".iw-price").fill("2.5")
    workbench.locator("[data-action=pause-views]").click()
    for theme in ("light", "dark"):
        use_theme(page, theme.title())
        workbench.locator("[data-action=pause-views]").click()
        page.wait_for_timeout(1500)
        for card in workbench.locator(".iw-plots > section:not(.iw-plot-speculation)").all():
            card.scroll_into_view_if_needed()
            page.wait_for_timeout(900)
            name = re.search(r"iw-plot-(?!card)([a-z-]+)", card.get_attribute("class") or "")
            label = name[1] if name else "events"
            card.screenshot(path=IMAGES / "views" / f"{label}-{theme}.png")
        workbench.locator(".iw-switchboard").screenshot(path=IMAGES / "views" / f"switches-{theme}.png")
        if theme == "light":
            workbench.locator("[data-action=projector]").click()
            figure = workbench.locator("[data-action=projected]")
            for value in figure.locator("option:not([value=speculation])").evaluate_all(
                "all => all.map(each => each.value)"
            ):
                project(page, workbench, value)
            workbench.locator("[data-action=projector]").click()
        workbench.locator("[data-action=pause-views]").click()
    workbench.locator("[data-action=stop-traffic]").click()
    page.context.close()


def project(page: Page, workbench: Locator, figure: str) -> None:
    """One figure on the projector, which is switched on."""
    workbench.locator("[data-action=projected]").select_option(figure)
    page.wait_for_timeout(1200)
    page.locator(".iw-panel").evaluate("each => each.scrollTo(0, 1e6)")
    page.wait_for_timeout(600)
    page.screenshot(path=IMAGES / "views" / f"{figure}-projector.png")


def speculation(browser: Browser, lab: JupyterLab) -> None:
    """A text that repeats itself, plainly, then with proposals by the first layers, then by lookup."""
    (IMAGES / "views").mkdir(exist_ok=True)
    page = new_page(browser, 1300)
    workbench = open_panel(page, lab)
    adaptive = workbench.locator("[data-feature=adaptive_speculation] .iw-toggle")
    adaptive.click()
    for method in ("off", "early_exit", "ngram"):
        workbench.locator("[data-feature=speculation] select").select_option(method)
        generate(workbench, "code", tokens=90, prompt=REPETITIVE)
        finished(workbench)
    workbench.locator("[data-window='0']").click()
    workbench.locator(".iw-strip [data-colouring=speculation]").click()
    for theme in ("light", "dark"):
        use_theme(page, theme.title())
        for name in ("speculation", "strip"):
            card = workbench.locator(f".iw-plot-{name}, .iw-{name}")
            card.scroll_into_view_if_needed()
            page.wait_for_timeout(1500)
            card.screenshot(path=IMAGES / "views" / f"{'tokens' if name == 'strip' else name}-{theme}.png")
        if theme == "light":
            workbench.locator("[data-action=projector]").click()
            project(page, workbench, "speculation")
            workbench.locator("[data-action=projector]").click()
    workbench.locator("[data-feature=speculation] select").select_option("off")
    adaptive.click()
    page.context.close()


def recording(browser: Browser, lab: JupyterLab, theme: str) -> None:
    """A recording of a busy moment, opened and scrubbed to its middle, with one slow token taken apart."""
    page = new_page(browser, 1500)
    workbench = open_panel(page, lab)
    use_theme(page, theme.title())
    workbench.locator("[data-action=record]").click()
    generate(workbench, "long", tokens=90)
    wait_tokens(page, 20)
    generate(workbench, "story", tokens=50, parallel=3)
    switch = workbench.locator("[data-feature=kv_cache] .iw-toggle")
    wait_tokens(page, 12)
    switch.click()
    wait_tokens(page, 16)
    switch.click()
    finished(workbench)
    workbench.locator("[data-action=record]").click()
    workbench.locator("[data-action=open-recording]").click(timeout=60_000)
    document = page.locator(".jp-Document .iw-panel")
    track = document.locator(".iw-track")
    track.wait_for(timeout=60_000)
    page.wait_for_timeout(1500)
    box = track.bounding_box()
    assert box
    page.mouse.click(box["x"] + 0.72 * box["width"], box["y"] + box["height"] / 2)
    slowest = page.evaluate(SLOWEST_SHOWN)
    document.locator(f'[data-request="{slowest[0]}"] .iw-row-text .iw-token').nth(slowest[1]).click()
    page.wait_for_timeout(1500)
    page.screenshot(path=IMAGES / f"recording-{theme}.png")
    page.context.close()


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="iw-"))
    with running_jupyterlab(folder) as lab, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        wanted = set(sys.argv[1:]) or {"teaching", "panel", "recording", "views", "speculation"}
        if "teaching" in wanted:
            teaching(chromium, lab)
        for theme in ("light", "dark"):
            if "panel" in wanted:
                panel(chromium, lab, theme)
            if "recording" in wanted:
                recording(chromium, lab, theme)
        if "views" in wanted:
            views(chromium, lab)
        if "speculation" in wanted:
            speculation(chromium, lab)
        chromium.close()
    shutil.rmtree(folder, ignore_errors=True)
    print(*sorted(IMAGES.glob("*.png")), sep="\n")


if __name__ == "__main__":
    main()

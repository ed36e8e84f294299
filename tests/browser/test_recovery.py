"""The panel when its server is killed, stands still, or comes back as another one: it says so, and goes on."""

from __future__ import annotations

import os
import re
import signal
import time

import httpx
import psutil
from jupyterlab import JupyterLab
from playwright.sync_api import Page, expect
from prometheus_client.parser import text_string_to_metric_families
from workbench_page import READY_MS, finished, generate, open_panel, produced, stats, wait_ready, wait_tokens


def server_pid(lab: JupyterLab) -> int:
    answer = httpx.get(f"{lab.workbench}info", headers=lab.headers, timeout=30)
    return int(answer.json()["server"]["pid"])


def test_a_server_that_stands_still_for_a_while_loses_nothing(page: Page, lab: JupyterLab) -> None:
    workbench = open_panel(page, lab)
    generate(workbench, "long", tokens=80)
    wait_tokens(page, 8)
    pid = server_pid(lab)
    os.kill(pid, signal.SIGSTOP)
    try:
        page.wait_for_timeout(4000)
    finally:
        os.kill(pid, signal.SIGCONT)
    finished(workbench)
    assert produced(workbench)[0] == 80
    assert workbench.locator(".iw-row").first.locator(".iw-token").count() == 80
    assert stats(page)["dropped"] == 0


def running_requests(lab: JupyterLab) -> float:
    text = httpx.get(f"{lab.workbench}metrics", headers=lab.headers, timeout=30).text
    families = text_string_to_metric_families(text)
    return sum(each.value for family in families for each in family.samples if each.name == "vllm:num_requests_running")


def browser_processes() -> list[psutil.Process]:
    """Every process of the browser that this test drives."""
    return [each for each in psutil.Process().children(recursive=True) if "chrom" in each.name()]


def test_a_page_under_a_closed_lid_goes_on_where_the_server_is_or_says_what_it_missed(
    page: Page, lab: JupyterLab, complaints: list[str]
) -> None:
    """The browser stands still while the server writes a text to its end, and for LID_CLOSED_S seconds at least."""
    workbench = open_panel(page, lab)
    generate(workbench, "long", tokens=300)
    wait_tokens(page, 8)
    processes = browser_processes()
    assert processes
    for each in processes:
        each.suspend()
    try:
        time.sleep(float(os.environ.get("LID_CLOSED_S", "5")))
        while running_requests(lab) > 0:
            time.sleep(0.5)
    finally:
        for each in reversed(processes):
            each.resume()
    expect(workbench.locator(".iw-row-facts").first).to_contain_text("300/300 tokens", timeout=5000)
    expect(workbench.locator(".iw-status")).to_have_attribute("data-connection", "connected", timeout=1000)
    drawn = workbench.locator(".iw-row").first.locator(".iw-token").count()
    said = "left out|went by while this page was not connected"
    assert drawn == 300 or re.search(said, workbench.locator(".iw-feed").inner_text())
    complaints.clear()  # a socket that was given up


def test_a_killed_server_is_replaced_and_the_page_says_that_it_is_another_one(
    page: Page, lab: JupyterLab, complaints: list[str]
) -> None:
    workbench = open_panel(page, lab)
    generate(workbench, "long", tokens=400)
    wait_tokens(page, 5)
    os.kill(server_pid(lab), signal.SIGKILL)
    status = workbench.locator(".iw-status")
    expect(status).not_to_have_attribute("data-connection", "connected", timeout=5000)
    expect(workbench.locator(".iw-message")).not_to_be_empty()
    # JupyterLab starts another one when the page asks for it.
    expect(status).to_have_attribute("data-connection", "connected", timeout=READY_MS)
    expect(workbench.locator(".iw-feed")).to_contain_text("Connected to a new server")
    came_back = time.monotonic()
    wait_ready(page)
    generate(workbench, "story", tokens=6)
    finished(workbench)
    assert produced(workbench)[0] > 0
    assert time.monotonic() - came_back < 60
    complaints.clear()  # the browser reports the broken connection and its refusals


def test_after_the_server_is_back_the_panel_is_within_five_seconds(
    page: Page, lab: JupyterLab, complaints: list[str]
) -> None:
    workbench = open_panel(page, lab)
    status = workbench.locator(".iw-status")
    os.kill(server_pid(lab), signal.SIGKILL)
    expect(status).not_to_have_attribute("data-connection", "connected", timeout=5000)
    deadline = time.monotonic() + 60
    while True:
        answer = httpx.get(f"{lab.workbench}info", headers=lab.headers, timeout=30)
        if answer.status_code == 200:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    expect(status).to_have_attribute("data-connection", "connected", timeout=5000)
    wait_ready(page)
    complaints.clear()

"""Two real inference servers in one JupyterLab: side by side, each steered alone, and one after the other died."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from jupyterlab import ROOT, JupyterLab, running_server
from playwright.sync_api import Page, expect
from workbench_page import (
    READY_MS,
    command,
    finished,
    generate,
    open_lab,
    open_panel,
    produced,
    serious,
    use_theme,
    wait_ready,
)

import inference_workbench as iw

FIRST = "#inference-workbench-panel"
SECOND = "#inference-workbench-panel-2"


def line_of(lab: JupyterLab, pid: int) -> dict[str, Any]:
    """What the list says of a server, once its model is loaded."""
    deadline = time.monotonic() + READY_MS / 1000
    while True:
        servers = httpx.get(lab.servers, headers=lab.headers, timeout=30).json()["servers"]
        line: dict[str, Any] | None = next((each for each in servers if each["pid"] == pid), None)
        if line is not None and line["engine"] == "ready":
            return line
        assert time.monotonic() < deadline, servers
        time.sleep(0.3)


def tab(page: Page, panel: str) -> str:
    """The title of the tab of a panel."""
    return page.locator(f"#jp-main-dock-panel .lm-TabBar-tab[data-id='{panel[1:]}']").inner_text()


def test_two_servers_side_by_side_are_each_steered_alone_and_one_survives_the_other(
    page: Page, lab: JupyterLab, complaints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    with running_server(lab, tmp_path) as process:
        other = line_of(lab, process.pid)
        behind = f"{lab.servers}/{other['instance']}"
        assert (other["origin"], other["model"]) == ("cli", "SmolLM2-135M-Instruct")
        open_panel(page, lab)
        first = wait_ready(page, FIRST)
        chooser = first.locator("[data-action=choose-server]")
        expect(chooser.locator("option")).to_have_text(
            [re.compile("JupyterLab"), re.compile("command line · SmolLM2-135M-Instruct")]
        )

        # One more panel, beside the first: there is only one server that it can mean.
        command(page, "Open a Panel for Another Server")
        second = wait_ready(page, SECOND)
        left, right = page.locator(FIRST).bounding_box(), page.locator(SECOND).bounding_box()
        assert left is not None
        assert right is not None
        assert left["x"] + left["width"] <= right["x"]
        assert "command line" in tab(page, SECOND)
        expect(chooser).to_be_visible()
        assert "JupyterLab" in tab(page, FIRST)
        item = page.locator(".iw-status-item-button")
        expect(item).to_contain_text("command line")
        assert serious(page, f"{SECOND} .iw-status") == []

        # A switch, a request and a recording of the second are none of the first.
        second.locator("[data-action=record]").click()
        expect(second.locator("[data-action=record]")).to_have_text(re.compile("Stop"))
        for panel, value in ((second, "5"), (first, "32")):
            number = panel.locator("[data-feature=max_num_seqs] .iw-number")
            if panel is second:
                number.fill(value)
                number.press("Enter")
                expect(panel.locator("[data-feature=max_num_seqs] .iw-switch-result")).to_contain_text("applied in")
            expect(number).to_have_value(value)
        for url, value in ((behind, 5), (lab.workbench, 32)):
            answer = httpx.get(f"{url.rstrip('/')}/features", headers=lab.headers, timeout=30)
            assert answer.json()["values"]["max_num_seqs"] == value
        before = first.locator(".iw-row").count()
        generate(second, "story", tokens=16)
        finished(second)
        assert produced(second)[0] == 16
        assert first.locator(".iw-row").count() == before
        second.locator("[data-action=record]").click()
        second.locator("[data-action=open-recording]").click(timeout=60_000)
        replayed = page.locator(f"[id^='inference-workbench-recording-{other['instance']}']")
        expect(replayed.locator(".iw-track")).to_be_visible(timeout=60_000)
        assert list(tmp_path.glob("*.iwrec"))
        page.locator(".lm-TabBar-tab[data-id^='inference-workbench-recording'] .lm-TabBar-tabCloseIcon").click()

        # The cell finds this server and not the default one.
        second.locator("[data-action=reproduce]").click()
        expect(second.locator(".iw-prompt [role=status]")).to_be_visible()
        cell = page.evaluate("navigator.clipboard.readText()")
        connect = re.search(r"iw\.connect\(instance=.(\w+).\)", cell)
        assert connect, cell
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(lab.folder / "runtime"))
        with iw.connect(instance=connect[1]) as wb:
            assert wb.status().server.pid == process.pid
            assert wb.features.max_num_seqs == 5

        # A figure belongs to the panel that it was opened from. The status bar speaks of what was used last.
        command(page, "Open “Batch composition per step” in a Pane of Its Own")
        pane = page.locator("#inference-workbench-view-batch-2")
        expect(pane.locator(".iw-plot-batch canvas").first).to_be_visible()
        assert "command line" in tab(page, "#inference-workbench-view-batch-2")
        page.locator(f".lm-TabBar-tab[data-id='{FIRST[1:]}']").click()
        expect(item).to_contain_text("JupyterLab")

        # A reload brings each back with its own server.
        page.wait_for_timeout(1500)  # JupyterLab saves its layout a second after the last change
        page.goto(lab.page())
        first, second = wait_ready(page, FIRST), wait_ready(page, SECOND)
        expect(second.locator("[data-feature=max_num_seqs] .iw-number")).to_have_value("5")
        expect(first.locator("[data-feature=max_num_seqs] .iw-number")).to_have_value("32")
        expect(pane.locator(".iw-status")).to_have_attribute("data-connection", "connected", timeout=READY_MS)
        assert "command line" in tab(page, "#inference-workbench-view-batch-2")

        # One dies in the middle of the other's answer, which goes on.
        generate(first, "long", tokens=60)
        first.locator(".iw-row").first.locator(".iw-token").nth(5).wait_for(timeout=READY_MS)
        process.kill()
        process.wait()
        expect(second.locator(".iw-status")).to_have_attribute("data-connection", "ended", timeout=10_000)
        expect(second.locator(".iw-message")).to_contain_text("has ended")
        expect(second.get_by_role("button", name="Try now")).to_be_hidden()
        expect(second.locator("[data-action=choose-server]")).to_be_visible()
        finished(first)
        assert produced(first)[0] == 60

        # After a reload too; and whoever chooses another one in its place has it at once, in the pane as well.
        page.wait_for_timeout(1500)
        page.goto(lab.page())
        first = wait_ready(page, FIRST)
        second = page.locator(f"{SECOND} .iw-workbench")
        expect(second.locator(".iw-message")).to_contain_text("has ended", timeout=READY_MS)
        assert "command line · SmolLM2-135M-Instruct" in tab(page, SECOND)
        gone = second.locator("[data-action=choose-server]")
        expect(gone.locator("option:checked")).to_have_text("ended: command line · SmolLM2-135M-Instruct")
        second.locator(".iw-prompt-text").fill("What I was about to ask")
        gone.select_option("jupyterlab")
        second = wait_ready(page, SECOND)
        expect(second.locator(".iw-prompt-text")).to_have_value("What I was about to ask")
        expect(second.locator("[data-feature=max_num_seqs] .iw-number")).to_have_value("32")
        expect(pane.locator(".iw-status")).to_have_attribute("data-connection", "connected", timeout=READY_MS)
        expect(page.locator("[data-action=choose-server]:visible")).to_have_count(0)
    noise = [each for each in complaints if "410" not in each and "WebSocket" not in each]
    complaints.clear()
    assert noise == []


def newer_server(folder: Path) -> Path:
    """The server's code as a later version may have it, with a telemetry that this page cannot know; its folder."""
    code = folder / "newer"
    shutil.copytree(ROOT / "server", code, ignore=shutil.ignore_patterns("__pycache__"))
    protocol = code / "inference_server" / "protocol.py"
    text, replaced = re.subn(
        r"^PROTOCOL_VERSION = (\d+)$",
        lambda match: f"PROTOCOL_VERSION = {int(match[1]) + 1}",
        protocol.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert replaced == 1
    protocol.write_text(text, encoding="utf-8")
    return code


def test_a_server_of_a_newer_version_is_refused_with_what_to_do_and_the_others_go_on(
    page: Page, lab: JupyterLab, complaints: list[str], tmp_path: Path
) -> None:
    with running_server(lab, tmp_path, newer_server(tmp_path)) as process:
        line_of(lab, process.pid)
        open_panel(page, lab)
        first = wait_ready(page, FIRST)
        command(page, "Open a Panel for Another Server")
        second = page.locator(f"{SECOND} .iw-workbench")
        expect(second.locator(".iw-status")).to_have_attribute("data-connection", "failed", timeout=READY_MS)
        message = second.locator(".iw-message")
        expect(message).to_contain_text(
            re.compile(r"speaks telemetry protocol \d+, the client speaks \d+: the client is too old")
        )
        expect(message).to_contain_text("Reload")
        expect(second.get_by_role("button", name="Try now")).to_be_visible()
        for theme in ("Dark", "Dark High Contrast", "Light"):
            use_theme(page, theme)
            assert serious(page, f"{SECOND} .iw-status") == []
        generate(first, "story", tokens=8)
        finished(first)
        assert produced(first)[0] == 8
        # Whoever takes the server that can be understood goes on in the same panel.
        second.locator("[data-action=choose-server]").select_option("jupyterlab")
        wait_ready(page, SECOND)
    assert [each for each in complaints if "WebSocket" not in each] == []
    complaints.clear()


def test_without_another_server_the_command_says_so_and_the_chooser_comes_when_asked_for(
    page: Page, lab: JupyterLab
) -> None:
    open_lab(page, lab)
    command(page, "Open Inference Workbench")
    first = wait_ready(page, FIRST)
    chooser = first.locator("[data-action=choose-server]")
    expect(chooser).to_be_hidden()
    command(page, "Choose the Server of This Panel")
    expect(chooser).to_be_focused()
    command(page, "Open a Panel for Another Server")
    dialog = page.locator(".jp-Dialog")
    expect(dialog).to_contain_text("is shown already")
    dialog.locator(".jp-Dialog-button").click()
    assert page.locator(".iw-panel").count() == 1
    assert tab(page, FIRST) == "Inference Workbench"

"""The panel in a real kernel: a view is served while a cell runs, as JupyterLab's subshells make possible."""

import time

import pytest
from jupyter_client.manager import start_new_kernel
from servers_under_test import python_path


@pytest.fixture
def kernel(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", python_path())
    manager, client = start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def outputs_until_idle(client, message_id, seconds=60):
    seen = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        message = client.get_iopub_msg(timeout=seconds)
        seen.append(message)
        is_idle = message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
        if is_idle and message["parent_header"].get("msg_id") == message_id:
            return seen
    raise AssertionError(f"the cell did not end; it said {seen}")


SETUP = """
import pathlib, time
import inference_workbench as iw
from inference_workbench import panel as panel_module
if not (panel_module._STATIC / "widget.js").exists():
    folder = pathlib.Path({folder!r})
    (folder / "widget.js").write_text("export default {{ render() {{}} }}")
    panel_module._STATIC = folder
wb = iw.connect(uds={uds!r}, token={token!r})
panel = wb.panel()
"""

LONG_CELL = """
deadline = time.monotonic() + 20
while wb.features.kv_cache and time.monotonic() < deadline:
    wb.generate("hello", max_tokens=20, stream=False, ignore_eos=True)
print("switched in mid-cell" if not wb.features.kv_cache else "only after the cell")
wb.features.kv_cache = True
"""


def test_a_switch_thrown_in_the_view_takes_effect_while_a_cell_runs(kernel, server, wb, tmp_path):
    setup = SETUP.format(folder=str(tmp_path), uds=str(server.uds), token=server.token)
    seen = outputs_until_idle(kernel, kernel.execute(setup))
    assert not [message["content"] for message in seen if message["msg_type"] == "error"]
    comms = [message["content"] for message in seen if message["msg_type"] == "comm_open"]
    comm_id = next(each["comm_id"] for each in comms if "kv_cache" in each["data"]["state"])
    request = kernel.session.msg("create_subshell_request", {})
    kernel.control_channel.send(request)
    subshell = kernel.get_control_msg(timeout=20)["content"]["subshell_id"]

    def say(data):
        content = {"comm_id": comm_id, "data": {"method": "custom", "content": data}}
        message = kernel.session.msg("comm_msg", content)
        message["header"]["subshell_id"] = subshell
        kernel.shell_channel.send(message)

    say({"t": "ready", "protocol": 1})
    cell = kernel.execute(LONG_CELL)
    time.sleep(1)  # frames are on their way to the view from our own threads
    say({"t": "features", "values": {"kv_cache": False}})
    seen = outputs_until_idle(kernel, cell)
    printed = "".join(message["content"]["text"] for message in seen if message["msg_type"] == "stream")
    assert "switched in mid-cell" in printed

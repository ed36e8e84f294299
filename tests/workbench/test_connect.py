"""Finding, starting, losing and finding again: everything between ``connect()`` and a server that answers."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from servers_under_test import TOKEN, InferenceServer, python_path, running_jupyter, wait_for_socket

import inference_workbench as iw


@pytest.fixture
def no_jupyter(monkeypatch, tmp_path):
    """This user runs nothing."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "r"))
    monkeypatch.setenv("PYTHONPATH", python_path())
    for name in ("JPY_PARENT_PID", "INFERENCE_WORKBENCH_URL", "INFERENCE_WORKBENCH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_the_package_loads_nothing_heavy_until_it_is_used():
    code = "import sys, inference_workbench, inference_workbench.jupyter; print(sorted(sys.modules))"
    output = subprocess.check_output([sys.executable, "-c", code], env={"PYTHONPATH": python_path()}, text=True)
    for name in ("torch", "pandas", "numpy", "ipywidgets", "bokeh", "httpx"):
        assert f"'{name}'" not in output


def test_the_client_never_loads_torch():
    code = "import sys, inference_workbench.client, inference_workbench.panel, inference_workbench.figures\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": python_path()}, check=True)


def test_without_a_server_one_is_started_and_ends_with_the_workbench(no_jupyter, tiny_model, capsys):
    with iw.connect(model=str(tiny_model)) as wb:
        pid = wb.status().server.pid
        assert wb.generate("hello", max_tokens=4, ignore_eos=True, stream=False).summary().output_tokens == 4
        assert wb.engine  # the started one is found by a second client of this user
        with iw.connect() as second:
            assert second.status().server.pid == pid
    assert not is_alive(pid)


def test_a_started_server_dies_with_its_process_even_when_that_is_killed(no_jupyter, tiny_model):
    code = f"import inference_workbench as iw, time; wb = iw.connect(model={str(tiny_model)!r})\n"
    code += "print(wb.status().server.pid, wb.status().engine.pid, flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    while not line.strip().replace(" ", "").isdigit():  # progress comes first
        assert line, "the process ended before it said anything"
        line = process.stdout.readline()
    pids = [int(word) for word in line.split()]
    assert all(map(is_alive, pids))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "an orphan is left"
        time.sleep(0.05)


def test_a_model_that_cannot_be_loaded_is_reported_in_the_engines_words(no_jupyter, tmp_path):
    missing = tmp_path / "no-such-model"
    with pytest.raises(iw.ServerStartError, match="no-such-model"):
        iw.connect(model=str(missing))


def test_nothing_running_and_nothing_to_be_started_says_what_to_do(no_jupyter):
    with pytest.raises(iw.ServerNotFoundError, match="inference-workbench serve"):
        iw.connect(start=False)


def test_a_wrong_address_or_token_is_named(no_jupyter, server):
    with pytest.raises(iw.ServerGoneError, match=r"127\.0\.0\.1:9"):
        iw.connect("http://127.0.0.1:9", token="x")
    wait_for_socket(server, 60)
    with pytest.raises(iw.RequestError, match="oken"):
        iw.connect(uds=server.uds, token="wrong")
    with pytest.raises(iw.ServerNotFoundError, match="token"):
        iw.connect("http://127.0.0.1:9")


def test_another_protocol_version_is_refused_with_a_cure(no_jupyter, server, monkeypatch):
    wait_for_socket(server, 60)
    monkeypatch.setattr("inference_workbench.client.PROTOCOL_VERSION", 99)
    with pytest.raises(iw.VersionMismatchError, match="same version"):
        iw.connect(uds=server.uds, token=server.token)


def test_telemetry_comes_back_by_itself_after_the_server_was_restarted(tiny_model, tmp_path):
    server = InferenceServer(tmp_path, tiny_model)
    server.start()
    wait_for_socket(server, 60)
    try:
        with iw.connect(uds=server.uds, token=server.token) as wb:
            before = wb.generate("hello", max_tokens=8, ignore_eos=True, stream=False)
            instance = wb.store.instance
            server.kill()
            with pytest.raises(iw.ServerGoneError, match="does not answer"):
                wb.generate("hello", max_tokens=8, stream=False)
            server.start()
            wait_for_socket(server, 60)
            wb.wait_ready(120)
            after = wb.generate("hello", max_tokens=8, ignore_eos=True, stream=False)
            assert wb.store.instance != instance
            assert wb.telemetry.connections == 2
            assert after.complete
            assert after.text == before.text
            assert len(before.tokens) == 8  # a run keeps what it has
    finally:
        server.stop()


def test_a_request_whose_engine_is_killed_ends_with_an_error_and_the_next_one_works(wb):
    def kill(index, _text):
        if index == 3:
            os.kill(wb.status().engine.pid, signal.SIGKILL)

    with pytest.raises(iw.RequestError, match="engine"):
        wb.generate("hello", max_tokens=1500, ignore_eos=True, stream=False, on_token=kill)
    wb.wait_ready(120)
    assert wb.generate("hello", max_tokens=4, ignore_eos=True, stream=False).complete


def test_a_notebook_in_jupyter_uses_the_server_behind_its_own_jupyter(no_jupyter, tiny_model, tmp_path, monkeypatch):
    extension = "inference_workbench.jupyter"
    environment = {"INFERENCE_WORKBENCH_MODEL": str(tiny_model)}
    with running_jupyter(tmp_path, extension, base_url="/lab%20x/", **environment) as jupyter:
        monkeypatch.setenv("JPY_PARENT_PID", str(jupyter.process.pid))
        with iw.connect() as wb:
            behind = httpx.get(f"{jupyter.workbench}health", headers=jupyter.headers).json()
            assert wb.status().server.instance == behind["instance"]
            assert wb.telemetry.wait_open(5)
            # The server's death is repaired by whoever needs it next.
            os.kill(wb.status().server.pid, signal.SIGKILL)
            wb.wait_ready(120)
            assert wb.status().server.instance != behind["instance"]
            assert wb.generate("hello", max_tokens=4, ignore_eos=True, stream=False).complete
        pid = httpx.get(f"{jupyter.workbench}info", headers=jupyter.headers).json()["server"]["pid"]
        jupyter.process.kill()
        jupyter.process.wait()
        deadline = time.monotonic() + 10
        while is_alive(pid):
            assert time.monotonic() < deadline, "killing Jupyter left the inference server behind"
            time.sleep(0.05)


def test_through_jupyters_proxy_alone_everything_works_too(no_jupyter, tiny_model, tmp_path, monkeypatch):
    with running_jupyter(tmp_path, "inference_workbench.jupyter", INFERENCE_WORKBENCH_MODEL=str(tiny_model)) as jupyter:
        monkeypatch.setenv("JPY_PARENT_PID", str(jupyter.process.pid))
        monkeypatch.setattr("inference_workbench.servers.find_server", lambda _instance: None)
        with iw.connect() as wb:
            assert wb._server.endpoint.url.endswith("/inference-workbench")
            run = wb.generate("hello", max_tokens=8, ignore_eos=True, stream=False)
            assert run.complete
            assert len(run.tokens) == 8
            wb.features.kv_cache = False
            assert TOKEN not in repr(wb)


def test_threads_that_find_the_server_gone_bring_it_back_once(no_jupyter, tiny_model):
    with iw.connect(model=str(tiny_model)) as wb:
        pid = wb.status().server.pid
        os.kill(pid, signal.SIGKILL)
        found = []
        threads = [threading.Thread(target=lambda: found.append(wb._call("GET", "/health"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({answer["instance"] for answer in found}) == 1


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie of a container without an init that reaps is dead as well.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

"""Several inference servers behind one Jupyter server: listed, reached by instance, and told apart from what is not."""

import contextlib
import json
import os
import time

import httpx
import msgspec
import pytest
from servers_under_test import TOKEN, InferenceServer, running_jupyter, wait_for_socket
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import inference_workbench as iw
from inference_server import discovery
from inference_server.discovery import ServerFile
from processes import free_port

PREFIX = "inference-workbench-servers"


@contextlib.contextmanager
def announced(folder, model, runtime, **how):
    folder.mkdir()
    server = InferenceServer(folder, model, runtime=runtime, **how)
    server.start()
    try:
        wait_for_socket(server, 60)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("s")
    environment = {"INFERENCE_WORKBENCH_MODEL": str(tiny_model)}
    with running_jupyter(folder, "inference_workbench.jupyter", base_url="/user/ann%40lab/", **environment) as running:
        running.runtime = folder / "r"
        yield running


@pytest.fixture(scope="module")
def on_port(jupyter, tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("p") / "port"
    options = ("--served-name", "on-port")
    with announced(folder, tiny_model, jupyter.runtime, port=free_port(), options=options) as server:
        yield server


@pytest.fixture(scope="module")
def on_socket(jupyter, tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("u") / "u"
    with announced(folder, tiny_model, jupyter.runtime, options=("--served-name", "on-socket")) as server:
        yield server


@pytest.fixture
def client(jupyter):
    with httpx.Client(base_url=jupyter.url, headers=jupyter.headers, timeout=30) as client:
        yield client


def listed(client):
    answer = client.get(PREFIX)
    assert answer.status_code == 200, answer.text
    return {each["pid"]: each for each in answer.json()["servers"]}


def ready(client, server):
    """The server's line in the list, once its model is loaded."""
    deadline = time.monotonic() + 120
    while (line := listed(client).get(server.pid)) is None or line["engine"] != "ready":
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.2)
    return line


def path_of(line, path):
    return f"{PREFIX}/{line['instance']}/{path}"


def test_the_list_names_each_server_and_no_secret_and_starts_none(client, jupyter, on_port, on_socket):
    port, uds = ready(client, on_port), ready(client, on_socket)
    assert (port["model"], port["kind"], port["origin"], port["own"]) == ("on-port", "url", "cli", False)
    assert (uds["model"], uds["kind"], uds["origin"], uds["own"]) == ("on-socket", "uds", "cli", False)
    assert port["version"] == on_port.http().get("/health").json()["version"]
    assert port["instance"] != uds["instance"]
    text = client.get(PREFIX).text
    for secret in (on_port.token, str(on_socket.uds), str(on_port.port)):
        assert secret not in text
    assert len(listed(client)) == 2  # its own server has not been asked for
    assert client.get("inference-workbench/health").status_code == 200
    assert [each["origin"] for each in listed(client).values() if each["own"]] == ["jupyter"]


@pytest.mark.parametrize("which", ["on_port", "on_socket"])
def test_a_server_is_reached_by_its_instance_and_streams_and_switches(client, request, which):
    server = request.getfixturevalue(which)
    line = ready(client, server)
    info = client.get(path_of(line, "info")).json()
    assert info["server"]["pid"] == server.pid
    body = {"model": line["model"], "prompt": "hello", "max_tokens": 1500, "ignore_eos": True, "stream": True}

    def state():
        requests = client.get(path_of(line, "requests")).json()["requests"]
        return next(each["state"] for each in requests if each["id"] == request_id)

    with client.stream("POST", path_of(line, "v1/completions"), json=body) as answer:
        request_id = answer.headers["X-Request-Id"]
        lines = answer.iter_lines()
        next(lines)
        assert state() == "running"  # a part of the answer is here before the whole is there
    deadline = time.monotonic() + 5
    while state() == "running":
        assert time.monotonic() < deadline, "the server still generates for a client that has left"
    assert state() == "cancelled"
    changed = client.patch(path_of(line, "features"), json={"kv_cache": False})
    assert changed.json()["values"]["kv_cache"] is False
    client.patch(path_of(line, "features"), json={"kv_cache": True})


def test_a_switch_thrown_at_one_server_leaves_the_other_alone(client, on_port, on_socket):
    port, uds = ready(client, on_port), ready(client, on_socket)
    client.patch(path_of(port, "features"), json={"max_num_seqs": 3})
    assert client.get(path_of(port, "features")).json()["values"]["max_num_seqs"] == 3
    assert client.get(path_of(uds, "features")).json()["values"]["max_num_seqs"] != 3


@pytest.mark.parametrize("which", ["on_port", "on_socket"])
def test_telemetry_comes_through(client, jupyter, request, which):
    line = ready(client, request.getfixturevalue(which))
    url = f"{jupyter.url}{path_of(line, 'telemetry')}".replace("http", "ws", 1)
    with connect(f"{url}?token={TOKEN}") as socket:
        socket.send(msgspec.msgpack.encode({"t": "subscribe", "protocol": 1, "credits": 4}))
        snapshot = msgspec.msgpack.decode(socket.recv(timeout=10))
        assert snapshot["server"]["instance"] == line["instance"]
    with pytest.raises(InvalidStatus) as stranger:
        connect(url)
    assert stranger.value.response.status_code in {401, 403}
    with pytest.raises(InvalidStatus) as foreign:
        connect(f"{url}?token={TOKEN}", origin="https://elsewhere.example")
    assert foreign.value.response.status_code == 403


def test_strangers_and_foreign_pages_learn_nothing_not_even_who_runs(client, jupyter, on_port):
    line = ready(client, on_port)
    for path in (PREFIX, path_of(line, "health"), f"{PREFIX}/feedfacefeedface/health"):
        answer = httpx.get(jupyter.url + path, headers={"Authorization": "Bearer wrong"})
        assert answer.status_code == 401, path
        assert "Jupyter" in answer.json()["error"]["message"]
        answer = client.get(path, headers={"Origin": "https://elsewhere.example"})
        assert answer.status_code == 403, path
    with httpx.Client() as browser:
        browser.get(f"{jupyter.url}tree?token={TOKEN}")
        patch = browser.patch(jupyter.url + path_of(line, "features"), json={"kv_cache": False})
        assert patch.status_code == 403  # a cookie alone, without the XSRF token
    assert client.get(path_of(line, "features")).json()["values"]["kv_cache"] is True


def test_a_server_that_was_killed_is_gone_and_said_to_be(client, jupyter, tmp_path, tiny_model):
    with announced(tmp_path / "k", tiny_model, jupyter.runtime, port=free_port()) as server:
        line = ready(client, server)
        server.kill()
        for method in ("GET", "POST"):
            answer = client.request(method, path_of(line, "v1/completions"), json={})
            assert answer.status_code == 410
            assert "has ended" in answer.json()["error"]["message"]
        url = f"{jupyter.url}{path_of(line, 'telemetry')}".replace("http", "ws", 1)
        with pytest.raises(InvalidStatus) as ended:
            connect(f"{url}?token={TOKEN}")
        assert ended.value.response.status_code == 410
        assert server.pid not in listed(client)
        server.start()  # the same port and model, but another start: other switches, other requests
        wait_for_socket(server, 60)
        assert client.get(path_of(line, "health")).status_code == 410
        assert client.get(path_of(ready(client, server), "health")).status_code == 200


def write_file(runtime, **values):
    """A discovery file as a server of this process would write it."""
    line = ServerFile(
        **{
            "url": None,
            "uds": None,
            "token": "secret",
            "pid": os.getpid(),
            "version": "0",
            "instance": "made-up",
            "started": time.time(),
            "origin": "cli",
            **values,
        }
    )
    path = runtime / f"inference-workbench-{line.pid}.json"
    path.write_bytes(msgspec.json.encode(line))
    return path


def test_what_is_announced_elsewhere_or_does_not_answer_is_not_reached(client, jupyter):
    path = write_file(jupyter.runtime, url="http://192.0.2.1:80")
    try:
        answer = client.get(f"{PREFIX}/made-up/health")
        assert answer.status_code == 503
        assert "another machine" in answer.json()["error"]["message"]
        assert listed(client)[os.getpid()]["engine"] is None
        write_file(jupyter.runtime, url=f"http://127.0.0.1:{free_port()}")
        answer = client.get(f"{PREFIX}/made-up/health")
        assert answer.status_code == 503
        assert "does not answer" in answer.json()["error"]["message"]
    finally:
        path.unlink()


def test_the_path_after_the_instance_is_the_servers_own(client, on_port):
    line = ready(client, on_port)
    assert client.get(path_of(line, "nothing/here")).status_code == 404
    assert client.get(f"{PREFIX}/127.0.0.1:{on_port.port}/health").status_code == 404
    assert client.get(f"{PREFIX}/%2e%2e/health").status_code == 404


def test_files_of_other_users_and_links_are_not_believed(monkeypatch, tmp_path):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    path = write_file(tmp_path, uds="/nowhere")
    assert [each.instance for each in discovery.list_servers()] == ["made-up"]
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert discovery.list_servers() == []
    path.unlink()
    elsewhere.rename(path)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    assert discovery.list_servers() == []
    assert path.exists()  # not ours to remove


def test_python_connects_by_instance_and_is_told_which_ones_run(monkeypatch, client, jupyter, on_port, on_socket):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(jupyter.runtime))
    for server in (on_port, on_socket):
        line = ready(client, server)
        with iw.connect(instance=line["instance"]) as wb:
            assert wb.status().server.pid == server.pid
    with pytest.raises(iw.ServerNotFoundError, match=line["instance"]):
        iw.connect(instance="feedfacefeedface")


def test_the_list_holds_what_jupyters_log_may_hold(jupyter, client, on_port):
    ready(client, on_port)
    log = jupyter.log.read_text()
    assert on_port.token not in log
    assert json.dumps(TOKEN) not in log.partition(PREFIX)[2]

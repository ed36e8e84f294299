"""The command line and discovery: what a person types, and what a client on this machine finds."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import typer
from running_front import TOKEN, RunningFront

from inference_server import discovery
from inference_server.cli import parse_bytes

Start = Callable[..., RunningFront]


def command(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "inference_server.cli", *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_running_server_is_found_shown_and_stopped(scripted: Start, tmp_path: Path) -> None:
    front = scripted()
    front.wait_for_engine("ready")
    (path,) = (tmp_path / "runtime").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert front.file.token == TOKEN
    assert front.file.pid == front.process.pid
    shown = command("status", folder=tmp_path)
    assert f"{front.url}/?token={TOKEN}" in shown.stdout
    assert "engine ready" in shown.stdout
    engine = front.engine()["pid"]
    stopped = command("stop", folder=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    assert front.process.wait(5) == 128 + 15
    assert not path.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)
    assert command("status", folder=tmp_path).returncode == 1


def test_a_dead_servers_file_is_swept_away_even_if_its_id_was_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    ours = discovery.ServerFile(
        url="http://127.0.0.1:1",
        uds=None,
        token="t",
        pid=os.getpid(),
        version="0",
        instance="i",
        started=time.time(),
        origin="cli",
        process_start=discovery.process_start(os.getpid()),
    )
    path = discovery.publish(ours)
    assert discovery.list_servers() == [ours]
    discovery.publish(msgspec.structs.replace(ours, process_start=1))  # the process that wrote it began at another time
    assert discovery.list_servers() == []
    assert not path.exists()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    discovery.publish(msgspec.structs.replace(ours, pid=dead.pid, process_start=None))
    assert discovery.list_servers() == []
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_said_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = command("serve", "--port", port, folder=tmp_path)
    assert refused.returncode == 1
    assert f"Port {port}" in refused.stderr
    assert "--port 0" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("--uds", "/tmp/" + "x" * 120), {}, "too long"),
        (("--uds", "/etc/hostname"), {}, "is no socket"),
        (("--port", "1", "--uds", "s"), {}, "one of"),
        (("--dtype", "int3"), {}, "int3"),
        (("--origin", "moon"), {}, "origin"),
        (("--kv-memory", "much"), {}, "512M"),
        (("--log-level", "loud"), {}, "loud"),
        ((), {"INFERENCE_WORKBENCH_PORT": "many"}, "INFERENCE_WORKBENCH_PORT"),
        ((), {"INFERENCE_WORKBENCH_ALLOWED_ORIGINS": "no json"}, "allowed_origins"),
    ],
)
def test_a_wrong_option_is_explained(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], words: str
) -> None:
    refused = command("serve", *arguments, folder=tmp_path, **environment)
    assert refused.returncode in {1, 2}
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_socket_of_a_server_is_its_users_alone(tmp_path: Path, tokenizer_folder: Path) -> None:
    import httpx

    path = tmp_path / "socket"
    process = subprocess.Popen(
        [sys.executable, "-m", "inference_server.cli", "serve", "--uds", str(path)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
            "INFERENCE_WORKBENCH_ENGINE_COMMAND": '["false"]',
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
            assert client.get("/").status_code == 200
    finally:
        process.terminate()
        process.wait(20)
    assert not path.exists()


def test_the_front_and_the_command_line_import_no_torch_and_are_quick() -> None:
    script = (
        "import sys, time; begin = time.perf_counter(); import inference_server.cli, inference_server.front.serve;"
        "print(time.perf_counter() - begin); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, modules = ran.stdout.splitlines()
    assert modules == "[]"
    assert float(seconds) < 5


@pytest.mark.parametrize(
    ("text", "number"), [("512M", 512 << 20), ("4g", 4 << 30), ("1.5GiB", 3 << 29), ("1000", 1000), ("64 kb", 64 << 10)]
)
def test_amounts_of_memory_are_read(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "M", "-4G", "0", "nan", "inf", "4X"])
def test_nonsense_amounts_of_memory_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="512M"):
        parse_bytes(text)
